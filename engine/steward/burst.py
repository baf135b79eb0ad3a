"""Finds out, in burst mode, that no job is left, and says so to the supervisor."""

from __future__ import annotations

from dataclasses import dataclass

from tqe.board import layout
from tqe.steward.context import Context
from tqe.store import housekeeping


@dataclass(frozen=True)
class BurstReport:
    """Whether nothing was found this time, and whether that was said to the supervisor."""

    quiet: bool
    done: bool


class Burst:
    """The burst duty: two quiet looks in a row, since a lease may change hands while the first one lists
    them."""

    name = "burst"
    period_s = 0.3

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None
        self._quiet_before = False

    def run_once(self) -> BurstReport:
        context = self._context
        quiet = housekeeping.is_quiet(context.door, context.keys, context.settings.lanes)
        done = quiet and self._quiet_before
        self._quiet_before = quiet
        if done:
            context.board.set(layout.H_BURST_DONE, 1)
        return BurstReport(quiet, done)
