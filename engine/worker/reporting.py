"""Owns the way from a failed attempt to the app's error hooks: on a thread of its own: no job waits."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tqe import clock, current

log = logging.getLogger("tqe.worker")

WAITING_MAX: Final = 100  # failures that wait for a slow hook; what comes then is dropped and counted
CLOSE_S: Final = 2.0  # for what waits when the worker ends
COMPLAIN_NS: Final = 60_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedAttempt:
    """What an `@app.on_error` hook gets.

    `exception` is what the task raised; None where nothing was raised (`reason` then says why the job could
    not run, or that it was ended). `reason`: failed, timeout, rejected, arguments, unknown_type, options,
    hard_limit. `attempt` counts from 1. If not `will_retry`, the job is dead; else it is tried again in
    `retry_in_s` seconds.
    """

    id: str
    type: str
    lane: str
    attempt: int
    crashes: int
    reason: str
    message: str
    exception: BaseException | None
    will_retry: bool
    retry_in_s: float
    _payload: Callable[[], dict[str, Any]] = field(repr=False, compare=False)

    @property
    def payload(self) -> dict[str, Any]:
        """The job's payload, decoded when it is asked for."""
        return self._payload()


Hook = Callable[[FailedAttempt], Any]
_Waiting = tuple[contextvars.Context, FailedAttempt]


def call_hooks(hooks: Sequence[Hook], failed: FailedAttempt) -> None:
    """Call each; what one raises is logged, and hurts neither the others nor the job."""
    for hook in hooks:
        try:
            hook(failed)
        except BaseException:  # a user's code: it may raise anything, even what would end a process
            log.exception("an error hook failed at job %s (%s)", failed.id, failed.type)


class Reporter:
    """Calls the hooks of one worker. Its thread starts with the first failure."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self.hooks = tuple(hooks)
        self.dropped = 0
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(WAITING_MAX)
        self._thread: threading.Thread | None = None
        self._complained_ns = 0

    def tell(self, failed: FailedAttempt, job: object) -> None:
        """`job` is what the look-up of `current_job()` knows it by. Called in the context of the job."""
        context = contextvars.copy_context()  # where error trackers keep what they know of the job
        context.run(current.IN_CONTEXT.set, job)
        try:
            self._waiting.put_nowait((context, failed))
        except queue.Full:
            self._drop()
            return
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="tqe-errors", daemon=True)
            try:
                thread.start()
            except RuntimeError as e:  # there may be only so many: what waits is told when there is room
                self._complain(f"error hooks are not told for now: {e}")
                return
            self._thread = thread

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Let the hooks have what waits, for so long."""
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return  # it has not kept up so far
        self._thread.join(timeout_s)
        self._thread = None

    def _work(self) -> None:
        while (found := self._waiting.get()) is not None:
            context, failed = found
            context.run(call_hooks, self.hooks, failed)

    def _drop(self) -> None:
        self.dropped += 1
        self._complain(f"error hooks are too slow: {self.dropped} failures were not told to them so far")

    def _complain(self, text: str) -> None:
        now_ns = clock.boottime_ns()
        if now_ns - self._complained_ns > COMPLAIN_NS or not self._complained_ns:
            self._complained_ns = now_ns
            log.warning(text)
