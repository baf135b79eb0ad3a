"""Matches cancel requests with what runs on this host, and marks it on the board for worker and supervisor.

A job that waits is cancelled by whoever fetches it. One that runs is known by the board alone: a coroutine
is cancelled by its worker, a job inside user code is interrupted by the supervisor's signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.job import job_id
from tqe.steward.context import Context
from tqe.store import housekeeping

SLICES_MAX: Final = 10  # of requests that are looked at in one pass
AGAIN_S: Final = 0.1  # between two marks of one worker: it has one place for them


@dataclass(frozen=True)
class CancelReport:
    """Jobs that were marked, by slot."""

    marked: dict[int, str]


class Canceller:
    """The cancel duty."""

    name = "cancel"
    period_s = 1.0

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None
        self._told: dict[str, int] = {}  # job → how often it was marked: the one marked least comes next

    def run_once(self) -> CancelReport:
        context = self._context
        self.next_in_s = None
        if not housekeeping.any_cancels(context.door, context.keys):
            self._told.clear()
            return CancelReport({})
        wanted = self._wanted()
        marked = {}
        matched: set[str] = set()
        for slot in context.live_slots():
            jobs = self._matches(slot, wanted)
            matched |= jobs.keys()
            if not jobs:
                slot.set(layout.C_CANCEL_ROW, 0)  # what it named is over; its row may be another's soon
                continue
            name = min(jobs, key=lambda job: (self._told.get(job, 0), job))
            self._mark(slot, name, *jobs[name])
            marked[slot.number] = name
            if len(jobs) > 1:
                self.next_in_s = AGAIN_S
        self._told = {name: count for name, count in self._told.items() if name in matched}
        return CancelReport(marked)

    def _wanted(self) -> dict[bytes, set[int]]:
        context = self._context
        wanted: dict[bytes, set[int]] = {}
        cursor = 0
        for _ in range(SLICES_MAX):
            cursor, found = housekeeping.cancels(context.door, context.keys, cursor)
            wanted |= found
            if not cursor:
                break
        return wanted

    def _matches(
        self, slot: SlotView, wanted: dict[bytes, set[int]]
    ) -> dict[str, tuple[int, int, bytes, int]]:
        """Running jobs that somebody wants cancelled: job id → row, index, frame id, step (0: not in user
        code)."""
        step = slot.get(layout.C_IN_USER)
        current = (slot.get(layout.C_ROW), slot.get(layout.C_INDEX)) if step else None
        found = {}
        for row in slot.rows(records=False):
            for index in wanted.get(row.frame_id, ()):
                at = index - row.first
                if 0 <= at < len(row.states) and row.states[at] == layout.JOB_STARTED:
                    here = (row.number, index) == current and slot.get(layout.C_IN_USER) == step
                    found[job_id(row.frame_id, index)] = (
                        row.number,
                        index,
                        row.frame_id,
                        step if here else 0,
                    )
        return found

    def _mark(self, slot: SlotView, name: str, row: int, index: int, frame_id: bytes, step: int) -> None:
        self._told[name] = self._told.get(name, 0) + 1
        # The row word is what readers look for, so it goes last.
        slot.set(layout.C_CANCEL_ROW, 0)
        slot.set_text(layout.C_CANCEL_ID, frame_id.decode("ascii", "replace"))
        slot.set(layout.C_CANCEL_STEP, step)
        slot.set(layout.C_CANCEL_ROW, (row + 1) << 32 | index)
        self._context.count("cancel_marks")
