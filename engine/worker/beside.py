"""Jobs that run beside others: coroutines, and the one synchronous job on the helper thread while coroutines
run."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tqe import clock, current
from tqe.board import layout
from tqe.board.board import SlotView
from tqe.codec import hot
from tqe.errors import JobCancelled, SoftTimeLimit
from tqe.store.settling import retry_rule
from tqe.worker.children import mark_children
from tqe.worker.failures import RetryRule

log = logging.getLogger("tqe.worker")

REPEAT_S: Final = 1.0  # a limit that was swallowed (in a __del__, by a bare except) is raised again
EXIT_HARD_LIMIT: Final = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one job: its own, else its frame's, else its task's. Times in ms, 0 = none."""

    timeout_ms: int
    hard_ms: int
    rule: RetryRule
    expires_ms: int = 0
    trace: Mapping[str, str] | None = None  # of who submitted it

    @property
    def packed(self) -> int:
        return retry_rule(self.rule.max_retries, self.rule.base_ms, self.rule.cap_ms)


@dataclass(slots=True, eq=False)
class HelpedJob:
    """A synchronous job on the helper thread."""

    lease: hot.Lease
    index: int
    entry: hot.Entry
    own: Limits | None
    timeout_ms: int
    future: asyncio.Future[Any] | None = None
    ending: str = ""
    timer: asyncio.TimerHandle | None = None
    thread: int = 0  # ident of the helper while it is in the task's code
    spent_ns: int = 0  # in the task's code: without the waits for the thread and for the loop


Job = hot.AsyncJob | HelpedJob


class Ends(Protocol):
    """Who writes the outcome of a job that ran beside others."""

    def __call__(self, job: Job, error: BaseException, in_arguments: bool) -> None: ...


