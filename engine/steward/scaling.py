"""Decides how many workers this host should run: enough to finish what waits within the target, and no fewer
than are busy.

Up at once, since a backlog costs every job behind it. Down slowly: never before the target time has passed in
which nobody was missed, and then a quarter at a time, because a worker that is let go too early is started
again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.steward.context import Context, Scaling
from tqe.store.backlog import Backlog
from tqe.telemetry import logs

BUSY_MAX: Final = 0.8  # of their time that the workers that stay may be busy: a steady load lets nobody go
BUSY_SHARE: Final = 0.3  # what the newest look counts in how many are busy

_log = logs.get("steward")


class Bounds(NamedTuple):
    """What was configured; the target in seconds."""

    fewest: int
    most: int
    target_s: float


class Load(NamedTuple):
    """What a decision goes by. `backlog_s`: predicted work that waits, for all hosts. `busy`: workers of this
    host that are at work on average, `here` how many it has, `everywhere` how many there are."""

    backlog_s: float
    busy: float
    here: int = 1
    everywhere: int = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of workers and why. `calm_since_s`: since when fewer would do, None if they would not."""

    workers: int
    reason: str = "least"  # one of metrics.SCALE_REASONS
    text: str = "nothing was measured yet"
    calm_since_s: float | None = None


def decide(load: Load, bounds: Bounds, before: Decision, now_s: float) -> Decision:
    """The next decision; `now_s` is any clock that only goes forward.

    Each host takes the part of the backlog that it has of the workers, so that hosts that scale by the same
    backlog do not all start the workers that one of them is to start.
    """
    part = max(1, load.here) / max(1, load.here, load.everywhere)
    backlog_s = load.backlog_s * part
    need = math.ceil(backlog_s / bounds.target_s)
    have = before.workers
    work = f"{backlog_s:,.0f}" if backlog_s >= 100 else f"{backlog_s:.3g}"
    waits = f"{work} s of work wait, and are to be finished in {bounds.target_s:g} s"
    if min(need, bounds.most) > have:
        capped = f", which takes {need}" if need > bounds.most else ""
        return Decision(min(need, bounds.most), "most" if capped else "backlog", f"{waits}{capped}")
    busy = math.ceil(load.busy / BUSY_MAX)
    floor = min(bounds.most, max(bounds.fewest, need, min(busy, have)))
    if floor >= have:
        if need > have:
            return Decision(floor, "most", f"{waits}, which takes {need}")
        if need == have and need > bounds.fewest:
            return Decision(floor, "backlog", waits)
        if busy >= have > bounds.fewest:
            return Decision(floor, "busy", f"{load.busy:.1f} are busy")
        return Decision(floor, "least", f"{waits}: the fewest are enough" if need else "no work waits")
    since_s = now_s if before.calm_since_s is None else before.calm_since_s
    if now_s - since_s < bounds.target_s:
        return Decision(have, "calm", f"{floor} have been enough for {now_s - since_s:.0f} s", since_s)
    workers = max(floor, have - max(1, have // 4))
    return Decision(workers, "idle", f"{floor} have been enough for {now_s - since_s:.0f} s", now_s)


class Scaler:
    """Follows the backlog, and tells the supervisor by a word on the board."""

    def __init__(self, context: Context, fewest: int, most: int) -> None:
        self._context = context
        self._bounds = Bounds(fewest, most, context.settings.drain_target_ms / 1000)
        # A steward that was replaced goes on from what its predecessor had decided.
        self._last = Decision(context.board.get(layout.H_WANTED) or fewest)
        self._busy = 0.0

    def follow(self, backlog: Backlog) -> Decision:
        """Decide by what waits now."""
        context = self._context
        slots = context.live_slots()
        busy = sum(_busy(slot, context.settings.concurrency) for slot in slots)
        self._busy += BUSY_SHARE * (busy - self._busy)
        here = sum(1 for slot in slots if slot.incarnations)
        load = Load(backlog.seconds, self._busy, here, backlog.workers)
        before, self._last = self._last, decide(load, self._bounds, self._last, context.now_ns() / 1e9)
        self._tell(before, self._last)
        return self._last

    def _tell(self, before: Decision, now: Decision) -> None:
        context, more = self._context, now.workers - before.workers
        context.board.set(layout.H_WANTED, now.workers)
        context.scaling = Scaling(now.workers, self._bounds.fewest, self._bounds.most, now.reason, now.text)
        if more:
            context.count("scaled_up" if more > 0 else "scaled_down", abs(more))
            _log.info(
                f"autoscale: {before.workers} -> {now.workers} workers, as {now.text}", reason=now.reason
            )


def _busy(slot: SlotView, concurrency: int) -> float:
    """How much of a worker is in use."""
    return 1.0 if slot.get(layout.C_IN_USER) else min(1.0, slot.get(layout.C_ASYNC) / concurrency)
