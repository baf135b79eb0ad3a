"""Audits what scripts keep as a cache or by convention: depths of lanes, and hashes that nobody answers
for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tqe import codec
from tqe.errors import FrameError
from tqe.steward.context import Context
from tqe.store import housekeeping
from tqe.store.housekeeping import Look, Part
from tqe.telemetry import logs

_log = logs.get("steward")

AFTER_S: Final = (
    600.0  # a part that has not been empty for so long is counted; an empty one is exact by itself
)
AGAIN_S: Final = 600.0
SLICES_MAX: Final = 4  # in one pass
COUNT_FRAMES_MAX: Final = 20_000  # of one part: to count more would move gigabytes


@dataclass(frozen=True)
class AuditReport:
    """Depths that were corrected (field → jobs), and hashes that were given back to the reaper."""

    corrected: dict[str, int] = field(default_factory=dict)
    orphans: tuple[str, ...] = ()


@dataclass
class _Count:
    """A count under way: valid only if nothing moved since its first slice."""

    part: Part
    first: Look
    jobs: int = 0
    frames: int = 0


class Auditor:
    """The audit duty."""

    name = "audit"
    period_s = 5.0

    def __init__(self, context: Context, *, after_s: float = AFTER_S, again_s: float = AGAIN_S) -> None:
        self._context = context
        self._after_ns = int(after_s * 1e9)
        self._again_ns = int(again_s * 1e9)
        self.next_in_s: float | None = None
        self._filled_ns: dict[str, int] = {}  # field → since when it was never seen empty
        self._counted_ns: dict[str, int] = {}
        self._count: _Count | None = None
        self._cursor = 0
        self._suspects: set[str] = set()

    def run_once(self) -> AuditReport:
        corrected = self._depths()
        orphans = self._orphans()
        self.next_in_s = 0.2 if self._count is not None else None
        return AuditReport(corrected, orphans)

    # -- depths

    def _depths(self) -> dict[str, int]:
        context = self._context
        now_ns = context.clock.monotonic_ns()
        lanes = {*context.lanes, *housekeeping.depth_lanes(context.door, context.keys)}
        corrected: dict[str, int] = {}
        for part in housekeeping.parts(context.keys, sorted(lanes)):
            seen = housekeeping.look(context.door, context.keys, part, frames=1)
            if seen.frames:
                self._filled_ns.setdefault(part.field, now_ns)
                continue
            self._filled_ns.pop(part.field, None)
            # An empty part whose depth says otherwise: nobody serves that lane, or it is paused.
            if seen.depth and housekeeping.correct_depth(context.door, context.keys, part, seen, 0):
                self._told(corrected, part, seen, 0)
        if self._count is None:
            self._count = self._next(sorted(lanes), now_ns)
        if self._count is not None:
            self._go_on(self._count, corrected, now_ns)
        return corrected

    def _next(self, lanes: list[str], now_ns: int) -> _Count | None:
        context = self._context
        for part in housekeeping.parts(context.keys, lanes):
            since_ns = self._filled_ns.get(part.field)
            counted_ns = self._counted_ns.get(part.field)
            if since_ns is None or now_ns - since_ns < self._after_ns:
                continue
            if counted_ns is not None and now_ns - counted_ns < self._again_ns:
                continue
            self._counted_ns[part.field] = now_ns
            first = housekeeping.look(context.door, context.keys, part, frames=1)
            if 0 < first.frames <= COUNT_FRAMES_MAX:
                return _Count(part, first)
        return None

    def _go_on(self, count: _Count, corrected: dict[str, int], now_ns: int) -> None:
        context = self._context
        for _ in range(SLICES_MAX):
            seen = housekeeping.look(context.door, context.keys, count.part, count.frames)
            if (seen.depth, seen.frames) != (count.first.depth, count.first.frames):
                self._count = None  # it moves: no count can be right; the next one is due in a while
                return
            count.frames += len(seen.slice)
            count.jobs += sum(_jobs(frame) for frame in seen.slice)
            if count.frames >= seen.frames or not seen.slice:
                self._count = None
                if count.jobs != seen.depth and housekeeping.correct_depth(
                    context.door, context.keys, count.part, seen, count.jobs
                ):
                    self._told(corrected, count.part, seen, count.jobs)
                return

    def _told(self, corrected: dict[str, int], part: Part, seen: Look, jobs: int) -> None:
        corrected[part.field] = jobs
        self._context.count("depth_corrections")
        _log.warning(f"the depth of {part.field} was {seen.depth} and is {jobs}: corrected")

    # -- orphans

    def _orphans(self) -> tuple[str, ...]:
        """A hash whose incarnation is not registered (a failover, an operator's ZREM) would stay for ever."""
        context = self._context
        self._cursor, met = housekeeping.scan_in_flight(context.door, context.keys, self._cursor)
        silent = set(housekeeping.unregistered(context.door, context.keys, sorted({*met, *self._suspects})))
        known = {name for slot in context.board.slots for name in slot.incarnations}
        # Seen twice: between the two looks a takeover may have been under way.
        found = sorted((silent & self._suspects) - known)
        self._suspects = silent - set(found)
        now_ms = housekeeping.redis_now_ms(context.door) if found else 0
        given = tuple(
            one for one in found if housekeeping.register_orphan(context.door, context.keys, one, now_ms)
        )
        for one in given:
            context.count("orphans")
            _log.warning(
                f"incarnation {one} holds leases and is not registered: it is reaped after one lease"
            )
        return given


def _jobs(frame: bytes) -> int:
    try:
        return codec.peek(frame).n
    except FrameError:
        return 0
