"""Notices that jobs wait, workers could take them, and nobody does: what no single part can see of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.steward.context import Context
from tqe.store import housekeeping
from tqe.telemetry import logs

_log = logs.get("steward")

AFTER_S: Final = 10.0  # an idle worker looks at its lanes each second


@dataclass(frozen=True)
class WatchReport:
    """How long jobs have waited although somebody was free, in seconds, and whether that is too long."""

    stalled_s: float
    not_consuming: bool


class Watchdog:
    """The watch duty."""

    name = "watch"
    period_s = 2.0

    def __init__(self, context: Context, *, after_s: float = AFTER_S) -> None:
        self._context = context
        self._after_s = after_s
        self.next_in_s: float | None = None
        self._fetched = -1
        self._since_ns: int | None = None

    def run_once(self) -> WatchReport:
        context = self._context
        now_ns = context.now_ns()
        fetched = sum(slot.counters()["fetched"] for slot in context.board.lives())
        moved, self._fetched = fetched != self._fetched, fetched
        if moved or not self._somebody_is_free() or not self._jobs_wait():
            self._since_ns = None
        elif self._since_ns is None:
            self._since_ns = now_ns
        stalled_s = 0.0 if self._since_ns is None else (now_ns - self._since_ns) / 1e9
        self._tell(stalled_s >= self._after_s, stalled_s)
        return WatchReport(stalled_s, context.not_consuming)

    def _jobs_wait(self) -> bool:
        context = self._context
        return housekeeping.frames_wait(context.door, context.keys, context.settings.lanes)

    def _somebody_is_free(self) -> bool:
        """Or nobody is there at all, and should be."""
        live = self._context.live_slots()
        return not live or any(_free(slot) for slot in live)

    def _tell(self, not_consuming: bool, stalled_s: float) -> None:
        context = self._context
        if not_consuming and not context.not_consuming:
            _log.error(
                f"jobs have waited for {stalled_s:.0f} s and no worker takes them, although one is free:"
                " see `tqe doctor` and the lines above"
            )
        elif context.not_consuming and not not_consuming:
            _log.info("the workers take jobs again")
        context.not_consuming = not_consuming


def _free(slot: SlotView) -> bool:
    busy = slot.get(layout.C_IN_USER) or slot.get(layout.C_ASYNC)
    return not busy and slot.get(layout.C_STOP) not in (layout.STOP_DRAIN, layout.STOP_NOW)
