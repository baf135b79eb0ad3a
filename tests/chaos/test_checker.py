"""Proves the checker: hand-corrupted histories are flagged, clean ones pass, a million jobs take seconds."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import (
    MS,
    DeadJob,
    History,
    Limits,
    MidAudit,
    StoreAudit,
    check,
    examine,
    history_of,
)
from tests.chaos.journal import (
    END_FAIL,
    END_OK,
    Event,
    ExecJournal,
    Execution,
    Fault,
    FaultLog,
    Submission,
    SubmitJournal,
    load,
)

S = 1_000 * MS
LIMITS = Limits(
    lease_ms=2_000,
    max_retries=3,
    grace_ms=1_000,
    retry_base_ms=100,
    recovery_ms={"kill": 3_000},
    settle_window_ms=200,
)


class Clean:
    """A legal run with one job of every fate; each test corrupts a copy of it."""

    def __init__(self) -> None:
        self.h = History([], [], [], [], StoreAudit(), [])
        self.ids: dict[str, str] = {}
        self.orders: dict[int, int] = {}

    def job(self, name: str, n: int, at_ms: int, expect: str = "ok", **opts: Any) -> str:
        job = f"{name.upper():0>26}.0"
        self.ids[name] = job
        sub = Submission(
            n, "T", expect, "normal", opts.pop("key", ""), at_ms * MS, "ok", job, (at_ms + 1) * MS
        )
        sub.opts = opts or None
        self.subs.append(sub)
        return job

    @property
    def subs(self) -> list[Submission]:
        assert isinstance(self.h.submissions, list)
        return self.h.submissions

    @property
    def runs(self) -> list[Execution]:
        assert isinstance(self.h.executions, list)
        return self.h.executions

    def run(
        self, job: str, n: int, pid: int, start: float, end: float, outcome: str, attempt: int = 1
    ) -> None:
        token = f"{job}/{len(self.runs)}"
        end_ns = int(end * MS) if outcome else 0
        order = self.orders.get(pid, 0)
        self.orders[pid] = order + 1
        self.runs.append(Execution(job, n, attempt, token, pid, int(start * MS), end_ns, outcome, order))

    def done(self, job: str, state: str = "completed") -> None:
        self.h.audit.states[job] = state

    def dead(self, job: str, reason: str, attempts: int = 0, crashes: int = 0) -> None:
        self.done(job, "dead")
        audit = self.h.audit
        audit.dlq[job] = DeadJob(reason, attempts, crashes)
        audit.dlq_index.add(job)
        audit.dlq_meta.add(job)

    def fault(self, kind: str, at: float, *pids: int, until: float = 0) -> None:
        assert isinstance(self.h.faults, list)
        self.h.faults.append(Fault(int(at * MS), kind, pids, int(until * MS)))

    def event(self, kind: str, at: float, job: str, answer: str) -> None:
        assert isinstance(self.h.events, list)
        self.h.events.append(Event(int(at * MS), kind, job, answer))


def clean() -> Clean:
    w = Clean()
    for i in range(20):
        job = w.job(f"P{i}", i, 10)
        w.run(job, i, 1 + i % 2, 20 + i, 20.5 + i, END_OK)
        w.done(job)
    flaky = w.job("flaky", 100, 10, "fail:2")
    w.run(flaky, 100, 1, 50, 51, END_FAIL)
    w.run(flaky, 100, 2, 150, 151, END_FAIL, 2)
    w.run(flaky, 100, 1, 300, 301, END_OK, 3)
    w.done(flaky)
    hopeless = w.job("hopeless", 101, 10, "fail:9", max_retries=1)
    w.run(hopeless, 101, 1, 60, 61, END_FAIL)
    w.run(hopeless, 101, 1, 160, 161, END_FAIL, 2)
    w.dead(hopeless, "failed: ValueError", attempts=2)
    poison = w.job("poison", 102, 10, "poison")
    for i, pid in enumerate((30, 31, 32)):
        w.run(poison, 102, pid, 100 + 1000 * i, 0, "")
    w.dead(poison, "crash: SIGKILL", crashes=3)
    killed = w.job("killed", 103, 10)
    left = w.job("left", 104, 10)  # had returned, its record was not written yet
    w.run(killed, 103, 40, 500, 0, "")
    w.run(killed, 103, 1, 1600, 1601, END_OK)
    w.run(left, 104, 41, 500, 501, END_OK)
    w.run(left, 104, 1, 1610, 1611, END_OK)
    w.fault("kill", 502, 40, 41)
    w.done(killed)
    w.done(left)
    frozen = w.job("frozen", 105, 10)
    w.run(frozen, 105, 50, 700, 4_000, END_OK)  # a zombie that ends after its lease was lost
    w.run(frozen, 105, 1, 3_000, 3_001, END_OK)
    w.fault("stop", 701, 50, until=3_999)
    w.done(frozen)
    host = w.job("host", 106, 10)
    w.run(host, 106, 60, 690, 695, END_OK)
    w.run(host, 106, 1, 4_100, 4_101, END_OK)
    w.fault("kill_host", 700, 60, 61)
    w.done(host)
    drained = w.job("drained", 107, 10)
    w.run(drained, 107, 70, 5_000, 0, "")
    w.run(drained, 107, 1, 6_200, 6_201, END_OK)
    w.fault("term", 5_100, 70)
    w.done(drained)
    outage = w.job("outage", 108, 10)
    w.run(outage, 108, 2, 6_300, 6_310, END_OK)
    w.run(outage, 108, 1, 6_800, 6_810, END_OK)
    w.fault("redis_kill", 6_311, until=6_700)
    w.done(outage)
    keyed = w.job("keyed", 109, 10, key="k1")
    w.subs.append(Submission(110, "T", "ok", "normal", "k1", 30 * MS, "dup", keyed, 31 * MS, {"number": 109}))
    w.run(keyed, 109, 1, 900, 901, END_OK)
    w.done(keyed)
    w.h.audit.idem["k1"] = keyed
    lost_reply = f"{'LOSTREPLY':0>26}.0"
    w.ids["lost_reply"] = lost_reply
    w.subs.append(Submission(111, "T", "ok", "normal", "", 10 * MS, "unknown", "", 40 * MS))
    w.run(lost_reply, 111, 1, 950, 951, END_OK)
    w.done(lost_reply)
    w.subs.append(Submission(112, "T", "ok", "normal", "", 10 * MS, "unknown", "", 40 * MS))
    w.subs.append(Submission(113, "T", "ok", "normal", "", 10 * MS, "refused", "", 40 * MS))
    cancelled = w.job("cancelled", 114, 10)
    w.event("cancel", 12, cancelled, "cancelled")
    w.done(cancelled, "cancelled")
    replayed = w.job("replayed", 115, 10, "fail:1", max_retries=0)
    w.run(replayed, 115, 1, 960, 961, END_FAIL)
    w.event("observe", 1_000, replayed, "dead")
    w.event("replay", 1_100, replayed, "1")
    w.event("replay", 1_101, replayed, "0")
    w.run(replayed, 115, 2, 1_200, 1_201, END_OK)
    w.done(replayed)
    delayed = w.job("delayed", 116, 10, delay_ms=500)
    w.run(delayed, 116, 1, 515, 516, END_OK)
    w.done(delayed)
    untracked = w.job("untracked", 117, 10, track=False)
    w.run(untracked, 117, 1, 517, 518, END_OK)
    result = w.job("result", 118, 10, result=[1, 2])
    w.run(result, 118, 1, 519, 520, END_OK)
    w.done(result)
    w.h.audit.results[result] = [1, 2]
    for run in w.runs:
        run.last = w.orders[run.pid] - 1 - run.order
    accepted = len([sub for sub in w.subs if sub.outcome == "ok"]) + 1
    w.h.audit.totals = {"submitted": accepted, "dead": 3, "cancelled": 1, "expired": 0}
    w.h.audit.totals["completed"] = accepted - 3
    w.h.audit.depth = {"normal": 0, "delayed": 0}
    assert isinstance(w.h.mid_audits, list)
    w.h.mid_audits.append(MidAudit(200 * MS, accepted, 5, 2, 3, accepted - 12, 1, 1))
    return w


def test_clean_history_passes() -> None:
    report = examine(clean().h, LIMITS)
    assert report.violations == []
    assert report.reruns == {
        "retry": 3,
        "poison": 2,
        "kill": 2,
        "lease": 1,
        "host": 1,
        "drain": 1,
        "redis": 1,
        "replay": 1,
    }


def test_empty_history_passes() -> None:
    assert check(History()) == []


# ---- corruptions: name, INV that must be flagged, what is done to a clean history

Corrupt = Callable[[Clean], None]
CORRUPTIONS: list[tuple[str, int, Corrupt]] = []


def corruption(inv: int) -> Callable[[Corrupt], Corrupt]:
    def add(function: Corrupt) -> Corrupt:
        CORRUPTIONS.append((function.__name__, inv, function))
        return function

    return add


def runs_of(w: Clean, name: str) -> list[Execution]:
    return [run for run in w.runs if run.job == w.ids[name]]


def again(w: Clean, name: str, at: float, pid: int = 1, **changes: Any) -> Execution:
    """One more start of a job, long after everything else."""
    run = copy.copy(runs_of(w, name)[-1])
    run.start_ns, run.end_ns, run.pid, run.token = int(at * MS), int(at * MS) + MS, pid, f"again{at}"
    for field, value in changes.items():
        setattr(run, field, value)
    w.runs.append(run)
    return run


@corruption(1)
def job_vanished_before_it_ran(w: Clean) -> None:
    w.runs.remove(runs_of(w, "P3")[0])
    del w.h.audit.states[w.ids["P3"]]


@corruption(1)
def snapshot_queued_frame_nowhere(w: Clean) -> None:
    w.runs.remove(runs_of(w, "P3")[0])
    w.h.audit.states[w.ids["P3"]] = "queued"


@corruption(1)
def untracked_job_never_ran(w: Clean) -> None:
    w.runs.remove(runs_of(w, "untracked")[0])


@corruption(1)
def result_gone(w: Clean) -> None:
    del w.h.audit.results[w.ids["result"]]


@corruption(4)
def result_of_another_job(w: Clean) -> None:
    w.h.audit.results[w.ids["result"]] = [9]


@corruption(1)
def undamaged_job_in_quarantine(w: Clean) -> None:
    w.h.audit.states[w.ids["P3"]] = "damaged"


@corruption(2)
def execution_of_an_unknown_number(w: Clean) -> None:
    w.run("Z" * 26 + ".0", 9_999, 1, 7_000, 7_001, END_OK)


@corruption(2)
def execution_with_the_payload_of_another(w: Clean) -> None:
    runs_of(w, "P3")[0].n = 4


@corruption(2)
def record_that_nobody_submitted(w: Clean) -> None:
    w.h.audit.states["Z" * 26 + ".0"] = "completed"
    w.h.audit.states["Z" * 26 + ".1"] = "completed"  # one could be the unanswered submission


@corruption(2)
def refused_job_ran(w: Clean) -> None:
    w.run("Z" * 26 + ".0", 113, 1, 7_000, 7_001, END_OK)


@corruption(2)
def one_id_for_two_submissions(w: Clean) -> None:
    w.subs[1].id = w.subs[0].id


@corruption(3)
def unanswered_submission_made_two_jobs(w: Clean) -> None:
    w.run("Z" * 26 + ".0", 111, 1, 7_000, 7_001, END_OK)


@corruption(4)
def completed_without_an_execution(w: Clean) -> None:
    w.runs.remove(runs_of(w, "P3")[0])


@corruption(4)
def completed_though_every_start_died(w: Clean) -> None:
    w.runs.remove(runs_of(w, "killed")[1])


@corruption(5)
def finished_job_ran_again(w: Clean) -> None:
    again(w, "P3", 7_000)


@corruption(5)
def never_ended_in_a_process_that_nobody_killed(w: Clean) -> None:
    first = runs_of(w, "P3")[0]
    first.outcome, first.end_ns = "", 0
    again(w, "P3", 7_000, outcome=END_OK)


@corruption(5)
def kill_made_two_jobs_run_again(w: Clean) -> None:
    """The worker had gone on from `killed` to P0, so one of the two had been finished before."""
    runs_of(w, "P0")[0].pid = 41
    again(w, "P0", 1_620)


@corruption(5)
def job_settled_long_before_the_kill_ran_again(w: Clean) -> None:
    first = runs_of(w, "P0")[0]
    first.pid, first.last = 41, 1
    again(w, "P0", 1_620)


@corruption(5)
def stop_shorter_than_the_lease(w: Clean) -> None:
    w.h.faults[1].until_ns = w.h.faults[1].t_ns + 100 * MS


@corruption(5)
def job_settled_long_before_the_host_died(w: Clean) -> None:
    first = runs_of(w, "host")[0]
    first.start_ns, first.end_ns = 100 * MS, 101 * MS


@corruption(5)
def drain_lost_a_finished_job(w: Clean) -> None:
    first = runs_of(w, "drained")[0]
    first.outcome, first.end_ns = END_OK, first.start_ns + MS


@corruption(6)
def two_processes_at_once(w: Clean) -> None:
    other = again(w, "P3", 0, pid=2)
    first = runs_of(w, "P3")[0]
    other.start_ns, other.end_ns = first.start_ns + 1_000, first.end_ns + 1_000


@corruption(6)
def ran_again_before_its_worker_was_killed(w: Clean) -> None:
    runs_of(w, "killed")[1].start_ns = 501 * MS


@corruption(7)
def completed_and_in_the_dlq(w: Clean) -> None:
    w.dead(w.ids["P3"], "crash")
    w.h.audit.states[w.ids["P3"]] = "completed"


@corruption(7)
def terminal_state_changed_after_it_was_seen(w: Clean) -> None:
    w.event("observe", 8_000, w.ids["P3"], "dead")


@corruption(7)
def started_after_it_was_seen_completed(w: Clean) -> None:
    w.event("observe", 100, w.ids["P3"], "completed")
    again(w, "P3", 7_000)


@corruption(7)
def one_lease_started_it_twice(w: Clean) -> None:
    for run in runs_of(w, "frozen"):
        run.token = "LEASE"


@corruption(7)
def cancelled_by_nobody(w: Clean) -> None:
    w.h.audit.states[w.ids["P3"]] = "cancelled"


@corruption(7)
def ran_after_it_was_cancelled(w: Clean) -> None:
    w.run(w.ids["cancelled"], 114, 1, 7_000, 7_001, END_OK)


@corruption(8)
def in_two_places(w: Clean) -> None:
    w.h.audit.places = {"queued:normal": [w.ids["P3"]], "delayed": [w.ids["P3"]]}


@corruption(8)
def completed_and_still_leased(w: Clean) -> None:
    w.h.audit.places = {"leased": [w.ids["P3"]]}


@corruption(8)
def dead_without_a_dlq_entry(w: Clean) -> None:
    for part in (w.h.audit.dlq, w.h.audit.dlq_index, w.h.audit.dlq_meta):
        part.pop(w.ids["poison"]) if isinstance(part, dict) else part.discard(w.ids["poison"])


@corruption(8)
def dlq_index_without_a_body(w: Clean) -> None:
    w.h.audit.dlq_index.add("Z" * 26 + ".0")


@corruption(8)
def hash_without_a_lease(w: Clean) -> None:
    w.h.audit.processing.add("INC")


@corruption(8)
def lease_name_and_frame_differ(w: Clean) -> None:
    w.h.audit.mismatches.append("lease A holds B")


@corruption(9)
def one_key_made_two_jobs(w: Clean) -> None:
    second = w.job("second", 120, 50, key="k1")
    w.run(second, 120, 1, 7_000, 7_001, END_OK)
    w.done(second)


@corruption(9)
def duplicate_was_told_another_id(w: Clean) -> None:
    w.subs[[sub.n for sub in w.subs].index(110)].id = w.ids["P3"]


@corruption(9)
def duplicate_ran_as_a_second_job(w: Clean) -> None:
    w.run("Z" * 26 + ".0", 109, 1, 7_000, 7_001, END_OK)


@corruption(9)
def key_held_by_a_job_that_does_not_exist(w: Clean) -> None:
    w.h.audit.idem["k2"] = "Z" * 26 + ".0"


@corruption(1)
def job_of_a_duplicate_does_not_exist(w: Clean) -> None:
    """The first request was answered `unknown`; the repeat was told an id that is nowhere."""
    w.subs.append(Submission(121, "T", "ok", "normal", "k3", 50 * MS, "dup", "Z" * 26 + ".0", 51 * MS))


@corruption(10)
def completed_counted_twice(w: Clean) -> None:
    w.h.audit.totals["completed"] += 1


@corruption(10)
def submission_not_counted(w: Clean) -> None:
    w.h.audit.totals["submitted"] -= 1


@corruption(10)
def duplicate_counted_though_never_answered(w: Clean) -> None:
    w.h.submissions = [sub for sub in w.subs if sub.n not in (111, 112)]
    w.h.executions = [run for run in w.runs if run.n != 111]
    del w.h.audit.states[w.ids["lost_reply"]]
    w.h.audit.totals.update(submitted=w.h.audit.totals["submitted"] - 1, duplicate=2)
    w.h.audit.totals["completed"] -= 1


@corruption(10)
def job_missing_from_an_audit(w: Clean) -> None:
    first = w.h.mid_audits[0]
    w.h.mid_audits = [MidAudit(first.t_ns, first.submitted, 4, 2, 3, first.completed, 1, 1)]


@corruption(10)
def answered_before_it_was_stored(w: Clean) -> None:
    w.h.mid_audits = [MidAudit(200 * MS, 1, 1, 0, 0, 0, 0, 0)]


@corruption(13)
def started_before_its_time(w: Clean) -> None:
    runs_of(w, "delayed")[0].start_ns = 300 * MS


@corruption(14)
def more_attempts_than_allowed(w: Clean) -> None:
    runs_of(w, "hopeless")[1].outcome = END_FAIL
    again(w, "hopeless", 7_000, outcome=END_FAIL, attempt=3)


@corruption(14)
def crash_charged_as_an_attempt(w: Clean) -> None:
    runs_of(w, "killed")[1].attempt = 2


@corruption(14)
def drain_charged_as_an_attempt(w: Clean) -> None:
    runs_of(w, "drained")[1].attempt = 2


@corruption(14)
def first_start_is_not_the_first_attempt(w: Clean) -> None:
    runs_of(w, "P3")[0].attempt = 2


@corruption(5)
def failure_not_counted(w: Clean) -> None:
    for run in runs_of(w, "flaky")[1:]:
        run.attempt -= 1


@corruption(14)
def retried_without_a_pause(w: Clean) -> None:
    runs_of(w, "flaky")[1].start_ns = 52 * MS


@corruption(14)
def poison_delivered_once_too_often(w: Clean) -> None:
    run = again(w, "poison", 4_100, pid=33, outcome="")
    run.end_ns = 0


@corruption(14)
def dead_without_a_reason(w: Clean) -> None:
    w.h.audit.dlq[w.ids["poison"]] = DeadJob("", 0, 3)


@corruption(14)
def poison_completed(w: Clean) -> None:
    again(w, "poison", 7_000, outcome=END_OK)
    for part in (w.h.audit.dlq_index, w.h.audit.dlq_meta):
        part.discard(w.ids["poison"])
    del w.h.audit.dlq[w.ids["poison"]]
    w.h.audit.states[w.ids["poison"]] = "completed"


@corruption(15)
def innocent_in_the_dlq(w: Clean) -> None:
    w.runs.remove(runs_of(w, "P3")[0])
    w.dead(w.ids["P3"], "crash: SIGKILL", crashes=3)


@corruption(15)
def dead_after_one_crash(w: Clean) -> None:
    w.runs.remove(runs_of(w, "killed")[1])
    w.dead(w.ids["killed"], "crash: SIGKILL", crashes=1)


@corruption(15)
def charged_for_the_crash_of_a_neighbour(w: Clean) -> None:
    w.h.audit.dlq[w.ids["hopeless"]] = DeadJob("failed", 2, crashes=1)


@corruption(15)
def dead_before_its_retries_were_used(w: Clean) -> None:
    w.runs.remove(runs_of(w, "hopeless")[1])


@corruption(16)
def waiting_at_the_end(w: Clean) -> None:
    del w.h.audit.states[w.ids["P3"]]
    w.h.audit.places = {"queued:normal": [w.ids["P3"]]}


@corruption(17)
def recovered_too_late(w: Clean) -> None:
    runs_of(w, "killed")[1].start_ns = 5_000 * MS


@corruption(20)
def replay_left_it_in_the_dlq(w: Clean) -> None:
    w.runs.remove(runs_of(w, "replayed")[1])
    w.dead(w.ids["replayed"], "failed")


@corruption(20)
def replayed_twice_from_one_death(w: Clean) -> None:
    w.h.events[3].answer = "1"


@corruption(22)
def lease_left_over(w: Clean) -> None:
    w.h.audit.incarnations.add("INC")


@corruption(22)
def empty_hash_left_over(w: Clean) -> None:
    w.h.audit.processing.add("INC")
    w.h.audit.incarnations.add("INC")


@corruption(22)
def depth_not_zero(w: Clean) -> None:
    w.h.audit.depth["normal"] = 3


@corruption(22)
def process_left_over(w: Clean) -> None:
    w.h.audit.residue.append("process 77 is still there")


@pytest.mark.parametrize(("name", "inv", "corrupt"), CORRUPTIONS, ids=[row[0] for row in CORRUPTIONS])
def test_corruption_is_flagged(name: str, inv: int, corrupt: Corrupt) -> None:
    world = clean()
    corrupt(world)
    found = check(world.h, LIMITS)
    assert inv in {violation.inv for violation in found}, [str(violation) for violation in found]


def test_there_are_enough_corruptions() -> None:
    assert len(CORRUPTIONS) >= 30
    assert {inv for _, inv, _ in CORRUPTIONS} == {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 16, 17, 20, 22}


# ---- what must not be flagged


def test_key_is_free_again_after_its_ttl() -> None:
    w = clean()
    second = w.job("second", 120, 5_000, key="k1")
    w.run(second, 120, 1, 7_000, 7_001, END_OK)
    w.done(second)
    w.h.audit.totals["submitted"] += 1
    w.h.audit.totals["completed"] += 1
    w.h.mid_audits = []
    assert [v.inv for v in check(w.h, LIMITS)] == [9]
    with_ttl = Limits(
        lease_ms=2_000, grace_ms=1_000, retry_base_ms=100, settle_window_ms=200, key_ttl_ms=4_000
    )
    assert check(w.h, with_ttl) == []


def test_repeat_of_an_unknown_submit_is_told_created() -> None:
    w = clean()
    keyed = w.ids["keyed"]
    w.subs.append(Submission(122, "T", "ok", "normal", "k1", 30 * MS, "ok", keyed, 31 * MS, {"number": 109}))
    assert check(w.h, LIMITS) == []


def test_unknown_submission_that_still_waits_is_counted_mid_run() -> None:
    w = clean()
    w.h.audit.places["queued:normal"] = ["Z" * 26 + ".0"]  # of submission 112, which had no reply
    w.h.audit.totals = {}
    assert [v.inv for v in check(w.h, LIMITS)] == [16]
    running = Limits(lease_ms=2_000, grace_ms=1_000, settle_window_ms=200, quiescent=False)
    assert check(w.h, running) == []


def test_live_workers_may_keep_their_lease() -> None:
    w = clean()
    w.h.audit.incarnations.add("INC")
    assert check(w.h, LIMITS) != []
    live = Limits(lease_ms=2_000, grace_ms=1_000, settle_window_ms=200, live_incarnations=frozenset({"INC"}))
    assert check(w.h, live) == []


def test_redis_reruns_can_be_forbidden() -> None:
    strict = Limits(lease_ms=2_000, grace_ms=1_000, settle_window_ms=200, redis_reruns=False)
    assert {v.inv for v in check(clean().h, strict)} == {5}


def test_pid_used_again_is_told_apart() -> None:
    """The first life of pid 40 was killed; a later process of that number runs, and loses nothing."""
    w = clean()
    late = w.job("late", 123, 10)
    w.run(late, 123, 40, 7_000, 7_001, END_OK)
    w.done(late)
    again(w, "late", 7_100)
    assert 5 in {v.inv for v in check(w.h, LIMITS)}


# ---- the journals


def test_journals_round_trip(tmp_path: Path) -> None:
    submits, runs, faults = SubmitJournal(tmp_path), ExecJournal(tmp_path), FaultLog(tmp_path)
    submits.invoke(1, "T", "fail:2", "high", "key", delay_ms=5)
    submits.ok(1, "A.0")
    submits.invoke_many(10, 3, "T", result=1)
    submits.ok_many(10, ["B.0", "B.1", "B.2"])
    for n, answer in enumerate((submits.dup, submits.refused, submits.unknown), start=20):
        submits.invoke(n, "T")
        answer(n, "A.0")
    submits.invoke(30, "T")
    submits.event("observe", "A.0", "completed")
    runs.start("A.0", 1, 1, "token")
    runs.end("A.0", END_FAIL)
    runs.start("A.0", 1, 2, "token2")
    faults.record("kill", [7], worker=3)
    got = load(tmp_path)
    told = {sub.n: (sub.outcome, sub.id) for sub in got.submissions}
    assert told == {
        1: ("ok", "A.0"),
        10: ("ok", "B.0"),
        11: ("ok", "B.1"),
        12: ("ok", "B.2"),
        20: ("dup", "A.0"),
        21: ("refused", ""),
        22: ("unknown", "A.0"),
        30: ("pending", ""),
    }
    first = got.submissions[0]
    assert (first.expect, first.lane, first.key, first.opt("delay_ms", 0)) == ("fail:2", "high", "key", 5)
    assert [(run.attempt, run.outcome, run.last, run.pid) for run in got.executions] == [
        (1, END_FAIL, 1, os.getpid()),
        (2, "", 0, os.getpid()),
    ]
    assert [(fault.kind, fault.pids, fault.info) for fault in got.faults] == [("kill", (7,), {"worker": 3})]
    assert [(event.kind, event.id, event.answer) for event in got.events] == [("observe", "A.0", "completed")]
    assert got.torn == 0


def test_torn_line_is_counted_and_skipped(tmp_path: Path) -> None:
    ExecJournal(tmp_path).start("A.0", 1, 1, "token")
    path = next(tmp_path.glob("exec-*.log"))
    path.write_text(path.read_text() + "S\t123\tB.")
    got = load(tmp_path)
    assert (len(got.executions), got.torn) == (1, 1)


def test_journal_survives_sigkill_and_forks_write_their_own_files(tmp_path: Path) -> None:
    script = (
        "import os, sys, signal\n"
        "from tests.chaos.journal import ExecJournal\n"
        "j = ExecJournal(sys.argv[1])\n"
        "j.start('PARENT.0', 1, 1, 't')\n"
        "if os.fork() == 0:\n"
        "    j.start('CHILD.0', 2, 1, 't')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.wait()\n"
        "j.end('PARENT.0', 'ok')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False, timeout=30)
    assert len(list(tmp_path.glob("exec-*.log"))) == 2
    got = load(tmp_path)
    assert {(run.job, run.outcome) for run in got.executions} == {("PARENT.0", END_OK), ("CHILD.0", "")}


def test_a_history_of_a_hundred_thousand_jobs(tmp_path: Path) -> None:
    jobs, frame = 100_000, 1_000
    submits = SubmitJournal(tmp_path)
    exec_lines: list[str] = []
    audit = StoreAudit(totals={"submitted": jobs, "completed": jobs, "dead": 0, "cancelled": 0})
    for first in range(0, jobs, frame):
        ids = [f"{first:0>26}.{i}" for i in range(frame)]
        submits.invoke_many(first, frame, "T")
        submits.ok_many(first, ids)
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for i, job in enumerate(ids):
            exec_lines.append(f"S\t{now + i}\t{job}\t{first + i}\t1\t{first}\t7\nE\t{now + i}\t{job}\tok\n")
            audit.states[job] = "completed"
    (tmp_path / "exec-7-1.log").write_text("".join(exec_lines))
    report = examine(history_of(load(tmp_path), audit))
    assert report.violations == []
    assert (report.jobs, report.finals) == (jobs, {"completed": jobs})
