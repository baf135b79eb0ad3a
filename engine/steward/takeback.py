"""Takes back what a worker holds behind a job that runs longer than anybody thought, so that others run it.

A worker holds a few milliseconds of predicted work; when the first of it takes seconds, the rest would wait
for it. The stop word is set, and only if the same job still runs a moment later is anything taken. So the
worker, when it comes up, meets that word before it starts anything, and takes itself over: what it holds then
is what Redis says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.steward.context import MS, Context
from tqe.store import housekeeping, settling
from tqe.telemetry import logs

_log = logs.get("steward")

LONG_MS: Final = 100  # twenty quanta: by then the prediction was wrong
# Between setting the stop word and looking whether the job still runs: two processors see each other's stores
# within a microsecond, and without this no order between the two looks is certain.
PAUSE_MS: Final = 10
AGAIN_MS: Final = 1_000  # what the worker had asked for may have come to it since the last look


@dataclass(frozen=True)
class TakeBackReport:
    """Workers that were told to look at Redis before they start anything, and leases taken back, by slot."""

    told: tuple[int, ...] = ()
    taken: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Long:
    """A job that runs for long."""

    incarnation: str
    step: int


class TakeBack:
    """The duty of taking back."""

    name = "take-back"
    period_s = 0.05

    def __init__(self, context: Context, *, long_ms: int = LONG_MS) -> None:
        self._context = context
        self._long_ms = long_ms
        self.next_in_s: float | None = None
        self._told: dict[int, tuple[_Long, int]] = {}  # slot → the job, when its worker was told
        self._seen: dict[int, tuple[_Long, int]] = {}  # slot → the job, when to look behind it again

    def run_once(self) -> TakeBackReport:
        context, now_ns = self._context, self._context.now_ns()
        told, taken = [], []
        for slot in context.live_slots():
            number, job = slot.number, self._long(slot, now_ns)
            before, since_ns = self._told.pop(number, (None, 0))
            if job is None:
                continue
            if before == job and now_ns - since_ns < PAUSE_MS * MS:
                self._told[number] = (job, since_ns)
                continue
            seen, again_ns = self._seen.get(number, (None, 0))
            if before == job:
                leases = self._take(slot, job)
                if leases:
                    taken.append((number, leases))
            elif seen == job and now_ns < again_ns:
                continue
            elif self._waits(slot, job):
                self._tell(slot)
                self._told[number] = (job, now_ns)
                told.append(number)
            self._seen[number] = (job, now_ns + AGAIN_MS * MS)
        self.next_in_s = 2 * PAUSE_MS / 1000 if self._told else None
        return TakeBackReport(tuple(told), tuple(taken))

    def _long(self, slot: SlotView, now_ns: int) -> _Long | None:
        """The job that holds its worker up. Beside coroutines none does, and a suspect runs alone."""
        step = slot.get(layout.C_IN_USER)
        if not step or slot.get(layout.C_ASYNC) or slot.get(layout.C_SUSPECT) or not slot.get(layout.C_READY):
            return None
        since_ns = self._context.sightings.since_ns(slot, step)
        names = slot.incarnations
        if since_ns is None or now_ns - since_ns < self._long_ms * MS or len(names) != 1:
            return None
        return _Long(names[0], step)

    def _tell(self, slot: SlotView) -> None:
        slot.set(layout.C_TAKEN, 1)
        if slot.get(layout.C_STOP) == layout.STOP_NONE:
            # Should the supervisor say `drain` at this very moment, it says it again soon.
            slot.set(layout.C_STOP, layout.STOP_RESYNC)

    def _waits(self, slot: SlotView, job: _Long) -> bool:
        """Whether the worker has leases of which something was not started."""
        context = self._context
        names = housekeeping.lease_names(context.door, context.keys, job.incarnation)
        rows = slot.rows(records=False)
        return any(settling.unstarted(rows, name) for name in names)

    def _take(self, slot: SlotView, job: _Long) -> int:
        context, settings = self._context, self._context.settings
        leases = housekeeping.leases_of(context.door, context.keys, job.incarnation)
        rows = slot.rows(records=False)
        # Last of all: as long as this job runs, nothing of what was just read can have changed, and the stop
        # word stands before whatever is started next.
        if self._long(slot, context.now_ns()) != job or slot.get(layout.C_STOP) == layout.STOP_NONE:
            return 0
        batch = settling.take_back(leases, rows)
        if not batch:
            return 0
        settled = housekeeping.settle(
            context.door,
            context.keys,
            job.incarnation,
            batch,
            result_ttl_s=settings.result_ttl_s,
            dlq_max=settings.dlq_max,
            recovered=False,
        )
        context.count("taken_back", settled.applied)
        worker = slot.get(layout.C_NUMBER)
        _log.info(f"worker {worker} is held up: {settled.applied} leases behind its job go to others")
        return settled.applied
