"""Runs jobs: plain ones on the compiled path, the rest (options, cancels, zstd, unknown types) one by one."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, Protocol

import msgspec

from tqe import clock, codec, current
from tqe.board import layout
from tqe.board.board import SlotView
from tqe.codec import hot, payload
from tqe.errors import DamagedFrame, JobCancelled, PayloadTooLarge, SoftTimeLimit
from tqe.registry import Registry, Task
from tqe.settings import Settings
from tqe.worker.admission import PIECES_MAX, even_pieces, laid_out
from tqe.worker.beside import Beside, Job, Limits
from tqe.worker.capture import PICKED, Capture, Run
from tqe.worker.failures import Failures, Outcome, RetryRule, rule_of
from tqe.worker.fields import Marks
from tqe.worker.hold import Hold
from tqe.worker.peers import Peers
from tqe.worker.reporting import FailedAttempt, Hook, Reporter
from tqe.worker.shares import Shares

log = logging.getLogger("tqe.worker")

_ENCODER: Final = msgspec.json.Encoder()
_NUMBER_MAX: Final = 10**15
BLOCKED_QUANTA: Final = 4  # so long may a job wait here for a slot or the helper; then it goes back
REST_NS: Final = 250_000_000  # after that, nothing is fetched for so long, or until something has ended


_Number = Annotated[int, msgspec.Meta(ge=0, le=_NUMBER_MAX)]


class _Options(msgspec.Struct, frozen=True):
    """What may ride with a job or its frame."""

    timeout_ms: _Number | None = None
    max_retries: _Number | None = None
    expires_ms: _Number = 0
    trace: Any = None  # whoever sent it: a job must not fail for it


class RunSpan(Protocol):
    """One run as a tracer sees it. The job runs in (a copy of) `context`."""

    context: contextvars.Context

    def failed(self, error: BaseException, reason: str) -> None: ...
    def end(self) -> None: ...


# Makes the span of a run: the job, the trace that it carries, how long it waited in s.
Tracing = Callable[[current.CurrentJob, Mapping[str, str], float], RunSpan]


class NoLoop:
    """Inside of it the thread looks as if no event loop ran there, so that a synchronous job may run one of
    its own: `asyncio.run` refuses inside of another."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task(self._loop)
        if self._task is not None:
            asyncio.tasks._leave_task(self._loop, self._task)
        asyncio.events._set_running_loop(None)

    def __exit__(self, *_: object) -> None:
        asyncio.events._set_running_loop(self._loop)
        if self._task is not None:
            asyncio.tasks._enter_task(self._loop, self._task)


