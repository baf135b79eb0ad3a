"""Puts delayed frames into their lanes when they are due, and parked ones when this version understands
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tqe import codec
from tqe.errors import FrameError
from tqe.steward.context import Context
from tqe.store import housekeeping
from tqe.telemetry import logs

_log = logs.get("steward")

BATCHES_MAX: Final = 20  # in one pass: other duties want their turn, a storm of delayed jobs takes several
LATEST_S: Final = 0.2  # the longest time until the next look: a retry may become due before all that was seen
SOONEST_S: Final = 0.01


@dataclass(frozen=True)
class PromoteReport:
    """Jobs and frames that entered their lanes."""

    jobs: int = 0
    frames: int = 0


class Delayed:
    """The promote duty."""

    name = "promote"
    period_s = LATEST_S

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None

    def run_once(self) -> PromoteReport:
        context = self._context
        jobs = frames = 0
        self.next_in_s = None
        for _ in range(BATCHES_MAX):
            call = housekeeping.promote(context.keys, list(context.lanes))
            reply = housekeeping.read_promote(context.door.run(call))
            context.note_redis_ms(reply.now_us // 1000)
            jobs, frames = jobs + reply.jobs, frames + reply.frames
            # Another configuration may submit to lanes that we do not serve: their frames are due all the
            # same.
            learnt = [lane for lane in reply.missing if context.learn_lane(lane)]
            if not reply.frames and not learnt:
                self._rest(reply)
                break
        else:
            self.next_in_s = 0.0  # there is more
        context.count("promoted", jobs)
        return PromoteReport(jobs, frames)

    def _rest(self, reply: housekeeping.Promoted) -> None:
        if reply.next_due_ms:
            left_s = (reply.next_due_ms - reply.now_us / 1000) / 1000
            self.next_in_s = min(LATEST_S, max(SOONEST_S, left_s))


@dataclass(frozen=True)
class UnparkReport:
    """Frames that returned to their lanes, and those that are still parked."""

    moved: int = 0
    left: int = 0


class Unparker:
    """The unpark duty."""

    name = "unpark"
    period_s = 10.0

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None
        self._told = 0

    def run_once(self) -> UnparkReport:
        context = self._context
        for frame in housekeeping.parked_head(context.door, context.keys):
            try:
                context.learn_lane(codec.peek(frame).lane)
            except FrameError:
                continue  # still of a version that is not ours
        call = housekeeping.unpark(context.keys, list(context.lanes))
        moved, left = context.door.run(call)
        if moved:
            _log.info(f"{moved} parked frames went back to their lanes", left=left)
        if left > self._told:
            _log.warning(f"{left} frames of another version are parked: upgrade the workers to run them")
        self._told = left
        # As long as they come back there may be more of them.
        self.next_in_s = 0.0 if moved and left else None
        return UnparkReport(moved, left)
