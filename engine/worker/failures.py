"""What becomes of a job that raised: retried, dead, cancelled or redelivered, and what is told about it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec

from tqe import errors
from tqe.board import layout
from tqe.registry import Task
from tqe.settings import Settings
from tqe.store.settling import backoff_ms

MARKER: Final = " … [cut]"
UNKNOWN_FIRST_MS: Final = 30_000
UNKNOWN_CAP_MS: Final = 300_000
TRACEBACKS_MAX: Final = 256
# Names of classes and files can be of any length and hold anything, even halves of characters.
NAME_BYTES_MAX: Final = 200
PLACE_BYTES_MAX: Final = 500
FRAMES_MAX: Final = 20
_RUNNER: Final = str(Path(__file__).with_name("runner.py"))


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How often and how late a job is tried again; times in ms."""

    max_retries: int
    base_ms: int
    cap_ms: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to record: a layout.OUT_* status, the delay of the next try, and the error as JSON."""

    status: int
    error: bytes
    delay_ms: int = 0


def rule_of(task: Task[..., Any], settings: Settings) -> RetryRule:
    """What counts for jobs of a task that bring no rule of their own."""
    return RetryRule(
        settings.max_retries if task.max_retries is None else task.max_retries,
        settings.backoff_base_ms if task.backoff_base_ms is None else task.backoff_base_ms,
        settings.backoff_cap_ms if task.backoff_cap_ms is None else task.backoff_cap_ms,
    )


class Failures:
    """Judges failures for one worker. It remembers which errors it has described in full a moment ago.

    A traceback costs 300 µs, so ten thousand jobs that fail together would spend seconds on text that nobody
    reads: the last attempt of a job gets one, and so does each place that raises, once a second.
    """

    def __init__(
        self, *, error_max_bytes: int, grace_ms: int, now_ms: Callable[[], int], known: tuple[str, ...]
    ) -> None:
        self._error_max = error_max_bytes
        self._grace_ms = grace_ms
        self._now_ms = now_ms
        self._known = known
        self._described: dict[tuple[str, str, int], int] = {}

    def judge(
        self,
        task: Task[..., Any],
        error: BaseException,
        *,
        attempts: int,
        unknowns: int,
        rule: RetryRule,
        in_arguments: bool,
    ) -> Outcome:
        """Outcome of a job of this task that raised `error`; `attempts` failed before, `unknowns` were
        uncharged."""
        if in_arguments:
            return self._arguments(task, error, unknowns)
        if isinstance(error, errors.JobCancelled):
            return Outcome(layout.OUT_CANCELLED, self._tell("cancelled", error, short=True))
        if isinstance(error, errors.Reject):
            return Outcome(layout.OUT_DEAD, self._tell("rejected", error, short=True))
        reason = "timeout" if isinstance(error, errors.SoftTimeLimit) else "failed"
        if isinstance(error, Exception) and not isinstance(error, errors.Retry) and not _retried(task, error):
            return Outcome(layout.OUT_DEAD, self._tell(reason, error))
        if attempts >= rule.max_retries:
            return Outcome(layout.OUT_DEAD, self._tell(reason, error))
        delay = _asked_delay_ms(error, rule.cap_ms)
        if delay is None:
            delay = backoff_ms(attempts + 1, rule.base_ms, rule.cap_ms)
        told = self._tell(reason, error, short=self._seen(error))
        return Outcome(layout.OUT_RETRY, told, min(delay, layout.DELAY_MS_MAX))

    def unknown_type(self, name: str, unknowns: int) -> Outcome:
        """A type that this worker does not know: a newer one may, so it is redelivered for the grace of a
        deploy."""
        known = ", ".join(sorted(self._known)[:50]) or "none"
        return self._redeliver(
            "unknown_type", f"no task {name!r} is registered here; this worker knows: {known}", unknowns
        )

    def plain(self, status: int, reason: str, message: str) -> Outcome:
        """An outcome that no exception stands behind."""
        return Outcome(status, self._encode(reason, "", message, ""))

    def _arguments(self, task: Task[..., Any], error: BaseException, unknowns: int) -> Outcome:
        fault, text = task.explain(error)
        if fault == "wrong":
            return Outcome(layout.OUT_DEAD, self._encode("arguments", type(error).__name__, text, ""))
        return self._redeliver("arguments", text, unknowns)

    def _redeliver(self, reason: str, text: str, unknowns: int) -> Outcome:
        error = self._encode(reason, "", text, "")
        waited = sum(_unknown_delay_ms(k) for k in range(unknowns))
        if waited >= self._grace_ms:
            return Outcome(layout.OUT_DEAD, error)
        return Outcome(layout.OUT_UNKNOWN, error, min(_unknown_delay_ms(unknowns), self._grace_ms - waited))

    def _seen(self, error: BaseException) -> bool:
        line = _raised_at(error.__traceback__)
        place = (type(error).__name__, line[0], line[1])
        now = self._now_ms()
        last = self._described.get(place)
        if last is not None and now - last < 1_000:
            return True
        if len(self._described) >= TRACEBACKS_MAX:
            self._described.clear()
        self._described[place] = now
        return False

    def _tell(self, reason: str, error: BaseException, *, short: bool = False) -> bytes:
        try:
            message = str(error)
        except BaseException as e:  # a user's __str__ may raise anything, and must not end the worker
            message = f"<its text cannot be made: {type(e).__name__}>"
        if isinstance(error, errors.SoftTimeLimit) and not message:
            message = "it ran past its time limit"
        file, line = _raised_at(error.__traceback__)
        where = f"{file}:{line}" if file else ""
        text = ""
        if not short:
            trace = _of_task(error.__traceback__)
            text = "".join(traceback.format_exception(type(error), error, trace, limit=-FRAMES_MAX))
        return self._encode(reason, type(error).__name__, message, text, where)

    def _encode(self, reason: str, kind: str, message: str, text: str, where: str = "") -> bytes:
        told = {
            "reason": reason,
            "type": cut(kind, NAME_BYTES_MAX),
            "message": cut(message, self._error_max // 2),
            "where": cut(where, PLACE_BYTES_MAX),
            "traceback": cut(text, self._error_max // 2),
        }
        return msgspec.json.encode({key: value for key, value in told.items() if value})


def cut(text: str, bytes_max: int) -> str:
    """The text, or its beginning with a marker when it is longer than so many bytes of UTF-8."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= bytes_max:
        return raw.decode()
    return raw[: max(bytes_max - len(MARKER.encode()), 0)].decode("utf-8", "ignore") + MARKER


def _unknown_delay_ms(unknowns: int) -> int:
    return min(UNKNOWN_FIRST_MS << min(unknowns, 10), UNKNOWN_CAP_MS)


def _asked_delay_ms(error: BaseException, cap_ms: int) -> int | None:
    """The delay that the task asked for, if it is one."""
    if not isinstance(error, errors.Retry) or not isinstance(error.delay, int | float):
        return None
    asked_ms = error.delay * 1000
    if not asked_ms > 0:  # NaN too
        return 0
    return int(asked_ms) if asked_ms < cap_ms else cap_ms


def _retried(task: Task[..., Any], error: Exception) -> bool:
    return isinstance(error, task.retry_on) and not isinstance(error, task.no_retry_on)


def _of_task(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins in the task's own code: ours says nothing to its author."""
    inner = trace
    while inner is not None and inner.tb_next is not None and _is_ours(inner):
        inner = inner.tb_next
    return inner


def _is_ours(trace: TracebackType) -> bool:
    name = trace.tb_frame.f_code.co_filename
    return name.endswith("_dispatch.pxi") or name == _RUNNER or name.endswith("_pure_board.py")


def _raised_at(trace: TracebackType | None) -> tuple[str, int]:
    if trace is None:
        return "", 0
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno
