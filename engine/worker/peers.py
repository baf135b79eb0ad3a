"""What a worker sees on the board of the other workers of its host."""

from __future__ import annotations

from collections.abc import Iterator

from tqe import clock
from tqe.board import layout
from tqe.board.board import Board, SlotView


class Peers:
    """The other workers of one board. What they do may have changed a moment later: it is only advice, but
    for the word that suspects use."""

    def __init__(self, board: Board, view: SlotView) -> None:
        self._others = [slot for slot in board.slots if slot.number != view.number]

    def idle(self) -> bool:
        """Whether one of them waits for work, and could start anything at once."""
        return any(
            slot.get(layout.C_PHASE) == layout.PHASE_IDLE and not slot.get(layout.C_ASYNC)
            for slot in self._working()
        )

    def takes_sync(self) -> bool:
        """Whether one of them could run a synchronous job on its main thread: it has no coroutines, and its
        loop is not kept free for them."""
        now_ns = clock.boottime_ns()
        return any(
            not slot.get(layout.C_ASYNC)
            and slot.get(layout.C_APART_UNTIL) <= now_ns
            and slot.get(layout.C_PHASE) in (layout.PHASE_IDLE, layout.PHASE_BUSY)
            for slot in self._working()
        )

    def suspect_at_work(self) -> bool:
        """Whether one of them runs a suspect, or is about to."""
        return any(slot.get(layout.C_SUSPECT) for slot in self._others if _lives(slot))

    def _working(self) -> Iterator[SlotView]:
        return (
            slot
            for slot in self._others
            if _lives(slot)
            and slot.get(layout.C_READY)
            and not slot.get(layout.C_STOP)
            and not slot.get(layout.C_SUSPECT)
        )


def _lives(slot: SlotView) -> bool:
    return slot.get(layout.C_STATE) == layout.LIVE
