"""Time limits and cancels of running jobs: decides whom to interrupt and whom to kill, from the board alone.

A worker writes no clock: it counts its entries into user code, and each is dated here by its own first
sight, at most one poll late. So limits cost the hot path nothing, and a limit is never early.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from tqe.board import layout
from tqe.board.board import SlotView

REPEAT_NS: Final = 1_000_000_000  # raised inside __del__ it vanishes, so it is sent again each second
_MS: Final = 1_000_000


class Act(Enum):
    """What is to be done to a worker."""

    INTERRUPT = "interrupt"
    KILL = "kill"


class Verdict(NamedTuple):
    """An act for the step that it is meant for; `condemn` is a layout.CONDEMN_* kind."""

    act: Act
    step: int
    condemn: int


@dataclass(slots=True)
class _Sight:
    step: int
    since_ns: int
    told_ns: int | None = None
    told_kind: int = layout.CONDEMN_NONE


class Limits:
    """Remembers when each worker's present step was first seen."""

    def __init__(self) -> None:
        self._sights: dict[int, _Sight] = {}

    def forget(self, slot: SlotView) -> None:
        """The slot's life has ended."""
        self._sights.pop(slot.number, None)

    def look(self, slot: SlotView, now_ns: int) -> Verdict | None:
        """What a live worker's present step has deserved, if anything. Called at each poll."""
        step = slot.get(layout.C_IN_USER)
        if not step:
            self._sights.pop(slot.number, None)
            return None
        soft_ms, hard_ms = slot.get(layout.C_TIMEOUT_MS), slot.get(layout.C_HARD_MS)
        cancelled = is_cancelled(slot, step)
        if slot.get(layout.C_IN_USER) != step:
            return None  # it went on while we read: the words may be another job's
        sight = self._sights.get(slot.number)
        if sight is None or sight.step != step:
            sight = self._sights[slot.number] = _Sight(step, now_ns)
        age_ns = now_ns - sight.since_ns
        if hard_ms and age_ns >= hard_ms * _MS:
            return Verdict(Act.KILL, step, layout.CONDEMN_NONE)
        if soft_ms and age_ns >= soft_ms * _MS:
            return _due(sight, layout.CONDEMN_SOFT, now_ns)
        if cancelled:
            return _due(sight, layout.CONDEMN_CANCEL, now_ns)
        return None


def is_cancelled(slot: SlotView, step: int) -> bool:
    """Whether the steward's cancel word names this very step.

    By step and not by row alone: a row is used again, and the next job in it must not be hit.
    """
    word = slot.get(layout.C_CANCEL_ROW)
    return (
        bool(word)
        and slot.get(layout.C_CANCEL_STEP) == step
        and (word >> 32) - 1 == slot.get(layout.C_ROW)
        and word & 0xFFFFFFFF == slot.get(layout.C_INDEX)
    )


def _due(sight: _Sight, kind: int, now_ns: int) -> Verdict | None:
    """The first time at once, then each second, and at once when the reason changes."""
    if sight.told_ns is not None and sight.told_kind == kind and now_ns - sight.told_ns < REPEAT_NS:
        return None
    sight.told_ns, sight.told_kind = now_ns, kind
    return Verdict(Act.INTERRUPT, sight.step, kind)
