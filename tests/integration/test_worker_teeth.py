"""Each protection taken away in turn: what it protects from must then be seen, or its test proves nothing.

A scenario answers with what went wrong; with the protection that is nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chaos.proxy import HANG, Command, Match, Proxy, runs
from tests.integration.test_lost_replies import KINDS, context, load, settle_kinds, taken_over_from, tasks
from tests.integration.test_worker_redis import ended_lease, reap
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker import Rig
from tqe import codec
from tqe.board import layout
from tqe.job import IDS
from tqe.steward.delayed import Delayed
from tqe.steward.recovery import Recovery
from tqe.store import call as call_module
from tqe.store import settling, working
from tqe.store.call import SyncDoor
from tqe.store.scripts import SCRIPTS
from tqe.worker import link as link_module
from tqe.worker.fetcher import Fetcher
from tqe.worker.link import Link
from tqe.worker.loop import Worker
from tqe.worker.runner import JobRunner

Patch = pytest.MonkeyPatch
ARMS = ["protected", "taken_away"]
taken_away = pytest.mark.parametrize("protected", [True, False], ids=ARMS)
# What takes seconds has its protected arm in test_worker_flow.py or test_worker_redis.py.
slowly_taken_away = pytest.mark.parametrize(
    "protected", [pytest.param(True, marks=pytest.mark.campaign), False], ids=ARMS
)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """Stands before the shared server."""
    path = redis_server.folder / "proxy.sock"
    path.unlink(missing_ok=True)
    with contextlib.closing(redis_server.client()) as client:
        for script in SCRIPTS.values():
            client.script_load(script.text)
    with Proxy(redis_server.socket, path) as made:
        yield made
    path.unlink(missing_ok=True)
    assert made.errors == []


def judge(wrong: list[str], protected: bool) -> None:
    if protected:
        assert wrong == []
    else:
        assert wrong != [], "nothing went wrong without it"


def change_script(patch: Patch, name: str, old: str, new: str) -> None:
    """Run this script with other words in one place."""
    text = SCRIPTS[name].text
    assert text.count(old) == 1, f"{name} has {text.count(old)} places that say {old!r}"
    text = text.replace(old, new)
    changed = dataclasses.replace(SCRIPTS[name], text=text, sha=hashlib.sha1(text.encode()).hexdigest())
    patch.setattr(call_module, "SCRIPTS", {**SCRIPTS, name: changed})


def ended(rig: Rig) -> int:
    stats = rig.stats()
    return sum(stats.get(name, 0) for name in ("completed", "dead", "cancelled", "expired"))


def ran_too_often(rig: Rig, times: int = 1) -> list[str]:
    return [f"job {n} ran {ran} times" for n, ran in rig.journal.count("began").items() if ran > times]


# ------------------------------------------------------------------ fences in Redis


@taken_away
@pytest.mark.parametrize("kind", ["done", "retry"])
def test_a_settle_changes_only_what_is_held(
    rig: Rig, proxy: Proxy, monkeypatch: Patch, kind: str, protected: bool
) -> None:
    """Without `HDEL == 1` a settle that comes late counts again, and schedules a second copy."""
    if not protected:
        if kind == "done":
            change_script(
                monkeypatch, "settle", "elseif call('HDEL', processing, lease) == 1 then", "elseif true then"
            )
        else:
            change_script(
                monkeypatch, "settle", "if call('HDEL', processing, lease) ~= 1 then", "if false then"
            )
    tasks(rig)
    load(rig, kind)
    rule = proxy.late(says("C" if kind == "done" else "t"))
    rig.steward()
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(10)
    taken_over_from(worker, rule)
    rig.wait_ended()
    rule.release()
    assert rule.applied.wait(5)
    wait_until(lambda: ended(rig) >= len(rig.ids), 10)
    assert worker.drain() == 0
    judge(rig.books().problems(), protected)


def says(kind: str) -> Match:
    """Calls of settle by what they say, since a changed script has another name."""

    def match(command: Command) -> bool:
        with contextlib.suppress(IndexError, ValueError):
            return command.name in ("EVALSHA", "EVAL") and kind in settle_kinds(command)
        return False

    return match


@slowly_taken_away
def test_a_takeover_makes_a_name_that_nobody_has_used(
    rig: Rig, proxy: Proxy, monkeypatch: Patch, protected: bool
) -> None:
    """Under its old name a late fetch leases frames to a worker that does not know of them. (Both times the
    audit, which would find them in the end, is off.)"""
    monkeypatch.setattr(Fetcher, "_audit", lambda self, hlen: None)
    if not protected:
        name = IDS.frame_id()
        takeover = working.takeover
        monkeypatch.setattr(link_module, "IDS", _Always(name))
        monkeypatch.setattr(
            link_module.working,
            "takeover",
            lambda keys, old, new, lease_ms, guard="": takeover(keys, "", new, lease_ms, guard),
        )
    tasks(rig)
    rule = proxy.late(runs(SCRIPTS["fetch"].sha), nth=2)
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(5)
    wait_until(lambda: worker.counter("takeovers") == 2, 5)
    wait_until(lambda: worker.view.get(layout.C_PHASE) == layout.PHASE_IDLE, 5)
    frames = [planted(n) for n in range(20)]
    rig.redis.rpush(rig.keys.queue("normal"), *frames)  # no tokens: the late fetch is the first to see them
    rule.release()
    assert rule.applied.wait(5)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: len(rig.journal.notes("began")) == 20, 1.5)
    left = 20 - len(rig.journal.notes("began"))
    judge([f"{left} jobs are leased and forgotten"] if left else [], protected)


def planted(n: int) -> bytes:
    made: bytes = codec.pack(
        [(b"QUICK", b'{"n":%d}' % n, b"", False)], frame_id=IDS.frame_id(), lane="normal", tracked=False
    )
    return made


class _Always:
    def __init__(self, name: bytes) -> None:
        self._name = name

    def frame_id(self) -> bytes:
        return self._name


# ------------------------------------------------------------------ what a worker knows


@slowly_taken_away
def test_a_worker_audits_what_redis_holds_for_it(rig: Rig, monkeypatch: Patch, protected: bool) -> None:
    if not protected:
        monkeypatch.setattr(Fetcher, "_audit", lambda self, hlen: None)
    tasks(rig)
    worker = rig.worker()
    frame = planted(1)
    rig.redis.hset(rig.keys.processing(worker.incarnation), frame[4:45], frame)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: rig.journal.notes("began"), 3)
    judge([] if rig.journal.notes("began") else ["a lease was never run"], protected)


@slowly_taken_away
def test_no_job_starts_after_the_lease_has_ended(
    rig_of: Callable[..., Rig], monkeypatch: Patch, protected: bool
) -> None:
    """A job outlasts the lease, others get the rest: the worker must not begin what is theirs now."""
    if not protected:
        monkeypatch.setattr(Link, "seen_until_ns", lambda self: 1 << 62)
    rig = rig_of(lease_ms=1_000, quantum_us=6_000_000)  # one slice: no reply is read between the jobs

    @rig.app.task("JOB")
    def job(n: int, s: float) -> None:
        rig.journal("began", n)
        time.sleep(s)

    rig.redis.hset(rig.keys.means, "JOB", 50)  # µs: a worker keeps the whole frame, and times each job
    slow = rig.worker()
    first = slow.incarnation
    rig.frame("JOB", [{"n": 1, "s": 2.5}, *({"n": n, "s": 0} for n in range(2, 12))])
    wait_until(lambda: rig.journal.notes("began"), 5)
    wait_until(lambda: ended_lease(rig, first), 5)
    assert reap(rig, first) == 1
    rig.worker()
    wait_until(lambda: len(rig.journal.count("began")) == 11, 5)
    wait_until(lambda: slow.incarnation != first or not slow.view.get(layout.C_IN_USER), 5)
    rig.wait_ended()
    for worker in rig.workers:
        assert worker.drain() == 0
    judge([text for text in ran_too_often(rig) if not text.startswith("job 1 ")], protected)


@taken_away
def test_a_resync_meets_its_leases_by_containment(
    rig: Rig, proxy: Proxy, monkeypatch: Patch, protected: bool
) -> None:
    """A settle that was applied and never answered has renamed what is left: that must not run again."""
    if not protected:
        monkeypatch.setattr(Worker, "_owner", _exact_owner)
    tasks(rig)
    load(rig, "kept")
    rule = proxy.drop_reply(KINDS["kept"])
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(10)
    rig.wait_ended()
    assert worker.drain() == 0
    judge([*ran_too_often(rig), *rig.books().problems()], protected)


def _exact_owner(self: Any, name: bytes) -> Any:
    return next((lease for lease in self._hold if lease.name == name), None)


@taken_away
def test_a_signal_interrupts_only_the_step_that_it_names(
    rig: Rig, monkeypatch: Patch, protected: bool
) -> None:
    if not protected:
        interrupt = JobRunner.interrupt

        def rash(self: Any) -> None:
            self._view.set(layout.C_CONDEMN_STEP, self._view.get(layout.C_IN_USER))
            interrupt(self)

        monkeypatch.setattr(JobRunner, "interrupt", rash)
    tasks(rig)
    worker = rig.worker()
    rig.frame("LONG", [{"n": n} for n in range(30)], max_retries=0)
    for _ in range(10):
        step = worker.view.get(layout.C_STEP)
        wait_until(lambda step=step: worker.view.get(layout.C_STEP) > step or ended(rig) == 30, 5)
        worker.condemn(step=step)
    rig.wait_ended()
    dead = rig.stats().get("dead", 0)
    judge([f"{dead} jobs died of another's limit"] if dead else [], protected)


# ------------------------------------------------------------------ what the board says


def dies_before_it_knows(rig: Rig, proxy: Proxy, kind: str) -> None:
    """A worker whose settle was applied and not answered, and who then finished what it held, is killed."""
    tasks(rig)
    load(rig, kind)
    rule = proxy.drop_reply(KINDS[kind], then=HANG)
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(10)
    wait_until(lambda: not worker.view.get(layout.C_IN_USER) and not worker.view.get(layout.C_ASYNC), 5)
    worker.kill()


@taken_away
def test_recovery_meets_the_board_by_containment(
    rig: Rig, proxy: Proxy, monkeypatch: Patch, protected: bool
) -> None:
    """The board names the lease as fetched, Redis what is left of it after a cut."""
    if not protected:
        monkeypatch.setattr(settling, "find_row", _exact_row)
    dies_before_it_knows(rig, proxy, "kept")
    rig.workers[0].bury()
    Recovery(context(rig)).run_once()
    second = rig.worker()
    rig.wait_ended()
    assert second.drain() == 0
    judge([*ran_too_often(rig), *rig.books().problems()], protected)


def _exact_row(rows: Any, frame_id: bytes, base: int, n: int, run: int) -> Any:
    wanted = (frame_id, base, n, run)
    return next((row for row in rows if (row.frame_id, row.base, row.n, row.run) == wanted), None)


@taken_away
def test_each_attempt_has_a_lease_of_its_own(
    rig: Rig, proxy: Proxy, monkeypatch: Patch, protected: bool
) -> None:
    """The board still tells of an attempt that failed, Redis holds the next one: it must not be charged."""
    if not protected:
        single = codec.single
        monkeypatch.setattr(
            settling.codec,
            "single",
            lambda frame, index, **fields: single(frame, index, **{**fields, "run": codec.peek(frame).run}),
        )
    dies_before_it_knows(rig, proxy, "retry")
    (worker,) = rig.workers
    again = Counter(rig.stats())["retried"]
    assert again
    wait_until(lambda: Delayed(context(rig)).run_once() and not rig.redis.zcard(rig.keys.delayed), 5)
    # The fetch that stood behind that settle in the same connection.
    lanes = [working.LaneRule(lane) for lane in rig.settings.lanes]
    fetch = working.Fetcher(rig.keys, worker.incarnation, lanes, rig.settings.lease_ms)
    SyncDoor(rig.redis).run(fetch.call(jobs_max=100, bytes_max=1 << 20, frames_max=100))
    worker.bury()
    Recovery(context(rig)).run_once()
    charged = rig.stats()["retried"] - again
    judge([f"{charged} attempts were charged that nobody ran"] if charged else [], protected)
