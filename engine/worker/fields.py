"""Owns what may be known of a payload when a duration is learnt or predicted: its numbers and short texts.

The same function serves capture and scoring, so that a model sees when it predicts what it saw when it was
trained.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tqe import clock
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.registry import Features

log = logging.getLogger("tqe.worker")

FIELDS_MAX: Final = 24
NAME_CHARS_MAX: Final = 64
TEXT_CHARS_MAX: Final = 64
# A longer payload is not decoded for its fields: that would cost more than the order can win.
PAYLOAD_BYTES_MAX: Final = 16 * 1024
# A task's own function that fails so often in its last so many calls is not called any more.
CALLS: Final = 100
ERRORS_MAX: Final = 5
# The limits that `tqe.ml.score` has for predicting hold for reading as well: a batch of a type's jobs that
# takes longer is too slow. No batch is read on beyond the last of them.
BATCH_US_MAX: Final = 5_000
JOB_US_MAX: Final = 20
CALL_US: Final = 200
SLOW_BATCHES_MAX: Final = 4
BREAK_NS: Final = 60_000_000_000
BATCH_NS_MAX: Final = 50_000_000

Value = float | str
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


def usable(payload: Mapping[Any, Any]) -> dict[str, Value]:
    """The numbers and short texts among the first values of a payload."""
    found: dict[str, Value] = {}
    for name, value in payload.items():
        if not isinstance(name, str) or len(name) > NAME_CHARS_MAX:
            continue
        if isinstance(value, int | float):
            number = _number(value)
            if number is not None:
                found[name] = number
        elif isinstance(value, str) and len(value) <= TEXT_CHARS_MAX:
            found[name] = value
        if len(found) >= FIELDS_MAX:
            break
    return found


def _number(value: int | float) -> float | None:
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have no end
        return None
    return number if math.isfinite(number) else None


class Marks:
    """What the board says of features functions; without one, nothing."""

    def __init__(self, board: Board | None = None, view: SlotView | None = None) -> None:
        self._board, self._view = board, view

    def enter(self, number: int) -> None:
        """This process is in the function of the task of this number from now on; -1: in none. Who dies
        so, or never comes back, has that function to blame, and no job and no model."""
        if self._view is not None:
            self._view.set(layout.C_FEATURES, number + 1)

    def off(self, name: str) -> bool:
        """Whether the function of tasks of this name is not to be called on this host: it has ended
        workers."""
        return self._board is not None and self._board.features_off(name)


class Fields:
    """The fields of one task's jobs. A function of the task's own is tried for each job: whatever it raises
    costs that job its score, never the job. What takes too long is not read for a minute."""

    __slots__ = (
        "_closed_until_ns", "_function", "_jobs", "_marks", "_name", "_number", "_recent", "_slow_batches",
        "_spent_ns", "_time", "errors", "off",
    )  # fmt: skip

    def __init__(
        self,
        function: Features | None = None,
        *,
        name: str = "",
        number: int = 0,
        marks: Marks | None = None,
        time: clock.Clock = clock.SYSTEM,
    ) -> None:
        self._function = function
        self._name = name
        self._number = number
        self._marks = marks or Marks()
        self._time = time
        self._recent: deque[bool] = deque(maxlen=CALLS)
        self.errors = 0
        self.off = False  # until the process ends
        self._jobs = self._spent_ns = 0  # of this batch
        self._slow_batches = 0
        self._closed_until_ns = 0

    def __call__(self, payload: bytes) -> dict[str, Value] | None:
        """The fields of a payload (JSON); None if the task's own function failed, now or too often, or takes
        too long."""
        if self.off:
            return None
        if len(payload) > PAYLOAD_BYTES_MAX:
            return {}
        began_ns = self._time.monotonic_ns()
        if began_ns < self._closed_until_ns or self._spent_ns > BATCH_NS_MAX:
            return None if self._function is not None else {}
        try:
            return self._read(payload)
        finally:
            self._jobs += 1
            self._spent_ns += self._time.monotonic_ns() - began_ns

    def end_batch(self) -> bool:
        """What was read since the last call belongs together; True if it took too long once too often."""
        jobs, spent_ns = self._jobs, self._spent_ns
        self._jobs = self._spent_ns = 0
        if not jobs:
            return False
        if spent_ns <= 1000 * min(BATCH_US_MAX, CALL_US + JOB_US_MAX * jobs):
            self._slow_batches = 0
            return False
        self._slow_batches += 1
        # After the break the count still stands at its maximum: one slow trial closes it again.
        if self._slow_batches < SLOW_BATCHES_MAX:
            return False
        self._closed_until_ns = self._time.monotonic_ns() + BREAK_NS
        log.warning(
            "the fields of %s jobs are not read for a minute: %.0f us a job",
            self._name,
            spent_ns / jobs / 1000,
        )
        return True

    def _read(self, payload: bytes) -> dict[str, Value] | None:
        try:
            decoded = _decode(payload)
        except msgspec.DecodeError:
            return {}
        if self._function is None:
            return usable(decoded)
        if self._marks.off(self._name):
            self.off = True
            return None
        self._marks.enter(self._number)
        try:
            found = usable(self._function(decoded))
        except BaseException:  # a user's code: it may raise anything, and nothing of it may reach a worker
            self._failed()
            return None
        finally:
            self._marks.enter(-1)
        self._recent.append(False)
        return found

    def _failed(self) -> None:
        self.errors += 1
        self._recent.append(True)
        self.off = sum(self._recent) >= ERRORS_MAX
