"""Takes the sample that `/metrics` shows: this host's board as it is now, Redis' totals as last read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tqe.board import layout
from tqe.steward.context import Context
from tqe.store import housekeeping
from tqe.telemetry import metrics

_OUTCOMES: Final = {
    "completed": layout.T_COMPLETED,
    "failed": layout.T_FAILED,
    "retried": layout.T_RETRIED,
    "dead": layout.T_DEAD,
}
_NO_COUNTER: Final = frozenset({"loop_lag_us"})  # a gauge among the counters


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
        self.next_in_s: float | None = None
        self.read_ns: int | None = None

    def run_once(self) -> TotalsReport:
        context = self._context
        context.totals = housekeeping.totals(context.door, context.keys, context.settings.lanes)
        self.read_ns = context.now_ns()
        return TotalsReport(context.totals)


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

    def sample(self) -> metrics.Sample:
        context, totals, now_ns = self._context, self._context.totals, self._context.now_ns()
        read_ns = self._reader.read_ns
        live = context.live_slots()
        counters = dict(context.ended)
        tasks = {name: list(words) for name, words in list(context.ended_tasks.items())}
        workers = []
        for slot in live:
            own = slot.counters()
            for name, value in own.items():
                counters[name] = counters.get(name, 0) + value
            for name, words in slot.tasks():
                block = tasks.setdefault(name, [0] * len(words))
                for k in range(layout.T_COMPLETED // layout.WORD, len(words)):
                    block[k] += words[k]
            step, phase = slot.get(layout.C_IN_USER), slot.get(layout.C_PHASE)
            since_ns = context.sightings.since_ns(slot, step) if step else None
            workers.append(
                metrics.WorkerSample(
                    number=slot.get(layout.C_NUMBER),
                    state=layout.PHASES[phase] if phase < len(layout.PHASES) else "unknown",
                    running_s=None if since_ns is None else max(0.0, (now_ns - since_ns) / 1e9),
                    loop_lag_s=own["loop_lag_us"] / 1e6,
                )
            )
        return metrics.Sample(
            lanes={name: metrics.LaneSample(*lane) for name, lane in totals.lanes.items()} if totals else {},
            scheduled=totals.scheduled if totals else 0,
            dead=totals.dead if totals else 0,
            quarantined=totals.quarantined if totals else 0,
            parked=totals.parked if totals else 0,
            totals=totals.stats if totals else {},
            redis_up=self._redis_up() and read_ns is not None,
            redis_age_s=(now_ns - read_ns) / 1e9 if read_ns is not None else 0.0,
            workers=workers,
            counters={name: value for name, value in counters.items() if name not in _NO_COUNTER},
            tasks={name: _task(words) for name, words in tasks.items()},
            duties=self._duties(),
            events=dict(context.counts),
        )


def _task(words: list[int]) -> metrics.TaskSample:
    def at(offset: int) -> int:
        return words[offset // layout.WORD]

    def bins(offset: int) -> list[int]:
        return words[offset // layout.WORD : offset // layout.WORD + layout.BINS]

    return metrics.TaskSample(
        outcomes={name: at(offset) for name, offset in _OUTCOMES.items()},
        run_bins=bins(layout.T_RUN_BINS),
        run_sum_s=at(layout.T_SUM_NS) / 1e9,
        wait_bins=bins(layout.T_WAIT_BINS),
        wait_sum_s=at(layout.T_WAIT_SUM_US) / 1e6,
    )
