"""Owns what the log is told of looks that fail in the background of a server process: each fault, now and
then."""

from __future__ import annotations

from typing import Final

from tqe import clock
from tqe.errors import TQEError
from tqe.telemetry import logs

_AGAIN_S: Final = 60.0  # looks are taken each second: a fault that goes on is told so often

_log = logs.get("api")


class Faults:
    """What has failed lately, by what was tried and the kind of exception."""

    def __init__(self) -> None:
        self._told_ns: dict[tuple[str, str], int] = {}

    def note(self, what: str, error: Exception, said: str = "") -> None:
        """`what` could not be read. A kind of failure that nobody has thought of is told with its traceback;
        the look must go on all the same, or the server would show for ever what was."""
        kind = what, type(error).__name__
        now_ns = clock.monotonic_ns()
        if kind in self._told_ns and now_ns - self._told_ns[kind] < _AGAIN_S * 1e9:
            return
        self._told_ns[kind] = now_ns
        if isinstance(error, TQEError | TimeoutError):
            _log.warning(f"{what} cannot be read", error=said or str(error))
        else:
            _log.exception(f"{what} cannot be read: this is a defect of the server, or odd data in Redis")
