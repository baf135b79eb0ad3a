"""Owns the verdict on a chaos run: a pure function from journals and store audits to a list of violations.

It knows the promises and nothing of the engine: no import of it, no call to Redis, no clock. Job histories
are independent of each other, so each is replayed by itself and a million jobs take seconds. INV numbers:

 1 no loss              every accepted submission ends in exactly one of completed, dead, cancelled
 2 no invention         every execution and every record belongs to an attempted submission
 3 unknown submits      an unanswered submission is 0 or 1 job
 4 at least once        completed means that the function was seen to end well, with the result that it gave
 5 duplicates caused    every further start has its cause on the fault timeline; one a kill for sync jobs
 6 mutual exclusion     two starts of a job overlap only after a lost lease
 7 fencing              one terminal state, never left again; a lease's token starts a job once
 8 single place         a job is in one place; index and body agree; lease and hash agree
 9 idempotency          one acceptance per key and TTL; duplicates get the first id; no key without its job
10 conservation         accepted = waiting + delayed + leased + completed + dead + cancelled, at every audit
13 delay                never before its time
14 retry                attempts and crash deliveries within limits, with their pauses; dead has a reason
15 innocence            dead only by own failures or own crashes
16 liveness             at the end nothing is waiting any more
17 recovery             a re-run starts within the bound of its cause
20 replay               a replayed job leaves the DLQ once and runs again
22 no residue           no lease, hash, token, key without TTL, or process is left
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.chaos.journal import (
    ACCEPTED,
    DUPLICATE,
    END_FAIL,
    END_OK,
    PENDING,
    REFUSED,
    UNKNOWN,
    Event,
    Execution,
    Fault,
    Journals,
    Submission,
    collector_off,
)

TERMINAL = frozenset({"completed", "dead", "cancelled", "expired", "damaged"})
MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Violation:
    inv: int
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"INV {self.inv} {self.subject}: {self.detail}"


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A dead-letter entry as the audit read it."""

    reason: str
    attempts: int = 0
    crashes: int = 0


@dataclass(slots=True)
class StoreAudit:
    """One consistent reading of all keys at quiescence."""

    places: dict[str, list[str]] = field(default_factory=dict)  # queued:<lane>, sorted:<lane>, delayed…
    states: dict[str, str] = field(default_factory=dict)  # snapshots, job id -> state
    results: dict[str, Any] = field(default_factory=dict)
    dlq: dict[str, DeadJob] = field(default_factory=dict)
    dlq_meta: set[str] = field(default_factory=set)
    dlq_index: set[str] = field(default_factory=set)
    depth: dict[str, int] = field(default_factory=dict)
    depth_counted: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    idem: dict[str, str] = field(default_factory=dict)  # idempotency key (as stored) -> job id
    incarnations: set[str] = field(default_factory=set)
    processing: set[str] = field(default_factory=set)  # incarnations that have an in-flight hash
    mismatches: list[str] = field(default_factory=list)  # index against body, as the reader found them
    residue: list[str] = field(default_factory=list)  # keys and counters that should not be there any more


@dataclass(frozen=True, slots=True)
class MidAudit:
    """Sums read in one script while the run goes on."""

    t_ns: int  # just before the reading
    submitted: int
    waiting: int
    delayed: int
    leased: int
    completed: int
    dead: int
    cancelled: int
    until_ns: int = 0  # just after it

    def accounted(self) -> int:
        return self.waiting + self.delayed + self.leased + self.completed + self.dead + self.cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the run was configured with; zero switches a bound off."""

    lease_ms: int = 15_000
    max_retries: int = 3
    max_crashes: int = 3
    concurrency: int = 1
    grace_ms: int = 30_000
    # How long a finished job may stay unsettled: what dies with a whole host or falls behind a lost lease.
    settle_window_ms: int = 1_000
    # Share of the lease that must pass before a loss is believable: a lease is renewed at every third of it.
    lease_share: float = 0.6
    retry_base_ms: int = 0
    retry_cap_ms: int = 3_600_000
    slack_ms: int = 5
    key_ttl_ms: int = 0
    recovery_ms: Mapping[str, int] = field(default_factory=dict)
    live_incarnations: frozenset[str] = frozenset()
    redis_reruns: bool = True
    quiescent: bool = True


@dataclass(slots=True)
class History:
    submissions: Sequence[Submission] = ()
    executions: Sequence[Execution] = ()
    faults: Sequence[Fault] = ()
    events: Sequence[Event] = ()
    audit: StoreAudit = field(default_factory=StoreAudit)
    mid_audits: Sequence[MidAudit] = ()


@dataclass(slots=True)
class Report:
    violations: list[Violation] = field(default_factory=list)
    finals: Counter[str] = field(default_factory=Counter)
    reruns: Counter[str] = field(default_factory=Counter)
    recovery_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    jobs: int = 0
    starts: int = 0

    def __str__(self) -> str:
        slow = {cause: round(max(times)) for cause, times in self.recovery_ms.items()}
        lines = [
            f"{self.jobs} jobs, {self.starts} starts, finals {dict(self.finals)}, "
            f"re-runs {dict(self.reruns)}, slowest recovery ms {slow}, {len(self.violations)} violations"
        ]
        return "\n".join(lines + [f"  {violation}" for violation in self.violations[:40]])


def check(history: History, limits: Limits | None = None) -> list[Violation]:
    """The violations of a history, empty when every invariant holds."""
    return examine(history, limits).violations


def examine(history: History, limits: Limits | None = None) -> Report:
    """The violations and the figures of a history."""
    with collector_off():
        return _Examination(history, limits or Limits()).run()


def history_of(journals: Journals, audit: StoreAudit, mid_audits: Sequence[MidAudit] = ()) -> History:
    return History(
        journals.submissions, journals.executions, journals.faults, journals.events, audit, mid_audits
    )


@dataclass(slots=True)
class _Death:
    t_ns: int  # just before the signal
    until_ns: int  # surely gone
    cause: str


class _Examination:
    def __init__(self, history: History, limits: Limits) -> None:
        self.h = history
        self.limits = limits
        self.report = Report(starts=len(history.executions))
        self.by_number: dict[int, list[Submission]] = {}
        self.accepted: dict[str, Submission] = {}  # job id -> the submission that created it
        self.runs: dict[str, list[Execution]] = {}
        self.where: dict[str, str] = {}
        self.deaths: dict[int, list[_Death]] = defaultdict(list)
        self.kill_reruns: Counter[tuple[int, int]] = Counter()
        self.events: dict[str, list[Event]] = defaultdict(list)
        self.stops = [f for f in history.faults if f.kind in ("stop", "steward_stop")]
        self.outages = [f for f in history.faults if f.kind.startswith(("redis", "net"))]
        self.terms = [f for f in history.faults if f.kind == "term"]

    def run(self) -> Report:
        self.index_submissions()
        self.index_executions()
        self.index_deaths()
        self.index_store()
        for event in self.h.events:
            self.events[event.id].append(event)
        self.report.jobs = len(self.accepted)
        self.check_final_states()
        self.check_runs()
        self.check_tokens()
        self.check_idempotency()
        self.check_events()
        self.check_store()
        self.check_totals()
        self.check_mid_audits()
        return self.report

    def fail(self, inv: int, subject: str, detail: str) -> None:
        self.report.violations.append(Violation(inv, subject, detail))

    # ---- indexes; each finds the violations that would break the index

    def index_submissions(self) -> None:
        for sub in self.h.submissions:
            self.by_number.setdefault(_number(sub), []).append(sub)
            if sub.outcome == ACCEPTED:
                first = self.accepted.setdefault(sub.id, sub)
                if first is not sub and not (sub.key and sub.key == first.key):
                    self.fail(2, sub.id, f"one id answers submissions {first.n} and {sub.n}")

    def index_executions(self) -> None:
        runs = self.runs
        for run in sorted(self.h.executions, key=lambda run: run.start_ns):
            seen = runs.get(run.job)
            if seen is None:
                runs[run.job] = [run]
                sub = self.accepted.get(run.job)
                if sub is None or _number(sub) != run.n:
                    self.adopt(run, sub)
            else:
                seen.append(run)
                if run.n != seen[0].n:
                    self.fail(2, run.job, f"ran with the payload of {seen[0].n} and of {run.n}")

    def adopt(self, run: Execution, sub: Submission | None) -> None:
        """An execution whose id no producer was told: it must be the one job of an unanswered submission."""
        if sub is not None:
            self.fail(2, run.job, f"accepted for {_number(sub)}, ran with the payload of {run.n}")
            return
        attempts = self.by_number.get(run.n, [])
        unanswered = [s for s in attempts if s.outcome in (UNKNOWN, PENDING)]
        free = [s for s in unanswered if s.id in ("", run.job)]
        told = ", ".join(f"{s.n} {s.outcome} {s.id}" for s in attempts)
        if not attempts:
            self.fail(2, run.job, f"ran, but nobody submitted {run.n}")
        elif any(s.key for s in attempts) and any(s.id != run.job for s in attempts if s not in free):
            self.fail(9, run.job, f"ran, but the submissions of {run.n} were answered: {told}")
        elif unanswered and not free:
            self.fail(3, run.job, f"a second job of the unanswered submission of {run.n}: {told}")
        elif not free:
            self.fail(2, run.job, f"ran, but the submissions of {run.n} were answered: {told}")
        else:
            free[0].id = run.job
            self.accepted[run.job] = free[0]

    def index_deaths(self) -> None:
        for fault in self.h.faults:
            if fault.kind in ("kill", "kill_host"):
                cause = "kill" if fault.kind == "kill" else "host"
                for pid in fault.pids:
                    self.deaths[pid].append(_Death(fault.t_ns, fault.until_ns or fault.t_ns, cause))
        for job, runs in self.runs.items():
            sub = self.accepted.get(job)
            if sub is not None and sub.expect == "poison":
                for run in runs:
                    if not run.outcome:
                        self.deaths[run.pid].append(_Death(run.start_ns, run.start_ns, "poison"))
        for deaths in self.deaths.values():
            deaths.sort(key=lambda death: death.t_ns)

    def index_store(self) -> None:
        where = self.where
        for place, ids in self.h.audit.places.items():
            for job in ids:
                if job in where:
                    self.fail(8, job, f"in {where[job]} and in {place}")
                where[job] = place

    # ---- INV 1, 2, 3, 4, 7, 8, 15, 16: where each job ended

    def check_final_states(self) -> None:
        audit = self.h.audit
        for sub in self.h.submissions:  # an unanswered job that is in the store though it never ran
            stored = sub.id in audit.states or sub.id in self.where or sub.id in audit.dlq
            if stored and sub.outcome in (UNKNOWN, PENDING):
                self.accepted.setdefault(sub.id, sub)
        spare = self.unclaimed_unknowns()
        for job in [*audit.states, *self.where, *audit.dlq]:
            if job not in self.accepted:
                if spare > 0:  # an unknown submission without an id, not run: it can only be counted
                    spare -= 1
                    self.accepted[job] = Submission(-1, "", expect="any", outcome=UNKNOWN, id=job)
                else:
                    self.fail(2, job, "in the store, but nobody submitted it")
        finals = self.report.finals
        states, where, dlq = audit.states, self.where, audit.dlq
        for job, sub in self.accepted.items():
            state = states.get(job, "")
            runs = self.runs.get(job, ())
            plain = state == "completed" and job not in where and job not in dlq
            if plain and sub.expect == "ok" and len(runs) == 1 and runs[0].outcome == END_OK:
                final = state
            else:
                final = self.final_state(job, sub, state)
                self.check_final(job, sub, final, runs)
            finals[final] += 1
            if sub.opts is not None and final == "completed" and "result" in sub.opts:
                self.check_result(job, sub.opts["result"])

    def unclaimed_unknowns(self) -> int:
        return sum(
            1
            for sub in self.h.submissions
            if sub.outcome in (UNKNOWN, PENDING) and (not sub.id or sub.id not in self.accepted)
        )

    def final_state(self, job: str, sub: Submission, state: str) -> str:
        place = self.where.get(job)
        in_dlq = job in self.h.audit.dlq
        if place is not None:
            if state in TERMINAL or in_dlq:
                self.fail(8, job, f"{state or 'dead'} and still in {place}")
            elif self.limits.quiescent:
                self.fail(16, job, f"still in {place} at the end")
            return place.split(":")[0]
        if in_dlq:
            if state not in ("dead", ""):
                self.fail(7, job, f"in the DLQ, and its snapshot says {state}")
            return "dead"
        if state in TERMINAL:
            if state == "dead" and not self.has_event(job, "purge"):
                self.fail(8, job, "dead without an entry in the DLQ")
            return state
        if not sub.opt("track", True) and state == "":
            runs = self.runs.get(job, ())
            if any(run.outcome == END_OK for run in runs):
                return "completed"
        self.fail(1, job, f"lost: snapshot says {state or 'nothing'}, and it is in no place")
        return "lost"

    def check_final(self, job: str, sub: Submission, final: str, runs: Sequence[Execution]) -> None:
        if final == "completed":
            if not any(run.outcome == END_OK for run in runs):
                self.fail(4, job, "completed, but no execution ended well")
            if sub.expect in ("dead", "poison", "cancelled"):
                self.fail(14, job, f"completed, though it was to end as {sub.expect}")
        elif final == "dead":
            self.check_dead(job, sub, runs)
        elif final == "damaged" and sub.expect not in ("damaged", "any"):
            self.fail(1, job, "in quarantine, and nobody damaged it")
        elif final in ("cancelled", "expired"):
            asked = self.has_event(job, "cancel") or sub.opt("expires_ms", 0)
            if not asked:
                self.fail(7, job, "cancelled, but nobody asked for it")
            for event in self.events.get(job, ()):
                late = [run for run in runs if run.start_ns > event.t_ns]
                if event.kind == "cancel" and event.answer == "cancelled" and late:
                    self.fail(7, job, "ran after cancel had answered: cancelled")

    def check_dead(self, job: str, sub: Submission, runs: Sequence[Execution]) -> None:
        entry = self.h.audit.dlq.get(job)
        if entry is not None and not entry.reason:
            self.fail(14, job, "dead without a reason")
        allowed = sub.opt("max_retries", self.limits.max_retries)
        failures = max((run.attempt for run in runs if run.outcome == END_FAIL), default=0)
        crashes = sum(1 for run in runs if self.own_crash(run))
        if entry is not None and entry.crashes > crashes:
            self.fail(15, job, f"charged {entry.crashes} crashes, was running in {crashes}")
        if sub.opt("dead_reason", "") and entry is not None and sub.opt("dead_reason", "") in entry.reason:
            return
        guilty = failures > allowed or crashes >= self.limits.max_crashes
        if not guilty and sub.expect != "dead":
            self.fail(15, job, f"dead with {failures} own failures and {crashes} own crashes ({entry})")

    def check_result(self, job: str, expected: Any) -> None:
        results = self.h.audit.results
        if job not in results:
            self.fail(1, job, "completed, but its result is gone")
        elif results[job] != expected:
            self.fail(4, job, f"result {results[job]!r}, expected {expected!r}")

    def has_event(self, job: str, kind: str) -> bool:
        return any(event.kind == kind for event in self.events.get(job, ()))

    # ---- INV 5, 6, 13, 14, 17: each start after the first

    def check_runs(self) -> None:
        for job, runs in self.runs.items():
            sub = self.accepted.get(job)
            if sub is None:
                continue
            if sub.opts is not None:
                due = sub.invoke_ns + sub.opts.get("delay_ms", 0) * MS
                if runs[0].start_ns < due - self.limits.slack_ms * MS:
                    self.fail(13, job, f"started {(due - runs[0].start_ns) // MS} ms before its time")
            if len(runs) == 1 and runs[0].outcome == END_OK and runs[0].attempt == 1:
                continue
            self.check_job(job, sub, runs)
        for (pid, _), count in self.kill_reruns.items():
            if count > self.limits.concurrency:
                self.fail(5, f"pid {pid}", f"its death made {count} jobs run again")

    def check_job(self, job: str, sub: Submission, runs: Sequence[Execution]) -> None:
        replays = sum(1 for e in self.events.get(job, ()) if e.kind == "replay" and e.answer != "0")
        if runs[0].attempt != 1:
            self.fail(14, job, f"began with attempt {runs[0].attempt}")
        for prev, run in pairwise(runs):
            cause = self.cause_of(job, sub, prev, run)
            self.report.reruns[cause or "none"] += 1
            raised = 0 if cause == "replay" else run.attempt - prev.attempt
            if raised != (cause in ("retry", "limit")) and cause is not None and cause != "replay":
                self.fail(14, job, f"attempt {run.attempt} after {prev.attempt}, cause {cause}")
        allowed = sub.opt("max_retries", self.limits.max_retries)
        last = max(run.attempt for run in runs)
        if last > allowed + 1:
            self.fail(14, job, f"attempt {last}, allowed {allowed + 1}")
        crashes = sum(1 for run in runs if not run.outcome and self.own_crash(run))
        if crashes > self.limits.max_crashes * (1 + replays):
            self.fail(14, job, f"delivered into {crashes} crashes")
        wanted = int(sub.expect.partition(":")[2]) if sub.expect.startswith("fail:") else allowed + 1
        if wanted <= allowed and last > wanted + 1:
            self.fail(14, job, f"attempt {last}, was to fail {wanted} times")

    def cause_of(self, job: str, sub: Submission, prev: Execution, run: Execution) -> str | None:
        """Why `run` is legal after `prev`; None, and a violation, if nothing on the timeline explains it."""
        for event in self.events.get(job, ()):
            # Stamped before the call: the first start can come before the answer does.
            after = event.t_ns <= run.start_ns and prev.start_ns < event.t_ns
            if after and event.kind == "replay" and event.answer != "0":
                return "replay"
        failed = prev.outcome == END_FAIL
        if failed and run.attempt > prev.attempt:
            pause = run.start_ns - prev.end_ns
            if pause < self.pause_ns(prev.attempt - 1):
                self.fail(14, job, f"ran again {pause // MS} ms after failure {prev.attempt}, too early")
            return "retry"
        if not prev.outcome and sub.expect == "limit":
            return "limit"
        went_on = self.limits.concurrency == 1 and prev.last and not prev.outcome
        if went_on:  # a sync worker that starts the next job has ended this one, journalled or not
            self.fail(5, job, f"pid {prev.pid} never ended it, yet went on to its next job")
            return None
        death = self.death_of(prev)
        if death is not None and death.t_ns > run.start_ns:
            death = None
        cause = self.lost_by_death(prev, run, death) if death is not None else None
        cause = cause or self.lost_by_fault(prev, run)
        if cause is None:
            what = "failed, not counted" if failed else prev.outcome or "never ended"
            self.fail(5, job, f"ran again in pid {run.pid} without a cause (in pid {prev.pid}: {what})")
        ended_before = death is not None or 0 < prev.end_ns <= run.start_ns
        if not ended_before and cause not in ("lease", "redis", "net", "drain"):
            self.fail(6, job, f"runs in pid {prev.pid} and pid {run.pid} at the same time")
        return cause

    def own_crash(self, run: Execution) -> bool:
        """Did its process die of a kill or of the job itself while it ran, or before it could be recorded?"""
        death = self.death_of(run)
        just_left = not run.outcome or run.last < self.limits.concurrency
        return death is not None and death.cause != "host" and just_left

    def death_of(self, run: Execution) -> _Death | None:
        for death in self.deaths.get(run.pid, ()):
            if death.until_ns >= run.start_ns:
                return death
        return None

    def lost_by_death(self, prev: Execution, run: Execution, death: _Death) -> str | None:
        """A dead worker re-runs what it was in or had just left; a dead host also what was not settled."""
        window = self.limits.settle_window_ms * MS
        if death.cause == "host":
            if prev.end_ns and prev.end_ns < death.t_ns - window:
                return None
            return self.recovered("host", death.t_ns, run)
        if prev.outcome and prev.last >= self.limits.concurrency:
            return None
        self.kill_reruns[(prev.pid, death.t_ns)] += 1
        return self.recovered(death.cause, death.t_ns, run)

    def lost_by_fault(self, prev: Execution, run: Execution) -> str | None:
        limits = self.limits
        window = limits.settle_window_ms * MS
        for fault in self.stops:
            until = fault.until_ns or run.start_ns
            long_enough = until - fault.t_ns >= limits.lease_ms * limits.lease_share * MS
            hit = fault.kind == "steward_stop" or prev.pid in fault.pids
            if hit and long_enough and _touches(prev, run, fault.t_ns, until, window):
                return self.recovered("lease", fault.t_ns, run)
        for fault in self.outages:
            cause = "redis" if fault.kind.startswith("redis") else "net"
            hit = not fault.pids or prev.pid in fault.pids
            if cause == "redis" and not limits.redis_reruns:
                continue
            if hit and _touches(prev, run, fault.t_ns, fault.until_ns or fault.t_ns, window):
                return self.recovered(cause, fault.until_ns or fault.t_ns, run)
        for fault in self.terms:
            end = fault.t_ns + limits.grace_ms * MS
            undone = prev.outcome not in (END_OK, END_FAIL)
            cut_short = undone and prev.start_ns <= end and fault.t_ns <= run.start_ns
            if cut_short and prev.pid in fault.pids:
                return self.recovered("drain", fault.t_ns, run)
        return None

    def recovered(self, cause: str, since_ns: int, run: Execution) -> str:
        took = (run.start_ns - since_ns) / MS
        self.report.recovery_ms[cause].append(took)
        bound = self.limits.recovery_ms.get(cause, 0)
        if bound and took > bound:
            self.fail(17, run.job, f"ran again {took:.0f} ms after the {cause}, bound {bound} ms")
        return cause

    def pause_ns(self, retries_before: int) -> int:
        """The shortest pause that the backoff allows: half of it is fixed."""
        if not self.limits.retry_base_ms:
            return 0
        full = min(self.limits.retry_cap_ms, self.limits.retry_base_ms << max(0, retries_before))
        return (full // 2 - self.limits.slack_ms) * MS

    def check_tokens(self) -> None:
        for job, runs in self.runs.items():
            if len(runs) == 1:
                continue
            seen = Counter(run.token for run in runs if run.token)
            for token, count in seen.items():
                if count > 1:
                    self.fail(7, job, f"lease {token} started it {count} times")

    # ---- INV 9

    def check_idempotency(self) -> None:
        by_key: dict[str, list[Submission]] = defaultdict(list)
        for sub in self.h.submissions:
            if sub.key:
                by_key[sub.key].append(sub)
        for key, subs in by_key.items():
            self.check_key(key, sorted(subs, key=lambda sub: sub.reply_ns or sub.invoke_ns))
        for key, job in self.h.audit.idem.items():
            if job not in self.accepted:
                self.fail(9, f"key {key}", f"held by {job}, which does not exist")

    def check_key(self, key: str, subs: Sequence[Submission]) -> None:
        ttl = self.limits.key_ttl_ms
        holders: list[Submission] = []
        for sub in subs:
            made = sub.outcome == ACCEPTED or (sub.outcome in (UNKNOWN, PENDING) and sub.id in self.accepted)
            if not made or any(holder.id == sub.id for holder in holders):
                continue
            last = holders[-1] if holders else None
            if last is not None and not (ttl and sub.reply_ns >= last.invoke_ns + ttl * MS):
                self.fail(9, f"key {key}", f"created {last.id} and {sub.id} within its TTL")
            holders.append(sub)
        known = {holder.id for holder in holders}
        for sub in subs:
            if sub.outcome != DUPLICATE:
                continue
            if sub.id not in known:
                self.fail(
                    9, f"key {key}", f"submission {sub.n} was told {sub.id}, which is not the key's job"
                )
            if sub.id not in self.accepted:
                self.fail(1, sub.id, f"duplicate of submission {sub.n}, but the job does not exist")

    # ---- INV 7 and 20: what operators did and saw

    def check_events(self) -> None:
        for job, events in self.events.items():
            replays = [e for e in events if e.kind == "replay" and e.answer != "0"]
            runs = self.runs.get(job, ())
            self.check_replays(job, replays, runs)
            for event in events:
                replayed = any(replay.t_ns >= event.t_ns for replay in replays)
                if event.kind == "observe" and event.answer in TERMINAL and not replayed:
                    self.check_still(job, event, runs)

    def check_replays(self, job: str, replays: Sequence[Event], runs: Sequence[Execution]) -> None:
        for at, event in enumerate(replays):
            until = replays[at + 1].t_ns if at + 1 < len(replays) else 0
            ran = any(event.t_ns <= run.start_ns and (not until or run.start_ns < until) for run in runs)
            if until and not ran:
                self.fail(20, job, "replayed twice from one death")
            elif not ran and job in self.h.audit.dlq:
                self.fail(20, job, "replayed, never ran, and is in the DLQ still")

    def check_still(self, job: str, event: Event, runs: Sequence[Execution]) -> None:
        if any(run.start_ns > event.t_ns for run in runs):
            self.fail(7, job, f"started after it had been seen {event.answer}")
        state = "dead" if job in self.h.audit.dlq else self.h.audit.states.get(job, "")
        if state and state != event.answer:
            self.fail(7, job, f"seen {event.answer}, ends as {state}")

    # ---- INV 8, 10, 22: the store as a whole

    def check_store(self) -> None:
        audit = self.h.audit
        bodies = set(audit.dlq)
        for name, index in (("dlq_meta", audit.dlq_meta), ("dlq_index", audit.dlq_index)):
            for job in bodies ^ index:
                self.fail(8, job, f"in only one of dlq and {name}")
        for incarnation in audit.processing - audit.incarnations:
            self.fail(8, incarnation, "has leases in a hash, and no lease end: nobody will ever reap it")
        for text in audit.mismatches:
            self.fail(8, "store", text)
        if not self.limits.quiescent:
            return
        for name in audit.depth.keys() | audit.depth_counted.keys():
            said, counted = audit.depth.get(name, 0), audit.depth_counted.get(name, 0)
            if said != counted:
                self.fail(22, f"depth {name}", f"says {said}, counted {counted}")
        for incarnation in audit.processing:
            self.fail(22, incarnation, "its in-flight hash is left over")
        for incarnation in audit.incarnations - self.limits.live_incarnations:
            self.fail(22, incarnation, "its lease is left over")
        for text in audit.residue:
            self.fail(22, "residue", text)

    def check_totals(self) -> None:
        totals = self.h.audit.totals
        if not totals or not self.limits.quiescent:
            return
        finals = self.report.finals
        replayed = sum(1 for e in self.h.events if e.kind == "replay" and e.answer != "0")
        expected = {
            "submitted": len(self.accepted),
            "completed": finals["completed"],
            "dead": finals["dead"] + replayed,
        }
        if "expired" in totals:
            expected["expired"] = finals["expired"]
        expected["cancelled"] = finals["cancelled"]
        answers = Counter(sub.outcome for sub in self.h.submissions)
        if not answers[UNKNOWN] and not answers[PENDING]:  # a lost answer may have been a duplicate
            expected["duplicate"] = answers[DUPLICATE]
        for name, value in expected.items():
            if name in totals and totals[name] != value:
                self.fail(10, f"total {name}", f"says {totals[name]}, the journals say {value}")

    def check_mid_audits(self) -> None:
        if not self.h.mid_audits:
            return
        told = sorted(s.reply_ns for s in self.h.submissions if s.outcome == ACCEPTED)
        asked = sorted(s.invoke_ns for s in self.h.submissions if s.outcome not in (REFUSED, DUPLICATE))
        for audit in self.h.mid_audits:
            at = f"audit at {audit.t_ns}"
            if audit.submitted != audit.accounted():
                self.fail(10, at, f"{audit.submitted} submitted, {audit.accounted()} accounted for: {audit}")
            known, possible = _below(told, audit.t_ns), _below(asked, audit.until_ns or audit.t_ns)
            if not known <= audit.submitted <= possible:
                self.fail(10, at, f"{audit.submitted} submitted, {known} answered, {possible} asked for")


def _number(sub: Submission) -> int:
    """The number in the payload: repeats of one keyed submission carry that of the first."""
    return sub.n if sub.opts is None else sub.opts.get("number", sub.n)


def _touches(prev: Execution, run: Execution, start_ns: int, until_ns: int, window_ns: int) -> bool:
    """Was `prev` running or not surely settled during the fault, and did `run` start after it began?"""
    unsettled = not prev.end_ns or prev.end_ns >= start_ns - window_ns
    return prev.start_ns <= until_ns + window_ns and unsettled and run.start_ns >= start_ns


def _below(stamps: Sequence[int], t_ns: int) -> int:
    low, high = 0, len(stamps)
    while low < high:
        middle = (low + high) // 2
        if stamps[middle] < t_ns:
            low = middle + 1
        else:
            high = middle
    return low
