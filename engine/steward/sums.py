"""Sums what this host's workers have counted on the board, over all of their lives."""

from __future__ import annotations

import time
from typing import Final

from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.telemetry.metrics import TaskSample

_OUTCOMES: Final = {
    "completed": layout.T_COMPLETED,
    "failed": layout.T_FAILED,
    "retried": layout.T_RETRIED,
    "dead": layout.T_DEAD,
}
_TRIES: Final = 20  # to find a moment in which the supervisor moves no counters

Counted = tuple[dict[str, int], dict[str, TaskSample]]


class Sums:
    """The sums of one board. Each reader needs its own: one that finds no quiet moment tells what it told
    before."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._counted: Counted = ({}, {})

    def read(self) -> Counted:
        """Counters by name, and tasks by theirs."""
        board = self._board
        for _ in range(_TRIES):
            before = board.get(layout.H_RETIRING)
            found = None if before & 1 else _sum_up(board.lives())
            if found is not None and board.get(layout.H_RETIRING) == before:
                counters, tasks = found
                self._counted = counters, {name: _task(words) for name, words in tasks.items()}
                break
            time.sleep(0.001)
        return self._counted


def _sum_up(lives: list[SlotView]) -> tuple[dict[str, int], dict[str, list[int]]]:
    counters: dict[str, int] = {}
    tasks: dict[str, list[int]] = {}
    for slot in lives:
        for name, value in slot.counters().items():
            if name not in layout.GAUGES:
                counters[name] = counters.get(name, 0) + value
        for name, block in slot.tasks():
            words = block.tolist()
            known = tasks.get(name)
            tasks[name] = words if known is None else [a + b for a, b in zip(known, words, strict=True)]
    return counters, tasks


def _task(words: list[int]) -> TaskSample:
    def at(offset: int) -> int:
        return words[offset // layout.WORD]

    def bins(offset: int) -> list[int]:
        return words[offset // layout.WORD : offset // layout.WORD + layout.BINS]

    return TaskSample(
        outcomes={name: at(offset) for name, offset in _OUTCOMES.items()},
        run_bins=bins(layout.T_RUN_BINS),
        run_sum_s=at(layout.T_SUM_NS) / 1e9,
        wait_bins=bins(layout.T_WAIT_BINS),
        wait_sum_s=at(layout.T_WAIT_SUM_US) / 1e6,
    )
