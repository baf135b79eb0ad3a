"""Asks the embedded server back when it is away: somebody who uses it has to start its next keeper."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from tqe.errors import TQEError
from tqe.telemetry import logs

AFTER_FAILURES: Final = 3  # in a row: one lost connection heals by itself
EVERY_NS: Final = 2_000_000_000

_log = logs.get("steward")


class Reviver:
    """Runs `revive` on a thread, one at a time: it may wait for a server that loads its data, and we must
    beat."""

    def __init__(self, revive: Callable[[], None] | None) -> None:
        self._revive = revive
        self._thread: threading.Thread | None = None
        self._begun_ns = 0
        self._told = ""

    def look(self, failures_in_row: int, now_ns: int) -> bool:
        """Called after each failure to reach Redis; True if an attempt was begun."""
        if self._revive is None or failures_in_row < AFTER_FAILURES:
            return False
        if self._thread is not None and (self._thread.is_alive() or now_ns - self._begun_ns < EVERY_NS):
            return False
        self._begun_ns = now_ns
        self._thread = threading.Thread(target=self._run, args=(self._revive,), name="revive", daemon=True)
        self._thread.start()
        return True

    def _run(self, revive: Callable[[], None]) -> None:
        try:
            revive()
        except (TQEError, OSError, ValueError) as e:
            if str(e) != self._told:
                self._told = str(e)
                _log.warning(f"the embedded Redis does not come back: {e}")