class Beside:
    """The jobs of one worker that run beside others."""

    def __init__(
        self,
        native: hot.Runner,
        view: SlotView,
        *,
        slots: int,
        failed: Ends,
        changed: Callable[[], None],
        ended: list[hot.Lease],
        killed: Callable[[Job], None],
    ) -> None:
        self._native = native
        self._view = view
        self._failed = failed
        self._changed = changed
        self._ended = ended
        self._killed = killed
        self._slots = slots
        self._loop = asyncio.get_running_loop()
        self._helper: ThreadPoolExecutor | None = None
        self.helped: HelpedJob | None = None
        self.helped_jobs = 0
        self._hard_at_s: dict[Job, float] = {}  # of jobs that were told to end: when that is over
        mark_children(self._loop)
        native.beside(
            slots=slots,
            # Not create_task: it would ask the factory of the tasks of jobs.
            spawn=functools.partial(asyncio.Task, loop=self._loop),
            limit=self._limit,
            failed=failed,
            changed=changed,
            context=current.IN_CONTEXT,
            ended=ended,
        )

    @property
    def free_slots(self) -> int:
        return max(0, self._slots - len(self._native.active))

    def start(
        self,
        lease: hot.Lease,
        index: int,
        entry: hot.Entry,
        body: bytes,
        limits: Limits,
        context: contextvars.Context | None = None,
    ) -> asyncio.Future[Any]:
        """Start a job that was taken out of its frame: a coroutine, or a synchronous one on the helper
        thread. What it answers ends with the job, and tells nothing more.

        It runs in a copy of `context`; without one a coroutine has the worker's, the helper an empty one.
        """
        if entry.is_async:
            start = functools.partial(
                self._native.start, lease, index, entry, body, limits,
                timeout_ms=limits.timeout_ms, hard_ms=limits.hard_ms, retries=limits.packed,
            )  # fmt: skip
            started: asyncio.Future[Any] = (start() if context is None else context.run(start)).task
            return started
        if lease.started_ms == 0:
            lease.started_ms = self._native.now_ms()
        job = HelpedJob(lease, index, entry, limits, limits.timeout_ms)
        self.helped = job
        self._native.active.add(job)
        self._native.started(lease, index)
        lease.running += 1
        self._view.set(layout.C_HELPER, (lease.row + 1) << 32 | index)
        self._view.set(layout.C_ASYNC, len(self._native.active))
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, thread_name_prefix="tqe-helper")
        job.future = self._loop.run_in_executor(
            self._helper, (context or contextvars.Context()).copy().run, self._help, job, body
        )
        job.future.add_done_callback(lambda future: self._help_ended(job, future))
        if limits.timeout_ms:
            self._limit(job)
        return job.future

    def cancel(self, row: int, index: int, frame_id: bytes) -> None:
        """Cancel one running job on request."""
        for job in list(self._native.active):
            if job.lease.row == row and job.index == index and job.lease.frame_id == frame_id:
                self._end(job, "cancel")

    def return_all(self) -> None:
        """Stop now: what runs is cancelled and goes back uncharged."""
        for job in list(self._native.active):
            self._end(job, "return")

    def close(self) -> None:
        """No job will run any more.

        What still runs is cut off by our end: the loop cancels it, which is no failure of its own, and it is
        not what ended us. So nothing is recorded, and the board goes on to say that jobs run beside others,
        none of them to blame.
        """
        if self._native.active:
            self._native.late = []
            self._native.active.add(self)
            self._view.set(layout.C_HELPER, 0)
        if self._helper is not None:
            self._helper.shutdown(wait=False, cancel_futures=True)

    def _limit(self, job: Job) -> None:
        job.timer = self._loop.call_later(job.timeout_ms / 1000, self._end, job, "timeout")

    def _end(self, job: Job, ending: str) -> None:
        """Cancel a running job; repeated each second until it has ended."""
        if job not in self._native.active:
            return
        job.ending = job.ending or ending
        if self._loop.time() >= self._hard_at(job, ending):
            self._over_hard_limit(job)
        if isinstance(job, HelpedJob):
            if job.thread:
                kind = JobCancelled if job.ending == "cancel" else SoftTimeLimit
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(job.thread), ctypes.py_object(kind))
        else:
            job.task.cancel()
        if job.timer is not None:
            job.timer.cancel()
        job.timer = self._loop.call_later(REPEAT_S, self._end, job, ending)

    def _hard_at(self, job: Job, ending: str) -> float:
        """By when a job that is told to end must have ended, on the loop's clock."""
        hard_at = self._hard_at_s.get(job)
        if hard_at is None:
            hard_ms = job.entry.hard_ms if job.own is None else job.own.hard_ms
            spent_ms = job.timeout_ms if ending == "timeout" else 0
            hard_at = self._loop.time() + (hard_ms - spent_ms) / 1000 if hard_ms else math.inf
            self._hard_at_s = {one: at for one, at in self._hard_at_s.items() if one in self._native.active}
            self._hard_at_s[job] = hard_at
        return hard_at

    def _over_hard_limit(self, job: Job) -> None:
        """End the process, which is the only way to end this job: it blocks its thread, or swallows each
        cancel.

        The board says who is to blame, as it does when the supervisor kills for a job that runs inline; what
        has ended is on the board as well, and all else goes back uncharged.
        """
        log.warning(
            "job %s.%d ran past its hard time limit: the worker ends",
            job.lease.frame_id.decode("ascii"), job.index,
        )  # fmt: skip
        view = self._view
        step = view.get(layout.C_STEP) + 1  # nobody's so far
        view.set(layout.C_ROW, job.lease.row)
        view.set(layout.C_INDEX, job.index)
        view.set(layout.C_RETRIES, job.entry.retries if job.own is None else job.own.packed)
        view.set(layout.C_KILL_STEP, step)
        view.set(layout.C_KILL_KIND, layout.KILL_HARD_LIMIT)
        view.set(layout.C_IN_USER, step)
        self._killed(job)
        os._exit(EXIT_HARD_LIMIT)

    def _help(self, job: HelpedJob, body: bytes) -> Any:
        """Runs on the helper thread; a future carries neither StopIteration nor what would end the loop."""
        current.IN_CONTEXT.set(job)
        try:
            arguments = job.entry.decode(body)
        except Exception as e:
            raise _Raised(e, in_arguments=True) from e
        begun_ns = clock.boottime_ns()
        job.thread = threading.get_ident()
        try:
            result = self._native.invoke(job.entry, arguments)
            hot.end_if_forked()
            return result
        except BaseException as e:
            hot.end_if_forked(e)
            raise _Raised(e, in_arguments=False) from e
        finally:
            job.thread = 0
            job.spent_ns = clock.boottime_ns() - begun_ns

    def _help_ended(self, job: HelpedJob, future: asyncio.Future[Any]) -> None:
        if job.timer is not None:
            job.timer.cancel()
        lease = job.lease
        self.helped = None
        self.helped_jobs += 1
        self._view.set(layout.C_HELPER, 0)
        job.entry.timed(1, max(1, job.spent_ns))
        lease.running -= 1
        lease.finished_ms = self._native.now_ms()
        if not lease.first_done_ns:
            lease.first_done_ns = clock.boottime_ns()
        result, error, in_arguments = self._outcome(future)
        if self._native.late is not None:
            self._native.late.append((job, result, error, in_arguments))
        else:
            self.conclude(job, result, error, in_arguments)
        if lease.ended():
            self._ended.append(lease)
        self._native.leave(job)
        self._changed()

    def _outcome(self, future: asyncio.Future[Any]) -> tuple[Any, BaseException | None, bool]:
        if future.cancelled():
            return None, asyncio.CancelledError(), False
        error = future.exception()
        if isinstance(error, _Raised):
            return None, error.cause, error.in_arguments
        return (None, error, False) if error is not None else (future.result(), None, False)

    def conclude(self, job: Job, result: Any, error: BaseException | None, in_arguments: bool) -> None:
        """Write the outcome of a job that ran beside others."""
        if error is None:
            self._native.conclude(job.lease, job.index, job.entry, result)
        else:
            self._failed(job, error, in_arguments)


class _Raised(Exception):
    """What a job on the helper thread raised."""

    def __init__(self, cause: BaseException, *, in_arguments: bool) -> None:
        super().__init__(str(type(cause)))
        self.cause = cause
        self.in_arguments = in_arguments
