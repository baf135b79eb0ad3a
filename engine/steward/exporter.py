"""Takes the sample that `/metrics` shows: this host's board as it is now, Redis' totals as last read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.steward.context import Context
from tqe.steward.sums import Sums
from tqe.store import housekeeping
from tqe.store.backlog import Backlog
from tqe.telemetry import metrics


@dataclass
class Climb:
    """Totals that never fall. A Redis that lost its last second, or everything, goes on from a lower number:
    Prometheus would take that for a new start, and count all that is left once more. What was lost stands on
    the board: the next steward goes on from there."""

    board: Board

    def take(self, read: Mapping[str, int]) -> dict[str, int]:
        """What to show for what was read."""
        board, shown = self.board, {}
        for at, name in enumerate(metrics.TOTALS):
            last = layout.H_CLIMB + 2 * layout.WORD * at
            lost, now = last + layout.WORD, max(0, read.get(name, 0))
            if now < board.get(last):
                # If we die here the next steward adds it once more: too high, and never falling.
                board.set(lost, board.get(lost) + board.get(last) - now)
            board.set(last, now)
            shown[name] = now + board.get(lost)
        return shown


@dataclass(frozen=True)
class TotalsReport:
    """What was read."""

    totals: housekeeping.Totals


class TotalsReader:
    """The duty that reads the totals; scrapes never wait for Redis."""

    name = "totals"
    period_s = 1.0

    def __init__(self, context: Context) -> None:
        self._context = context
        self._climb = Climb(context.board)
        self.next_in_s: float | None = None
        self.read_ns: int | None = None
        self.latency_s = 0.0

    def run_once(self) -> TotalsReport:
        context = self._context
        asked_ns = context.now_ns()
        incarnations = [name for slot in context.live_slots() for name in slot.incarnations]
        totals = housekeeping.totals(context.door, context.keys, context.settings.lanes, incarnations)
        self.read_ns = context.now_ns()
        self.latency_s = (self.read_ns - asked_ns) / 1e9
        context.totals = totals._replace(stats=self._climb.take(totals.stats))
        return TotalsReport(context.totals)

    def sample(self, *, redis_up: bool, now_ns: int) -> metrics.QueueSample | None:
        """What was read last, as it is shown; None before that."""
        totals, read_ns = self._context.totals, self.read_ns
        if totals is None or read_ns is None:
            return None
        return queue_sample(
            totals,
            redis_up=redis_up,
            age_s=(now_ns - read_ns) / 1e9,
            latency_s=self.latency_s,
            backlog=self._context.backlog,
        )


def queue_sample(
    totals: housekeeping.Totals,
    *,
    redis_up: bool = True,
    age_s: float = 0.0,
    latency_s: float = 0.0,
    backlog: Backlog | None = None,
) -> metrics.QueueSample:
    """The queue's part of a page, of totals that were read `age_s` ago."""
    work = {} if backlog is None else backlog.lanes
    return metrics.QueueSample(
        lanes={
            name: metrics.LaneSample(
                queued,
                in_order,
                oldest_s=max(0.0, (totals.now_us - totals.oldest_us[name]) / 1e6 + age_s)
                if name in totals.oldest_us
                else 0.0,
                paused=name in totals.paused,
                backlog_s=work[name].seconds if name in work else None,
                mode=totals.standing.modes.get(name),
            )
            for name, (queued, in_order) in totals.lanes.items()
        },
        scheduled=totals.scheduled,
        dead=totals.dead,
        quarantined=totals.quarantined,
        parked=totals.parked,
        totals=totals.stats,
        redis_up=redis_up,
        age_s=age_s,
        latency_s=latency_s,
        rung=totals.standing.rung,
        chosen=totals.standing.chosen,
    )


class Exporter:
    """Builds the sample. Called from the thread that serves the page: it only reads words and whole
    objects."""

    def __init__(
        self,
        context: Context,
        reader: TotalsReader,
        duties: Callable[[], Mapping[str, metrics.DutySample]] = dict,
        redis_up: Callable[[], bool] = lambda: True,
    ) -> None:
        self._context = context
        self._reader = reader
        self._duties = duties
        self._redis_up = redis_up
        self._sums = Sums(context.board)

    def sample(self) -> metrics.Sample:
        context, totals, now_ns = self._context, self._context.totals, self._context.now_ns()
        counters, tasks = self._sums.read()
        return metrics.Sample(
            queue=self._reader.sample(redis_up=self._redis_up(), now_ns=now_ns),
            workers=[self._worker(slot, now_ns) for slot in context.live_slots()],
            procs=context.settings.procs if context.scaling is None else context.scaling.workers,
            scale_reason=None if context.scaling is None else context.scaling.reason,
            leases=sum(totals.leases.values()) if totals else 0,
            not_consuming=context.not_consuming,
            counters=counters,
            tasks=tasks,
            duties=self._duties(),
            host=context.board.counted(),
        )

    def _worker(self, slot: SlotView, now_ns: int) -> metrics.WorkerSample:
        step, phase = slot.get(layout.C_IN_USER), slot.get(layout.C_PHASE)
        since_ns = self._context.sightings.since_ns(slot, step) if step else None
        return metrics.WorkerSample(
            number=slot.get(layout.C_NUMBER),
            state=layout.PHASES[phase] if phase < len(layout.PHASES) else "unknown",
            active=slot.get(layout.C_ASYNC) or (1 if step else 0),
            running_s=None if since_ns is None else max(0.0, (now_ns - since_ns) / 1e9),
            loop_lag_s=slot.counters()["loop_lag_us"] / 1e6,
        )
