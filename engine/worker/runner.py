"""Runs jobs: plain synchronous ones on the compiled path, the rest (coroutines, options, cancels, unknown
types) one by one."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tqe import clock, current
from tqe.board import layout
from tqe.board.board import SlotView
from tqe.codec import hot, payload
from tqe.errors import DamagedFrame, JobCancelled, PayloadTooLarge, SoftTimeLimit
from tqe.registry import Registry, Task
from tqe.settings import Settings
from tqe.store.settling import retry_rule
from tqe.worker.failures import Failures, Outcome, RetryRule
from tqe.worker.hold import Hold

log = logging.getLogger("tqe.worker")

_ENCODER: Final = msgspec.json.Encoder()
REPEAT_S: Final = 1.0  # a limit that was swallowed (in a __del__, by a bare except) is raised again


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one job: its own, else its frame's, else its task's. Times in ms, 0 = none."""

    timeout_ms: int
    hard_ms: int
    rule: RetryRule
    expires_ms: int = 0

    @property
    def packed(self) -> int:
        return retry_rule(self.rule.max_retries, self.rule.base_ms, self.rule.cap_ms)


@dataclass(slots=True, eq=False)
class Running:
    """A job that runs beside others: as a coroutine, or on the helper thread."""

    lease: hot.Lease
    index: int
    entry: hot.Entry
    task: Task[..., Any]
    limits: Limits
    begun_ns: int
    future: asyncio.Future[Any] | None = None
    ending: str = ""  # why it is being cancelled: 'timeout', 'cancel', 'return'
    timer: asyncio.TimerHandle | None = None
    thread: int = 0


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
    ) -> None:
        self._settings = settings
        self._slot = slot
        self._view = view
        self._hold = hold
        self._changed = changed
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
        self._own: Limits | None = None  # limits of the job that runs inline, where they are not its task's
        self.active: set[Running] = set()
        self._helper: ThreadPoolExecutor | None = None
        self._helped: Running | None = None
        # Outcomes that wait while the worker takes itself over.
        self._late: list[Callable[[], None]] | None = None
        self.full = False  # the outcome half has no room: settle before anything else runs
        self.jobs_ended = 0
        current.set_inline(self._current)

    # -- what the loop calls

    @property
    def free_slots(self) -> int:
        return max(0, self._settings.concurrency - len(self.active))

    def run_slice(self, slice_ns: int) -> int:
        """Run ready jobs for about so long; returns a hot.RUN_* code: why it stopped."""
        end = clock.boottime_ns() + slice_ns
        blocked: set[int] = set()
        hold = self._hold
        while True:
            spot = hold.spot(blocked)
            if spot is None:
                return hot.RUN_ENDED
            left = end - clock.boottime_ns()
            if left <= 0:
                return hot.RUN_TIME
            at = spot.at
            if self.active:
                # While coroutines run, nothing runs inline: their timers must not wait for it.
                code = self._may_start()
            else:
                code, at, jobs = self.native.run(spot.leases, spot.at, left)
                self.jobs_ended += jobs
            if code == hot.RUN_SPECIAL:
                lease = spot.leases[at]
                if not self._special(lease):
                    blocked.add(lease.row)
                elif lease.next >= lease.stop:
                    at += 1
                code = hot.RUN_FULL if self.full else hot.RUN_ENDED
            if at > spot.at:
                hold.started(spot, at)
            if code != hot.RUN_ENDED:
                return code

    def _may_start(self) -> int:
        if self.native.stopped():
            return hot.RUN_STOP
        if clock.boottime_ns() >= self.native.until_ns:
            return hot.RUN_LEASE_END
        return hot.RUN_SPECIAL

    def hold_outcomes(self) -> None:
        """From now on outcomes of running coroutines wait: the halves of the outcome area are being sorted
        out."""
        if self._late is None:
            self._late = []

    def release_outcomes(self) -> None:
        """Write the outcomes that have waited."""
        late, self._late = self._late, None
        for write in late or ():
            write()
        if late:
            # Their leases may have been settled meanwhile, these jobs left out: nothing else would tell of them.
            self._hold.ended += [lease for lease in self._hold if lease.ended() and lease.to_settle()]

    def cancel_marked(self) -> None:
        """Cancel the running job that the steward has named on the board, if it runs beside others."""
        word = self._view.get(layout.C_CANCEL_ROW)
        if not word:
            return
        self._view.set(layout.C_CANCEL_ROW, 0)
        row, index = (word >> 32) - 1, word & 0xFFFF
        # By now the row may be another frame's: the mark names the frame too.
        frame_id = self._view.text(layout.C_CANCEL_ID).encode()
        for job in list(self.active):
            if job.lease.row == row and job.index == index and job.lease.frame_id == frame_id:
                self._end(job, "cancel")

    def return_running(self) -> None:
        """Stop now: what runs beside others is cancelled and goes back uncharged."""
        for job in list(self.active):
            self._end(job, "return")

    def close(self) -> None:
        """No job will run any more."""
        current.set_inline(None)
        if self._helper is not None:
            self._helper.shutdown(wait=False, cancel_futures=True)

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
        settings = self._settings
        retries = settings.max_retries if task.max_retries is None else task.max_retries
        base = settings.backoff_base_ms if task.backoff_base_ms is None else task.backoff_base_ms
        cap = settings.backoff_cap_ms if task.backoff_cap_ms is None else task.backoff_cap_ms
        return Limits(task.timeout_ms, self._hard(task, task.timeout_ms), RetryRule(retries, base, cap))

    def _hard(self, task: Task[..., Any], timeout_ms: int) -> int:
        if not timeout_ms:
            return 0
        after = self._settings.hard_after_ms if task.hard_after_ms is None else task.hard_after_ms
        return timeout_ms + max(after, timeout_ms // 5 if task.hard_after_ms is None else 0)

    def _limits_of(self, lease: hot.Lease, task: Task[..., Any], options: bytes) -> Limits:
        base = self._limits[task.key]
        found: dict[str, Any] = dict(lease.options or {})
        if options:
            found.update(msgspec.json.decode(options))
        if not found:
            return base
        timeout = int(found.get("timeout_ms", base.timeout_ms))
        retries = int(found.get("max_retries", base.rule.max_retries))
        rule = RetryRule(retries, base.rule.base_ms, base.rule.cap_ms)
        return Limits(timeout, self._hard(task, timeout), rule, int(found.get("expires_ms", 0)))

    # -- one job that needs Python

    def _special(self, lease: hot.Lease) -> bool:
        """Start, or end, the next job of a lease. False when it cannot start now: no free slot, or the helper
        is busy."""
        task = self.tasks.get(lease.next_type())
        if task is not None and (
            not self.free_slots if task.is_async else bool(self.active) and self._helped is not None
        ):
            return False
        if self._slot.room() < layout.ROOM_BYTES:
            self.full = True
            return True
        index, key, stored, options, zstd = self.native.take(lease)
        if lease.cancels is not None and index in lease.cancels:
            self._record(
                lease, index, self.failures.plain(layout.OUT_CANCELLED, "cancelled", "cancelled on request")
            )
            self._view.add("cancelled")
        elif task is None:
            outcome = self.failures.unknown_type(key.decode("ascii", "replace"), lease.header.unknowns)
            self._record(lease, index, outcome)
            self._view.add("unknown")
        else:
            self._start(lease, index, task, stored, options, zstd)
        return True

    def _start(
        self, lease: hot.Lease, index: int, task: Task[..., Any], stored: bytes, options: bytes, zstd: bool
    ) -> None:
        limits = self._limits_of(lease, task, options)
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
            self._record(lease, index, self.failures.plain(layout.OUT_DEAD, "arguments", str(e)))
            return
        if task.is_async or self.active:
            self._start_beside(lease, index, task, entry, body, limits)
        else:
            self._own = limits
            try:
                self.native.call(
                    lease,
                    index,
                    entry,
                    body,
                    timeout_ms=limits.timeout_ms,
                    hard_ms=limits.hard_ms,
                    retries=limits.packed,
                )
            finally:
                self._own = None
            self.jobs_ended += 1

    # -- jobs beside others

    def _start_beside(
        self,
        lease: hot.Lease,
        index: int,
        task: Task[..., Any],
        entry: hot.Entry,
        body: bytes,
        limits: Limits,
    ) -> None:
        if lease.started_ms == 0:
            lease.started_ms = self.native.now_ms()
        job = Running(lease, index, entry, task, limits, clock.boottime_ns())
        self.active.add(job)
        lease.running += 1
        self.native.started(lease, index)
        self._view.set(layout.C_ASYNC, len(self.active))
        loop = asyncio.get_running_loop()
        if task.is_async:
            job.future = loop.create_task(self._drive(job, body))
        else:
            self._helped = job
            self._view.set(layout.C_HELPER, (lease.row + 1) << 32 | index)
            if self._helper is None:
                self._helper = ThreadPoolExecutor(1, thread_name_prefix="tqe-helper")
            context = contextvars.copy_context()
            job.future = loop.run_in_executor(self._helper, context.run, self._help, job, body)
        job.future.add_done_callback(lambda future: self._ended(job, future))
        if limits.timeout_ms:
            job.timer = loop.call_later(limits.timeout_ms / 1000, self._end, job, "timeout")

    async def _drive(self, job: Running, body: bytes) -> Any:
        current.IN_CONTEXT.set(self._describe(job.lease, job.index, job.entry))
        try:
            arguments = job.entry.decode(body)
        except Exception as e:
            raise _ArgumentsError(e) from e
        coroutine = self.native.invoke(job.entry, arguments)
        limits = job.limits
        try:
            return await self.native.steps(
                coroutine, job.lease, job.index, job.entry,
                timeout_ms=limits.timeout_ms, hard_ms=limits.hard_ms, retries=limits.packed,
            )  # fmt: skip
        except (SystemExit, KeyboardInterrupt) as e:
            # A Task passes these on to the event loop, which would end the worker and all that runs in it.
            raise _Escaped(e) from e

    def _help(self, job: Running, body: bytes) -> Any:
        """Runs on the helper thread."""
        current.IN_CONTEXT.set(self._describe(job.lease, job.index, job.entry))
        try:
            arguments = job.entry.decode(body)
        except Exception as e:
            raise _ArgumentsError(e) from e
        job.thread = threading.get_ident()
        try:
            return self.native.invoke(job.entry, arguments)
        except StopIteration as e:
            raise RuntimeError("the task raised StopIteration") from e  # a future refuses it
        finally:
            job.thread = 0

    def _end(self, job: Running, ending: str) -> None:
        """Cancel a running job; repeated each second until it has ended."""
        if job not in self.active or job.future is None:
            return
        job.ending = job.ending or ending
        if job.task.is_async:
            job.future.cancel()
        elif job.thread:
            kind = JobCancelled if job.ending == "cancel" else SoftTimeLimit
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(job.thread), ctypes.py_object(kind))
        job.timer = asyncio.get_running_loop().call_later(REPEAT_S, self._end, job, ending)

    def _ended(self, job: Running, future: asyncio.Future[Any]) -> None:
        if job.timer is not None:
            job.timer.cancel()
        self.active.discard(job)
        if job is self._helped:
            self._helped = None
            self._view.set(layout.C_HELPER, 0)
        self._view.set(layout.C_ASYNC, len(self.active))
        job.lease.running -= 1
        if job.lease.ended():
            self._hold.ended.append(job.lease)
        job.entry.timed(1, max(1, clock.boottime_ns() - job.begun_ns))
        self.jobs_ended += 1
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if self._late is not None:
            self._late.append(lambda: self._settle_beside(job, future, error))
        else:
            self._settle_beside(job, future, error)
        self._changed()

    def _settle_beside(self, job: Running, future: asyncio.Future[Any], error: BaseException | None) -> None:
        lease = job.lease
        if not lease.first_done_ns:
            lease.first_done_ns = clock.boottime_ns()
        lease.finished_ms = self.native.now_ms()
        if error is None:
            self._succeeded(job, future.result())
            return
        if isinstance(error, asyncio.CancelledError | SoftTimeLimit) and job.ending == "return":
            self._record(lease, job.index, Outcome(layout.OUT_RETURNED, b""))
            return
        if isinstance(error, asyncio.CancelledError) and job.ending == "timeout":
            error = SoftTimeLimit("it ran past its time limit")
        elif isinstance(error, asyncio.CancelledError) and job.ending == "cancel":
            error = JobCancelled("the job was cancelled")
        self._own = job.limits
        try:
            cause = error.cause if isinstance(error, _Escaped) else error
            self._failed(lease, job.index, job.entry, cause, isinstance(error, _ArgumentsError))
        finally:
            self._own = None

    def _succeeded(self, job: Running, result: Any) -> None:
        lease = job.lease
        if result is None or not lease.tracked:
            self.native.done(lease, job.index)
            return
        self._result(lease, job.index, job.entry, result)

    # -- outcomes

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
        if outcome.status == layout.OUT_RETRY:
            entry.count(layout.T_RETRIED)
        elif outcome.status == layout.OUT_DEAD:
            entry.count(layout.T_DEAD)
            log.warning("job %s (%s) is dead: %s", _id(lease, index), task.name, type(error).__name__)
        self._view.add("failed")
        self._record(lease, index, outcome)

    def _odd_result(self, lease: hot.Lease, index: int, entry: hot.Entry, result: Any) -> None:
        """A result that the compiled path could not keep: too long, not JSON, or no room."""
        self._result(lease, index, entry, result)

    def _result(self, lease: hot.Lease, index: int, entry: hot.Entry, result: Any) -> None:
        try:
            encoded = _ENCODER.encode(result)
        except Exception as e:  # msgspec calls into the objects' own code
            log.warning(
                "job %s (%s): its result is not JSON and was dropped: %s", _id(lease, index), entry.name, e
            )
            told = {"reason": "result", "message": f"the result is not JSON: {e}"[:500]}
            self._record(lease, index, Outcome(layout.OUT_DONE, _ENCODER.encode(told)))
            return
        if len(encoded) > self._settings.result_max_bytes:
            note: dict[str, object] = {
                "reason": "result_too_large",
                "message": f"{len(encoded)} bytes",
                "bytes": len(encoded),
            }
            self._record(lease, index, Outcome(layout.OUT_DONE, _ENCODER.encode(note)))
            return
        self._record(lease, index, Outcome(layout.OUT_DONE, b""), encoded)

    def _record(self, lease: hot.Lease, index: int, outcome: Outcome, result: bytes = b"") -> None:
        if lease.lost:
            return  # it will be refused; and its row may be another lease's before the record is gone
        if self._late is None and self._slot.room() < len(outcome.error) + len(result) + 128:
            # No room: the outcome waits in memory until the next settle has freed a half. A crash now would
            # run the job again.
            self._late = []
        if self._late is not None:
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

    def _current(self) -> current.CurrentJob | None:
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


class _Escaped(Exception):
    """What a job beside others raised, wrapped so that it ends the job and nothing else."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(type(cause).__name__)
        self.cause = cause


class _ArgumentsError(_Escaped):
    """The arguments of a job beside others could not be decoded."""


def _id(lease: hot.Lease, index: int) -> str:
    return f"{lease.frame_id.decode('ascii')}.{index}"
