"""The Prometheus page: turns a sample of plain numbers into metrics, and serves it from a thread.

It counts nothing itself. Workers count on the board, scripts count in Redis, and both are read when somebody
scrapes: a call per job into a metrics library would cost more than the rest of the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

_US: Final = 1e-6


@dataclass(frozen=True, slots=True)
class LaneSample:
    """Jobs that wait in a lane; `sorted` of the `queued` ones are in its ordered part."""

    queued: int
    sorted: int


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One live worker of this host. `running_s`: how long its present job has run, None if none runs."""

    number: int
    state: str
    running_s: float | None = None
    loop_lag_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TaskSample:
    """One task on this host. Bin k counts times in [2^k, 2^(k+1)) µs, bin 0 all below 2 µs, the last all
    above."""

    outcomes: Mapping[str, int]
    run_bins: Sequence[int]
    run_sum_s: float
    wait_bins: Sequence[int]
    wait_sum_s: float


@dataclass(frozen=True, slots=True)
class DutySample:
    """How often a duty of the steward ran and failed, and how long it took last."""

    runs: int
    failures: int
    last_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """All that one scrape shows. The first group is the whole queue, as Redis has it; the others are this
    host."""

    lanes: Mapping[str, LaneSample] = field(default_factory=dict)
    scheduled: int = 0
    dead: int = 0
    quarantined: int = 0
    parked: int = 0
    totals: Mapping[str, int] = field(default_factory=dict)
    redis_up: bool = False
    redis_age_s: float = 0.0

    workers: Sequence[WorkerSample] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, TaskSample] = field(default_factory=dict)
    duties: Mapping[str, DutySample] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)


class Page:
    """A collector over `take`, which is called at each scrape."""

    def __init__(self, take: Callable[[], Sample]) -> None:
        self._take = take

    def collect(self) -> Iterator[Metric]:
        sample = self._take()
        yield from _queue(sample)
        yield from _workers(sample)
        yield from _tasks(sample.tasks)
        yield from _steward(sample)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not take a sample."""
        return ()


@dataclass(frozen=True, slots=True)
class Served:
    """A page that is being served."""

    port: int
    _server: Any
    _thread: threading.Thread

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def serve(take: Callable[[], Sample], *, port: int, address: str = "0.0.0.0") -> Served:
    """Serve `/metrics` from a thread of this process; port 0 takes any free one. Raises OSError if it is
    taken."""
    registry = CollectorRegistry()
    registry.register(Page(take))
    server, thread = start_http_server(port, addr=address, registry=registry)
    return Served(int(server.server_port), server, thread)


def _queue(sample: Sample) -> Iterator[Metric]:
    depth = GaugeMetricFamily("tqe_queue_depth", "Jobs that wait, by priority (lane).", labels=["priority"])
    in_order = GaugeMetricFamily(
        "tqe_queue_sorted", "Of the jobs that wait, those in the lane's ordered part.", labels=["priority"]
    )
    for name, lane in sample.lanes.items():
        depth.add_metric([name], lane.queued)
        in_order.add_metric([name], lane.sorted)
    yield depth
    yield in_order
    for name, value, text in (
        ("tqe_scheduled_jobs", sample.scheduled, "Jobs that wait for their time or their next try."),
        ("tqe_dead_jobs", sample.dead, "Jobs in the dead-letter queue."),
        ("tqe_quarantined_frames", sample.quarantined, "Damaged frames that are kept aside."),
        ("tqe_parked_frames", sample.parked, "Frames of another version that wait for an upgrade."),
        ("tqe_redis_up", int(sample.redis_up), "1 if Redis answered the steward's last question."),
        ("tqe_redis_sample_age_seconds", sample.redis_age_s, "Age of what this page says about Redis."),
    ):
        yield GaugeMetricFamily(name, text, value=value)
    yield _labelled(
        "tqe_jobs", "Jobs since ever, by what happened to them; the whole queue.", "event", sample.totals
    )


def _workers(sample: Sample) -> Iterator[Metric]:
    states = GaugeMetricFamily("tqe_workers", "Live workers of this host, by state.", labels=["state"])
    counted: dict[str, int] = {}
    for worker in sample.workers:
        counted[worker.state] = counted.get(worker.state, 0) + 1
    for state, number in counted.items():
        states.add_metric([state], number)
    yield states
    oldest = max((w.running_s for w in sample.workers if w.running_s is not None), default=0.0)
    yield GaugeMetricFamily("tqe_oldest_running_seconds", "Age of the job that runs longest.", value=oldest)
    lag = GaugeMetricFamily("tqe_loop_lag_seconds", "Lateness of each worker's loop.", labels=["worker"])
    for worker in sample.workers:
        lag.add_metric([str(worker.number)], worker.loop_lag_s)
    yield lag
    yield _labelled(
        "tqe_worker_events", "What this host's workers did, since its start.", "event", sample.counters
    )


def _tasks(tasks: Mapping[str, TaskSample]) -> Iterator[Metric]:
    jobs = CounterMetricFamily(
        "tqe_task_jobs", "Jobs of this host by task and outcome.", labels=["task", "outcome"]
    )
    run = HistogramMetricFamily("tqe_task_run_seconds", "Run times by task, this host.", labels=["task"])
    wait = HistogramMetricFamily(
        "tqe_task_wait_seconds", "Waits in the lane by task, this host.", labels=["task"]
    )
    for name, task in tasks.items():
        for outcome, number in task.outcomes.items():
            jobs.add_metric([name, outcome], number)
        run.add_metric([name], buckets(task.run_bins), sum_value=task.run_sum_s)
        wait.add_metric([name], buckets(task.wait_bins), sum_value=task.wait_sum_s)
    yield jobs
    yield run
    yield wait


def buckets(bins: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative buckets of a histogram in powers of two of a µs."""
    found: list[tuple[str, float]] = []
    total = 0
    for k, number in enumerate(bins):
        total += number
        le = "+Inf" if k == len(bins) - 1 else f"{(2 << k) * _US:.6f}".rstrip("0")
        found.append((le, total))
    return found


def _steward(sample: Sample) -> Iterator[Metric]:
    yield _labelled(
        "tqe_steward_runs",
        "Runs of the steward's duties.",
        "duty",
        {n: d.runs for n, d in sample.duties.items()},
    )
    yield _labelled(
        "tqe_steward_failures",
        "Runs of the steward's duties that failed.",
        "duty",
        {n: d.failures for n, d in sample.duties.items()},
    )
    last = GaugeMetricFamily("tqe_steward_last_seconds", "How long a duty took last.", labels=["duty"])
    for name, duty in sample.duties.items():
        last.add_metric([name], duty.last_s)
    yield last
    yield _labelled("tqe_steward_events", "What the steward has done.", "event", sample.events)


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