class JobRunner:
    """One worker's runner. `changed()` is called whenever something ended outside of `run_slice`."""

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        slot: hot.Slot,
        view: SlotView,
        hold: Hold,
        *,
        changed: Callable[[], None],
        on_error: Sequence[Hook] = (),
        tracing: Tracing | None = None,
        peers: Peers | None = None,
        shares: Shares | None = None,
        marks: Marks | None = None,
    ) -> None:
        self._settings = settings
        self._shares = shares
        self._peers = peers
        self._handed_ns = 0  # when a synchronous job was last left to another worker
        self._tracing = tracing
        self._spans: dict[tuple[hot.Lease, int], RunSpan] = {}
        self._slot = slot
        self._view = view
        self._hold = hold
        self.tasks: dict[bytes, Task[..., Any]] = {task.key: task for task in registry}
        self._limits = {task.key: self._task_limits(task) for task in registry}
        self.entries = {task.key: self._entry(number, task) for number, task in enumerate(registry)}
        self.native = hot.Runner(
            slot,
            self.entries,
            on_failure=self._failed,
            on_result=self._odd_result,
            encode=_ENCODER.encode,
            result_max_bytes=settings.result_max_bytes,
        )
        self.failures = Failures(
            error_max_bytes=settings.error_max_bytes,
            grace_ms=settings.unknown_type_grace_s * 1000,
            now_ms=self.native.now_ms,
            known=tuple(task.name for task in registry),
        )
        self.capture = Capture(self.tasks, on=settings.traces_max > 0, marks=marks)
        self._own: Limits | None = None  # limits of the job that runs inline, where they are not its task's
        self.beside = Beside(
            self.native,
            view,
            slots=settings.concurrency,
            failed=self._failed_beside,
            changed=changed,
            ended=hold.ended,
            killed=self._killed,
        )
        self._reporter = Reporter(on_error)
        self._late: list[Callable[[], None]] = []  # outcomes that found no room
        self.full = False  # the outcome half has no room: settle before anything else runs
        self._no_loop = NoLoop()
        self._blocked_ns = 0  # since when a job has been waiting for a slot or the helper
        self._rest_until_ns = 0
        self._ended_at_rest = 0
        current.set_look_up(self._current)

    # -- what the loop calls

    @property
    def active(self) -> set[Any]:
        """Jobs that run beside others."""
        return self.native.active

    @property
    def free_slots(self) -> int:
        return self.beside.free_slots

    @property
    def beside_sync(self) -> bool:
        """Whether the loop goes on while a synchronous job runs."""
        return bool(self.active) or self.native.apart

    @property
    def jobs_ended(self) -> int:
        """Jobs that have ended here, however."""
        return self.native.ended + self.beside.helped_jobs

    @property
    def resting(self) -> bool:
        """What was fetched last could not start and went back: fetching it again would only carry it
        about."""
        if self._rest_until_ns and (
            self.jobs_ended != self._ended_at_rest or clock.boottime_ns() >= self._rest_until_ns
        ):
            self._rest_until_ns = 0
        return self._rest_until_ns != 0

    def run_slice(self, slice_ns: int) -> int:
        """Run ready jobs for about so long; returns a hot.RUN_* code: why it stopped."""
        self.native.beside_until_ns = 0
        with self._no_loop:
            return self._run_slice(slice_ns)

    def _run_slice(self, slice_ns: int) -> int:
        now_ns = clock.boottime_ns()
        # A suspect runs alone, and on the main thread.
        self.native.apart = self._view.get(layout.C_APART_UNTIL) > now_ns and not self._view.get(
            layout.C_SUSPECT
        )
        end = now_ns + slice_ns
        hold = self._hold
        while True:
            spot = hold.spot()
            if spot is None:
                self._blocked_ns = 0
                return hot.RUN_ENDED
            begun = clock.boottime_ns()
            if begun >= end:
                return hot.RUN_TIME
            rank = spot.leases[spot.at].rank
            code, at, jobs = self.native.run(spot.leases, spot.at, end - begun)
            if code == hot.RUN_SPECIAL:
                lease = spot.leases[at]
                code = self._special(lease)
                if lease.next >= lease.stop:
                    at += 1
            if at > spot.at or jobs:
                self._blocked_ns = 0
            if at > spot.at:
                hold.started(spot, at)
            if self._shares is not None:
                self._shares.charge(rank, clock.boottime_ns() - begun)
                hold.order = self._shares.order
            if code == hot.RUN_BLOCKED:
                self._blocked()
            if code != hot.RUN_ENDED:
                return code

    def charge_beside(self) -> None:
        """Count the time of jobs beside others, where lanes have weights: a coroutine takes one slot of the
        worker's, the helper thread all of it."""
        if self._shares is not None:
            slot = 1 / self._settings.concurrency
            parts = [
                (job.lease.rank, slot if isinstance(job, hot.AsyncJob) else 1.0) for job in self.native.active
            ]
            self._shares.charge_beside(parts, clock.boottime_ns())
            self._hold.order = self._shares.order

    def _blocked(self) -> None:
        """The next job cannot start here: no slot, or the helper is busy. It may wait a moment, then others
        can have it."""
        now_ns = clock.boottime_ns()
        if not self._blocked_ns:
            self._blocked_ns = now_ns
        elif now_ns - self._blocked_ns > BLOCKED_QUANTA * self._settings.quantum_us * 1000:
            self._blocked_ns = 0
            self._rest_until_ns = now_ns + REST_NS
            self._ended_at_rest = self.jobs_ended
            self._hold.give_back_all()

    def hold_outcomes(self) -> None:
        """From now on outcomes of jobs beside others wait: the halves of the outcome area are being sorted
        out.

        Meanwhile the board says that something runs beside others even if nothing does: who has ended looks
        as if it ran, and would be charged for a death of which it is innocent.
        """
        if self.native.late is None:
            self.native.late = []
            self.native.active.add(self)
            self._view.set(layout.C_ASYNC, len(self.native.active))

    def release_outcomes(self) -> None:
        """Write the outcomes that have waited."""
        beside, self.native.late = self.native.late, None
        late, self._late = self._late, []
        for write in late:
            write()
        for job, result, error, in_arguments in beside or ():
            self.beside.conclude(job, result, error, in_arguments)
        if beside is not None:
            self.native.active.discard(self)
            self._view.set(layout.C_ASYNC, len(self.native.active))
        if late or beside:
            self._tell_again()

    def _tell_again(self) -> None:
        """Leases of outcomes that have waited may have been settled meanwhile, these jobs left out: nothing
        else would tell of them before the last of their neighbours has ended."""
        now_ns = clock.boottime_ns()
        for lease in self._hold:
            if not lease.to_settle():
                continue
            if lease.ended():
                self._hold.ended.append(lease)
            elif not lease.first_done_ns:
                lease.first_done_ns = now_ns

    def cancel_marked(self) -> None:
        """Cancel the running job that the steward has named on the board, if it runs beside others."""
        word = self._view.get(layout.C_CANCEL_ROW)
        if word:
            self._view.set(layout.C_CANCEL_ROW, 0)
            # By now the row may be another frame's: the mark names the frame too.
            self.beside.cancel((word >> 32) - 1, word & 0xFFFF, self._view.text(layout.C_CANCEL_ID).encode())

    def close(self) -> None:
        """No job will run any more."""
        current.set_look_up(None)
        self.beside.close()
        self._reporter.close()

    def interrupt(self) -> None:
        """The limit signal: raise in the job that the supervisor has condemned, and nowhere else.

        A signal that becomes pending between two jobs is handled in the next one, before its first statement;
        so the step that it was meant for is compared with the step that runs.
        """
        step = self._view.get(layout.C_IN_USER)
        if not step or step != self._view.get(layout.C_CONDEMN_STEP):
            return
        if self._view.get(layout.C_CONDEMN_KIND) == layout.CONDEMN_CANCEL:
            raise JobCancelled("the job was cancelled")
        raise SoftTimeLimit("it ran past its time limit")

    # -- tasks and limits

    def _entry(self, number: int, task: Task[..., Any]) -> hot.Entry:
        limits = self._limits[task.key]
        return hot.Entry(
            name=task.name,
            number=number,
            func=task.func,
            decode=task.decoder.decode,
            positional=task.positional,
            keyword_only=task.keyword_only,
            mode=hot.MODES[task.mode],
            is_async=task.is_async,
            timeout_ms=limits.timeout_ms,
            hard_ms=limits.hard_ms,
            retries=limits.packed,
        )

    def _task_limits(self, task: Task[..., Any]) -> Limits:
        rule = rule_of(task, self._settings)
        return Limits(task.timeout_ms, self._hard(task, task.timeout_ms), rule)

    def _hard(self, task: Task[..., Any], timeout_ms: int) -> int:
        if not timeout_ms:
            return 0
        after = self._settings.hard_after_ms if task.hard_after_ms is None else task.hard_after_ms
        return timeout_ms + max(after, timeout_ms // 5 if task.hard_after_ms is None else 0)

    def _limits_of(self, lease: hot.Lease, task: Task[..., Any], options: bytes) -> Limits:
        """Raises msgspec.DecodeError if they make no sense: only the client checks them."""
        base = self._limits[task.key]
        found: dict[str, Any] = dict(lease.options or {})
        if options:
            found.update(msgspec.json.decode(options, type=dict[str, Any]))
        if not found:
            return base
        own = msgspec.convert(found, _Options)
        timeout = base.timeout_ms if own.timeout_ms is None else own.timeout_ms
        retries = base.rule.max_retries if own.max_retries is None else own.max_retries
        rule = RetryRule(retries, base.rule.base_ms, base.rule.cap_ms)
        return Limits(timeout, self._hard(task, timeout), rule, own.expires_ms, _trace(own.trace))

    # -- one job that needs Python

    def _special(self, lease: hot.Lease) -> int:
        """Start, or end, the next job of a lease; answers as `run` does."""
        if self.native.stopped():
            return int(hot.RUN_STOP)
        task = self.tasks.get(lease.next_type())
        if task is not None and not task.is_async and self.active and self._hand_over(lease):
            return hot.RUN_ENDED
        if task is not None and not self._has_place(task):
            return hot.RUN_BLOCKED
        if self._slot.room() < layout.ROOM_BYTES:
            self.full = True
            return hot.RUN_FULL
        index, key, stored, options, zstd = self.native.take(lease)
        picked = lease.cancels is PICKED
        if picked:
            lease.cancels = None  # one run of it is enough
        if lease.cancels is not None and index in lease.cancels:
            self._record(
                lease, index, self.failures.plain(layout.OUT_CANCELLED, "cancelled", "cancelled on request")
            )
            self._view.add("cancelled")
        elif task is None:
            name = key.decode("ascii", "replace")
            self._record_odd(lease, index, name, self.failures.unknown_type(name, lease.header.unknowns))
            self._view.add("unknown")
        else:
            self._start(lease, index, task, stored, options, zstd, picked)
        return int(hot.RUN_FULL if self.full else hot.RUN_ENDED)

    def _hand_over(self, lease: hot.Lease) -> bool:
        """Leave a synchronous job, and what follows it in its frame, to a worker without coroutines, if there
        is one: beside coroutines it would run on the helper thread, and share the interpreter with the loop.

        What comes back within a moment nobody else has taken: then it runs here.
        """
        now_ns = clock.boottime_ns()
        if (
            self._peers is None
            or now_ns - self._handed_ns < REST_NS
            or lease.settling
            or lease.lost
            or not self._peers.takes_sync()
        ):
            return False
        self._handed_ns = now_ns
        self._rest_until_ns = now_ns + REST_NS
        self._ended_at_rest = self.jobs_ended
        jobs, base = lease.stop - lease.next, lease.next
        lease.give_back(base)
        lease.pieces = laid_out(base, even_pieces(jobs, min(PIECES_MAX, jobs)))
        self._hold.give_way(lease)
        self._view.add("returned", jobs)
        return True

    def _has_place(self, task: Task[..., Any]) -> bool:
        if task.is_async:
            return self.free_slots > 0
        return not self.active or self.beside.helped is None

    def _start(
        self,
        lease: hot.Lease,
        index: int,
        task: Task[..., Any],
        stored: bytes,
        options: bytes,
        zstd: bool,
        picked: bool,
    ) -> None:
        try:
            limits = self._limits_of(lease, task, options)
        except msgspec.DecodeError as e:
            # Raised on, it would end the worker, and the job, not started yet, would come back uncharged.
            self._record_odd(lease, index, task.name, self.failures.plain(layout.OUT_DEAD, "options", str(e)))
            return
        if limits.expires_ms and self.native.now_ms() >= limits.expires_ms:
            self._record(
                lease,
                index,
                self.failures.plain(layout.OUT_EXPIRED, "expired", "it was not started before it expired"),
            )
            return
        entry = self.entries[task.key]
        try:
            body = payload.decompress(stored) if zstd else stored
        except (DamagedFrame, PayloadTooLarge) as e:
            outcome = self.failures.plain(layout.OUT_DEAD, "arguments", str(e))
            self._record_odd(lease, index, task.name, outcome)
            return
        run = None
        if picked:
            run = self.capture.begin(lease, index, task, body, self.native.redis_offset_ms)
        span = None if limits.trace is None else self._span(lease, index, entry, limits.trace)
        if task.is_async or self.beside_sync:
            context = None if span is None else span.context
            started = self.beside.start(lease, index, entry, body, limits, context)
            if run is not None:
                started.add_done_callback(partial(self._ended_beside, run))
            if span is not None:
                started.add_done_callback(lambda _: self._end_span(lease, index))
            return
        call = partial(self.native.call, timeout_ms=limits.timeout_ms, hard_ms=limits.hard_ms)
        self._own = limits
        try:
            if span is None:
                call(lease, index, entry, body, retries=limits.packed)
            else:
                span.context.run(call, lease, index, entry, body, retries=limits.packed)
        finally:
            self._own = None
        if run is not None:
            self.capture.end(run)
        if span is not None:
            self._end_span(lease, index)

    # -- spans, of jobs that carry a trace

    def _span(
        self, lease: hot.Lease, index: int, entry: hot.Entry, trace: Mapping[str, str]
    ) -> RunSpan | None:
        if self._tracing is None:
            return None
        waited_s = max(0.0, self.native.now_ms() / 1000 - lease.enqueued_us / 1e6)
        try:
            span = self._tracing(self._describe(lease, index, entry), trace, waited_s)
        except Exception:  # a tracer's code: the job runs without
            log.exception("job %s runs without a span", _id(lease, index))
            return None
        self._spans[lease, index] = span
        return span

    def _fail_span(self, lease: hot.Lease, index: int, error: BaseException, outcome: Outcome) -> None:
        span = self._spans.get((lease, index))
        if span is not None:
            try:
                span.failed(error, "cancelled" if outcome.status == layout.OUT_CANCELLED else "failed")
            except BaseException:  # it makes a text of the error, and a user's __str__ may raise anything
                log.exception("the span of job %s does not tell how it failed", _id(lease, index))

    def _end_span(self, lease: hot.Lease, index: int) -> None:
        span = self._spans.pop((lease, index), None)
        if span is not None:
            try:
                span.end()
            except Exception:  # an exporter's, if it exports at the end of each
                log.exception("the span of job %s could not be ended", _id(lease, index))

    def _ended_beside(self, run: Run, _: asyncio.Future[Any]) -> None:
        if self.native.late is not None:
            run.outcome = ""  # how it ended is told later, and not to us
        self.capture.end(run)

    # -- outcomes

    def _failed_beside(self, job: Job, error: BaseException, in_arguments: bool) -> None:
        """A coroutine, or the helper's job, raised."""
        if isinstance(error, asyncio.CancelledError | SoftTimeLimit) and job.ending == "return":
            self.capture.failed(job.lease, job.index, "")
            self._record(job.lease, job.index, Outcome(layout.OUT_RETURNED, b""))
            return
        if isinstance(error, asyncio.CancelledError) and job.ending == "timeout":
            error = SoftTimeLimit("it ran past its time limit")
        elif isinstance(error, asyncio.CancelledError) and job.ending == "cancel":
            error = JobCancelled("the job was cancelled")
        before, self._own = self._own, job.own
        try:
            self._failed(job.lease, job.index, job.entry, error, in_arguments)
        finally:
            self._own = before

    def _failed(
        self, lease: hot.Lease, index: int, entry: hot.Entry, error: BaseException, in_arguments: bool
    ) -> None:
        task = self.tasks[entry.key]
        limits = self._own or self._limits[entry.key]
        if not isinstance(error, Exception) and not isinstance(error, SoftTimeLimit | JobCancelled):
            log.warning(
                "job %s raised %s; it counts as a failed attempt", _id(lease, index), type(error).__name__
            )
        outcome = self.failures.judge(
            task,
            error,
            attempts=lease.attempts,
            unknowns=lease.header.unknowns,
            rule=limits.rule,
            in_arguments=in_arguments,
        )
        entry.count(layout.T_FAILED)
        self.capture.failed(lease, index, _said(error))
        if outcome.status == layout.OUT_RETRY:
            entry.count(layout.T_RETRIED)
        elif outcome.status == layout.OUT_DEAD:
            entry.count(layout.T_DEAD)
            log.warning("job %s (%s) is dead: %s", _id(lease, index), task.name, type(error).__name__)
        self._view.add("failed")
        self._record(lease, index, outcome)
        if self._spans:
            self._fail_span(lease, index, error, outcome)
        if self._reporter.hooks:
            self._report(lease, index, entry.name, outcome, error)

    def _record_odd(self, lease: hot.Lease, index: int, type_name: str, outcome: Outcome) -> None:
        """The outcome of a job that could not be run."""
        self._record(lease, index, outcome)
        if self._reporter.hooks:
            self._report(lease, index, type_name, outcome, None)

    def _report(
        self, lease: hot.Lease, index: int, type_name: str, outcome: Outcome, error: BaseException | None
    ) -> None:
        """Tell the app's error hooks; a cancelled job is no error."""
        if outcome.status == layout.OUT_CANCELLED:
            return
        told = msgspec.json.decode(outcome.error, type=dict[str, Any])
        failed = FailedAttempt(
            id=_id(lease, index),
            type=type_name,
            lane=lease.lane,
            attempt=lease.attempts + 1,
            crashes=lease.header.crashes,
            reason=told.get("reason", ""),
            message=told.get("message", ""),
            exception=error,
            will_retry=outcome.status != layout.OUT_DEAD,
            retry_in_s=outcome.delay_ms / 1000,
            _payload=partial(_payload_of, lease.frame, index),
        )
        entry = self.entries.get(type_name.encode())
        self._reporter.tell(failed, None if entry is None else _Reported(lease, index, entry))

    def _killed(self, job: Job) -> None:
        """The worker is about to end, for a job that can be ended in no other way."""
        if not self._reporter.hooks:
            return
        again = job.lease.header.crashes + 1 < self._settings.crashes_max
        status = layout.OUT_RETRY if again else layout.OUT_DEAD
        outcome = self.failures.plain(status, "hard_limit", "it ran past its hard time limit")
        self._report(job.lease, job.index, job.entry.name, outcome, None)
        self._reporter.close()

    def _odd_result(self, lease: hot.Lease, index: int, entry: hot.Entry, result: Any) -> None:
        """A result that the compiled path could not keep: too long, not JSON, or no room."""
        self._result(lease, index, entry, result)

    def _result(self, lease: hot.Lease, index: int, entry: hot.Entry, result: Any) -> None:
        encoded, note = told_of_result(result, self._settings.result_max_bytes)
        if note.get("reason") == "result":
            log.warning(
                "job %s (%s) completed and its result was dropped: %s",
                _id(lease, index), entry.name, note["message"],
            )  # fmt: skip
        self._record(lease, index, Outcome(layout.OUT_DONE, _ENCODER.encode(note) if note else b""), encoded)

    def _record(self, lease: hot.Lease, index: int, outcome: Outcome, result: bytes = b"") -> None:
        if lease.lost:
            return  # it will be refused; and its row may be another lease's before the record is gone
        if self.native.late is not None or self._slot.room() < len(outcome.error) + len(result) + 128:
            # No room: the outcome waits in memory until the next settle has freed a half. A crash now would
            # run the job again.
            self._late.append(lambda: self._record(lease, index, outcome, result))
            self.full = True
            return
        at = self.native.now_ms()
        self._slot.record(
            lease.row,
            index,
            outcome.status,
            delay_ms=outcome.delay_ms,
            started_ms=lease.started_ms,
            finished_ms=at,
            error=outcome.error,
            result=result,
        )
        if self._slot.room() < layout.ROOM_BYTES:
            self.full = True

    # -- current_job()

    def _current(self, job: Any) -> current.CurrentJob | None:
        if job is not None:
            return self._describe(job.lease, job.index, job.entry)
        found = self.native.current()
        return None if found is None else self._describe(*found)

    def _describe(self, lease: hot.Lease, index: int, entry: hot.Entry) -> current.CurrentJob:
        return current.CurrentJob(
            id=_id(lease, index),
            type=entry.name,
            lane=lease.lane,
            attempt=lease.attempts + 1,
            crashes=lease.header.crashes,
            token=f"{lease.name.decode()}@{self._view.text(layout.C_INCARNATION)}",
        )


@dataclass(frozen=True, slots=True)
class _Reported:
    """A job that an error hook is told of, as `current_job()` knows it there."""

    lease: hot.Lease
    index: int
    entry: hot.Entry


def _trace(given: Any) -> Mapping[str, str] | None:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        return None
    return given or None


def _payload_of(frame: bytes, index: int) -> dict[str, Any]:
    """The payload of one job of a frame. Raises InvalidPayload, PayloadTooLarge or DamagedFrame."""
    _, stored, _, zstd = codec.job_at(frame, index)
    return payload.decode(payload.decompress(stored) if zstd else stored)


def told_of_result(result: Any, bytes_max: int) -> tuple[bytes, dict[str, Any]]:
    """A result as JSON; or b"" and a note that says why it is not kept."""
    try:
        encoded = _ENCODER.encode(result)
    except Exception as e:  # msgspec calls into the objects' own code
        return b"", {"reason": "result", "message": f"the result is not JSON: {e}"[:500]}
    if len(encoded) > bytes_max:
        size = len(encoded)
        return b"", {"reason": "result_too_large", "message": f"{size} bytes", "bytes": size}
    return encoded, {}


def _said(error: BaseException) -> str:
    """What a failure says of the run's duration: a limit that it used up, or an end before its time."""
    if isinstance(error, JobCancelled):
        return ""
    return "timeout" if isinstance(error, SoftTimeLimit) else "failed"


def _id(lease: hot.Lease, index: int) -> str:
    return f"{lease.frame_id.decode('ascii')}.{index}"
