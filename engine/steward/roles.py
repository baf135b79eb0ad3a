"""Keeps the loop of one worker of this host free for coroutines while synchronous jobs come as well.

Without it all workers may be in long synchronous jobs, inline, when the next coroutine comes: it waits for
one of them. What comes is seen on the board: it costs no look at Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.steward.context import MS, Context

LOOK_SHARE: Final = 0.02  # what the newest look counts: ten a second, so five seconds are remembered
# Of the looks, those at which a kind ran: from here on it comes, and below that no more.
COMES: Final = 0.05
ENDS: Final = 0.01
UNTIL_MS: Final = 2_000  # what is not renewed is void after that


class Kinds(NamedTuple):
    """At which part of the last looks a job of this kind ran. Synchronous ones that run between two steps of
    coroutines are short, hold up nobody, and are not counted."""

    sync: float = 0.0
    coroutines: float = 0.0


class Seen(NamedTuple):
    """A worker as a look finds it: `coroutines` that run, and whether its loop is kept free already."""

    slot: int
    coroutines: int
    free: bool = False


@dataclass(frozen=True, slots=True)
class RolesReport:
    """The slot whose loop is kept free from now on."""

    free: int | None = None


def after(before: Kinds, *, sync: bool, coroutines: bool) -> Kinds:
    """What comes, after a look at which these kinds ran."""
    return Kinds(
        before.sync + LOOK_SHARE * (sync - before.sync),
        before.coroutines + LOOK_SHARE * (coroutines - before.coroutines),
    )


def decide(workers: Sequence[Seen], kinds: Kinds) -> int | None:
    """The slot whose loop is to be kept free: the same as before, else one with coroutines.

    A single worker keeps to what it has: off its loop its synchronous jobs would only be slower.
    """
    least = ENDS if any(worker.free for worker in workers) else COMES
    if len(workers) < 2 or min(kinds) < least:
        return None
    return min(workers, key=lambda w: (not w.free, -w.coroutines, w.slot)).slot


class Roles:
    """The duty of keeping a loop free."""

    name = "roles"
    period_s = 0.1

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None
        # A steward that was replaced goes on from what its predecessor had decided.
        held = any(self._is_free(slot) for slot in context.live_slots())
        self._kinds = Kinds(1.0, 1.0) if held else Kinds()

    def run_once(self) -> RolesReport:
        slots = {slot.number: slot for slot in self._context.live_slots() if _works(slot)}
        workers = [Seen(number, _coroutines(slot), self._is_free(slot)) for number, slot in slots.items()]
        self._kinds = after(
            self._kinds,
            sync=any(_runs_sync(slot) for slot in slots.values()),
            coroutines=any(worker.coroutines for worker in workers),
        )
        free = decide(workers, self._kinds)
        until_ns = self._context.now_ns() + UNTIL_MS * MS
        for number, slot in slots.items():
            slot.set(layout.C_APART_UNTIL, until_ns if number == free else 0)
        return RolesReport(free)

    def _is_free(self, slot: SlotView) -> bool:
        return slot.get(layout.C_APART_UNTIL) > self._context.now_ns()


def _works(slot: SlotView) -> bool:
    goes_on = slot.get(layout.C_STOP) in (layout.STOP_NONE, layout.STOP_RESYNC)
    return goes_on and slot.get(layout.C_READY) != 0


def _coroutines(slot: SlotView) -> int:
    return max(0, slot.get(layout.C_ASYNC) - (1 if slot.get(layout.C_HELPER) else 0))


def _runs_sync(slot: SlotView) -> bool:
    return bool(slot.get(layout.C_HELPER) or (slot.get(layout.C_IN_USER) and not slot.get(layout.C_ASYNC)))
