"""Owns what may be known of a payload when a duration is learnt or predicted: its numbers and short texts.

The same function serves capture and scoring, so that a model sees when it predicts what it saw when it was
trained.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tqe.registry import Features

FIELDS_MAX: Final = 24
NAME_CHARS_MAX: Final = 64
TEXT_CHARS_MAX: Final = 64
# A longer payload is not decoded for its fields: that would cost more than the order can win.
PAYLOAD_BYTES_MAX: Final = 16 * 1024
# A task's own function that fails so often in its last so many calls is not called any more.
CALLS: Final = 100
ERRORS_MAX: Final = 5

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


class Fields:
    """The fields of one task's jobs. A function of the task's own is tried for each job: whatever it raises
    costs that job its score, never the job."""

    __slots__ = ("_function", "_recent", "errors", "off")

    def __init__(self, function: Features | None = None) -> None:
        self._function = function
        self._recent: deque[bool] = deque(maxlen=CALLS)
        self.errors = 0
        self.off = False  # until the process ends

    def __call__(self, payload: bytes) -> dict[str, Value] | None:
        """The fields of a payload (JSON); None if the task's own function failed, now or too often."""
        if self.off:
            return None
        if len(payload) > PAYLOAD_BYTES_MAX:
            return {}
        try:
            decoded = _decode(payload)
        except msgspec.DecodeError:
            return {}
        if self._function is None:
            return usable(decoded)
        try:
            found = usable(self._function(decoded))
        except BaseException:  # a user's code: it may raise anything, and nothing of it may reach a worker
            self._failed()
            return None
        self._recent.append(False)
        return found

    def _failed(self) -> None:
        self.errors += 1
        self._recent.append(True)
        self.off = sum(self._recent) >= ERRORS_MAX
