"""Reaps incarnations that went silent: hosts that died, workers that nobody renews any more.

A lease that has ended is not enough. After a pause, a restart or a clock step of Redis all leases are past at
once, and the first look would take every healthy worker's jobs. So a reaper also has to have watched that
very lease end for one full lease, while Redis answered, on its own steady clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tqe.board import layout
from tqe.errors import ScriptError
from tqe.steward.context import MS, Context
from tqe.store import housekeeping, settling, working
from tqe.telemetry import logs

_log = logs.get("steward")

REAPS_MAX: Final = 32  # in one pass; the next one follows within a second
PASSES_MAX: Final = 3


@dataclass(frozen=True)
class ReaperReport:
    """Incarnations that were reaped, and how many leases came back."""

    reaped: tuple[str, ...] = ()
    leases: int = 0


@dataclass
class _Watch:
    end_ms: int
    seen_ns: int = 0  # for how long this end was watched, unchanged


class Reaper:
    """Watches every lease of the shard."""

    name = "reaper"

    def __init__(self, context: Context) -> None:
        self._context = context
        self.period_s = min(1.0, context.settings.lease_ms / 5000)
        self.next_in_s: float | None = None
        self._watched: dict[str, _Watch] = {}
        self._looked_ns: int | None = None

    def run_once(self) -> ReaperReport:
        context = self._context
        found = housekeeping.leases(context.door, context.keys)
        context.note_redis_ms(found.now_ms)
        due = self._watch(found)
        reaped: list[str] = []
        leases = 0
        for incarnation in due[:REAPS_MAX]:
            returned = self._reap(incarnation, found.ends[incarnation])
            if returned is not None:
                reaped.append(incarnation)
                leases += returned
        return ReaperReport(tuple(reaped), leases)

    def _watch(self, found: housekeeping.Leases) -> list[str]:
        """Note what was seen; answers with the incarnations of which both facts hold."""
        context = self._context
        now_ns = context.clock.monotonic_ns()
        # Time in which we did not look, or Redis did not answer, is no time of watching: in it nobody could
        # renew.
        longest_ns = int(2 * self.period_s * 1e9)
        elapsed_ns = 0 if self._looked_ns is None else min(now_ns - self._looked_ns, longest_ns)
        self._looked_ns = now_ns
        before, self._watched = self._watched, {}
        spared = self._recovering()
        due = []
        for incarnation, end_ms in found.ends.items():
            watch = before.get(incarnation)
            if watch is None or watch.end_ms != end_ms:
                watch = _Watch(end_ms)
            else:
                watch.seen_ns += elapsed_ns
            self._watched[incarnation] = watch
            if (
                end_ms < found.now_ms
                and watch.seen_ns >= context.settings.lease_ms * MS
                and incarnation not in spared
            ):
                due.append(incarnation)
        return due

    def _recovering(self) -> set[str]:
        """Ids that our own recovery is about to settle exactly."""
        board = self._context.board
        dead = [name for slot in board.in_state(layout.DEAD) for name in slot.incarnations]
        return {*dead, *(board.recovery_id(slot.number) for slot in board.slots)}

    def _reap(self, incarnation: str, end_ms: int) -> int | None:
        """Take it over if its lease end is still the one that was watched; None if it is not."""
        context, settings = self._context, self._context.settings
        keys, door = context.keys, context.door
        mine = context.new_id()
        returned = 0
        for _ in range(PASSES_MAX):
            try:
                call = working.takeover(keys, incarnation, mine, settings.lease_ms, guard=str(end_ms))
                taken = working.read_takeover(door.run(call))
            except ScriptError as e:
                if e.code != "LIVE":
                    raise
                return None  # it was renewed, or another steward was faster
            if not taken.leases:
                break
            policy = settling.CrashPolicy(
                reason="reaped", reaped=True, crashes_max=settings.crashes_max, now_ms=taken.now_us // 1000
            )
            leases = housekeeping.sorted_out(door, keys, mine, taken.leases)
            settled = housekeeping.settle(
                door,
                keys,
                mine,
                settling.recover(leases, [], policy),
                result_ttl_s=settings.result_ttl_s,
                dlq_max=settings.dlq_max,
            )
            returned += settled.applied
        # If we die before this, or leases are left, our own lease ends and the next reaper goes on.
        door.run(working.leave(keys, mine))
        self._watched.pop(incarnation, None)
        context.count("reaped")
        _log.warning(f"reaped incarnation {incarnation}: its lease ended without a word", leases=returned)
        return returned
