"""The Prometheus page: turns a sample of plain numbers into metrics, and serves it from a thread.

It counts nothing itself. Workers count on the board, scripts count in Redis, and both are read when somebody
scrapes: a call per job into a metrics library would cost more than the rest of the engine. docs/METRICS.md
lists every name; a test compares the two.
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
    SummaryMetricFamily,
)

PREFIX: Final = "taskqueue_"
SERIES_MAX: Final = 1_000  # of one metric
OTHER: Final = "other"  # the label of all that has no series of its own

_US: Final = 1e-6
_REDIS_UP: Final = "1 if Redis answered the last question."

# What scripts count in Redis → the counter's name and what it means; the whole queue.
TOTALS: Final[Mapping[str, tuple[str, str]]] = {
    "submitted": ("jobs_submitted", "Jobs that were accepted."),
    "duplicate": ("jobs_duplicate", "Submissions that were answered with an earlier job of the same key."),
    "completed": ("jobs_completed", "Jobs that ended well."),
    "failed": ("jobs_failed", "Attempts that failed, be it retried or not."),
    "retried": ("jobs_retried", "Attempts that failed and are tried again."),
    "dead": ("jobs_dead", "Jobs that went to the dead-letter queue."),
    "cancelled": ("jobs_cancelled", "Jobs that were cancelled."),
    "expired": ("jobs_expired", "Jobs whose time to start had passed."),
    "recovered": ("jobs_recovered", "Jobs that came back from a worker that died or lost its lease."),
    "replayed": ("jobs_replayed", "Dead jobs that were sent back to their lane."),
    "purged": ("jobs_purged", "Dead jobs that were deleted."),
    "dlq_dropped": ("jobs_dlq_dropped", "Dead jobs that the cap of the dead-letter queue pushed out."),
    "fenced": ("leases_fenced", "Leases whose late settling was refused, as somebody else had them."),
    "quarantined": ("frames_quarantined", "Damaged frames that were put aside."),
    "parked": ("frames_parked", "Frames of a newer version that were put aside."),
}

# What a worker counts on the board → name and meaning; this host.
WORKER_TOTALS: Final[Mapping[str, tuple[str, str]]] = {
    "fetched": ("worker_jobs_fetched", "Jobs that workers took from their lanes."),
    "returned": ("worker_jobs_returned", "Jobs that workers gave back for others to run."),
    "takeovers": ("worker_takeovers", "Leases that workers moved to a fresh incarnation of theirs."),
    "reconnects": ("worker_reconnects", "Tries of workers to register with a Redis that did not answer."),
    "wakes": ("worker_wakes", "Wake tokens, or seconds without one, that ended an idle worker's wait."),
    "scored": ("jobs_scored", "Jobs whose duration was predicted to order them."),
    "reordered": ("jobs_reordered", "Jobs that went back to their lane with a score to order by."),
    "overtakes": ("overtakes", "Jobs put in order that a worker took after one that had entered later."),
    "bound_hits": ("bound_hits", "Jobs put in order that had waited for the bound T when they were taken."),
}
# Counters `fallback_<reason>`: the model was not used, and order was that of entry.
FALLBACKS: Final = ("columns", "library", "value", "slow", "error", "load")

MODES: Final = ("fifo", "shadow", "bounded", "sjf")
RUNGS: Final = ("model", "mean", "fifo")

# Why autoscaling wants as many workers as it does.
SCALE_REASONS: Final = ("backlog", "most", "busy", "calm", "idle", "least")

# What supervisor and steward count on the board → name and meaning; this host.
HOST_TOTALS: Final[Mapping[str, tuple[str, str]]] = {
    "worker_crashes": ("worker_crashes", "Workers that ended unexpectedly."),
    "worker_restarts": ("worker_restarts", "Workers that were started in place of another."),
    "steward_restarts": ("steward_restarts", "Stewards that were started in place of another."),
    "recovered": ("workers_recovered", "Dead workers whose leases were settled from the board."),
    "recovery_failures": ("recovery_failures", "Tries of such a recovery that failed."),
    "reaped": ("incarnations_reaped", "Incarnations of other hosts whose leases had ended."),
    "orphans": ("incarnations_orphaned", "Incarnations found with leases and without a registration."),
    "resynced": ("worker_resyncs", "Workers that were told to compare their leases with Redis."),
    "withheld": ("lease_renewals_withheld", "Renewals withheld from workers that stand still."),
    "depth_corrections": ("queue_depth_corrections", "Cached depths that were found wrong and corrected."),
    "cancel_marks": ("cancel_requests_delivered", "Cancel requests that reached a running job."),
    "promoted": ("jobs_promoted", "Scheduled and retried jobs that entered their lane."),
    "snapshots_dropped": ("snapshots_dropped", "Status records dropped before their time, over the cap."),
    "cron_submitted": ("cron_submitted", "Slots of schedules for which this host submitted a job."),
    "cron_skipped": ("cron_skipped", "Slots of schedules that were let go: missed, or still busy."),
    "scaled_up": ("autoscale_workers_added", "Workers that autoscaling has asked for."),
    "scaled_down": ("autoscale_workers_removed", "Workers that autoscaling has let go."),
    "taken_back": ("leases_taken_back", "Leases taken back from behind a job that runs for long."),
}


@dataclass(frozen=True, slots=True)
class LaneSample:
    """Jobs that wait in a lane; `sorted` of the `queued` ones are in its ordered part. `oldest_s`: age of
    its oldest frame, 0 when it is empty. `backlog_s`: predicted seconds of work that wait in it, None if
    nobody predicts."""

    queued: int
    sorted: int
    oldest_s: float = 0.0
    paused: bool = False
    backlog_s: float | None = None
    mode: str | None = None  # one of MODES; None of a lane of others


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One live worker of this host. `active`: jobs that run in it. `running_s`: how long its present job has
    run, None if none runs."""

    number: int
    state: str
    active: int = 0
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

    def __add__(self, other: TaskSample) -> TaskSample:
        return TaskSample(
            {name: number + other.outcomes.get(name, 0) for name, number in self.outcomes.items()},
            [a + b for a, b in zip(self.run_bins, other.run_bins, strict=True)],
            self.run_sum_s + other.run_sum_s,
            [a + b for a, b in zip(self.wait_bins, other.wait_bins, strict=True)],
            self.wait_sum_s + other.wait_sum_s,
        )


@dataclass(frozen=True, slots=True)
class DutySample:
    """How often a duty of the steward ran and failed, how long it took last, and how late it began."""

    runs: int
    failures: int
    last_s: float
    lag_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSample:
    """The whole queue as Redis has it: the same on every host."""

    lanes: Mapping[str, LaneSample] = field(default_factory=dict)
    scheduled: int = 0
    dead: int = 0
    quarantined: int = 0
    parked: int = 0
    totals: Mapping[str, int] = field(default_factory=dict)
    redis_up: bool = False
    age_s: float = 0.0
    latency_s: float = 0.0
    rung: str = "fifo"  # one of RUNGS: what predicts now
    chosen: str = "fifo"  # what should, by the gate's verdict on the version in use


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """All that one scrape of a steward shows: the queue (None: not read yet), and what happens on this
    host."""

    queue: QueueSample | None = None
    workers: Sequence[WorkerSample] = ()
    procs: int = 0
    scale_reason: str | None = None  # one of SCALE_REASONS, None without autoscale
    leases: int = 0
    not_consuming: bool = False
    counters: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, TaskSample] = field(default_factory=dict)
    duties: Mapping[str, DutySample] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)


class Page:
    """A collector over `collect`, which is called at each scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        yield from self._collect()

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


def serve(
    take: Callable[[], Sample], *, port: int, address: str, more: Callable[[], Iterable[Metric]] = tuple
) -> Served:
    """Serve `/metrics` from a thread of this process, with `more` below the engine's own; port 0 takes any
    free one. Raises OSError if it is taken."""
    registry = CollectorRegistry()
    registry.register(Page(lambda: families(take())))
    registry.register(Page(more))
    server, thread = start_http_server(port, addr=address, registry=registry)
    return Served(int(server.server_port), server, thread)


def families(sample: Sample) -> Iterator[Metric]:
    """Every metric of a steward's page."""
    yield from queue_families(sample.queue)
    yield from _workers(sample)
    yield from _tasks(sample.tasks)
    yield from _steward(sample)


def queue_families(queue: QueueSample | None) -> Iterator[Metric]:
    """The metrics that describe the whole queue; every page has them. None: Redis could not be read."""
    if queue is None:
        # A zero would be a lie, and counters would fall: a new steward's page is read before Redis is.
        yield _gauge("redis_up", _REDIS_UP, 0)
        return
    lanes = queue.lanes.items()
    yield _gauges("queue_depth", "Jobs that wait.", "priority", {name: lane.queued for name, lane in lanes})
    yield _gauges(
        "queue_sorted",
        "Of the jobs that wait, those in the lane's ordered part.",
        "priority",
        {name: lane.sorted for name, lane in lanes},
    )
    yield _gauges(
        "queue_oldest_age_seconds",
        "How long the oldest job has waited.",
        "priority",
        {name: lane.oldest_s for name, lane in lanes},
    )
    yield _gauges(
        "queue_paused",
        "1 while the lane is paused.",
        "priority",
        {name: int(lane.paused) for name, lane in lanes},
    )
    yield _gauges(
        "predicted_backlog_seconds",
        "Seconds of work that wait, as predicted, on one worker.",
        "priority",
        {name: lane.backlog_s for name, lane in lanes if lane.backlog_s is not None},
    )
    modes = GaugeMetricFamily(
        f"{PREFIX}ordering_mode", "1 for the mode that is set for the lane.", labels=["priority", "mode"]
    )
    for name, lane in lanes:
        for mode in MODES if lane.mode is not None else ():
            modes.add_metric([name, mode], int(mode == lane.mode))
    yield modes
    for rungs, text, now in (
        ("model_rung", "1 for what predicts durations now.", queue.rung),
        ("model_chosen_rung", "1 for what should, as the gate has chosen it for this version.", queue.chosen),
    ):
        yield _gauges(rungs, text, "rung", {rung: int(rung == now) for rung in RUNGS})
    yield _gauge("scheduled_jobs", "Jobs that wait for their time or their next try.", queue.scheduled)
    yield _gauge("dlq_jobs", "Jobs in the dead-letter queue.", queue.dead)
    yield _gauge("quarantined_frames", "Damaged frames that are kept aside.", queue.quarantined)
    yield _gauge("parked_frames", "Frames of a newer version that wait for an upgrade.", queue.parked)
    yield _gauge("redis_up", _REDIS_UP, int(queue.redis_up))
    yield _gauge("redis_sample_age_seconds", "Age of what this page says about the queue.", queue.age_s)
    yield _gauge("redis_latency_seconds", "How long Redis took for the last round trip.", queue.latency_s)
    yield from _counters(TOTALS, queue.totals)


def _workers(sample: Sample) -> Iterator[Metric]:
    states: dict[str, int] = {}
    for worker in sample.workers:
        states[worker.state] = states.get(worker.state, 0) + 1
    yield _gauges("workers", "Live workers.", "state", states)
    yield _gauge("workers_wanted", "Workers that should live.", sample.procs)
    if sample.scale_reason is not None:
        yield _gauges(
            "autoscale_reason",
            "1 for the reason of the number of workers that autoscaling wants.",
            "reason",
            {reason: int(reason == sample.scale_reason) for reason in SCALE_REASONS},
        )
    yield _gauge("processing_active", "Jobs that run now.", sum(w.active for w in sample.workers))
    oldest_s = max((w.running_s for w in sample.workers if w.running_s is not None), default=0.0)
    yield _gauge("oldest_running_seconds", "How long the longest job has run.", oldest_s)
    yield _gauges(
        "worker_loop_lag_seconds",
        "How late each worker's event loop is.",
        "worker",
        {str(worker.number): worker.loop_lag_s for worker in sample.workers},
    )
    yield _gauge("leases", "Leases that the workers hold.", sample.leases)
    yield _gauge(
        "not_consuming",
        "1 while jobs wait, workers could take them, and none is taken.",
        int(sample.not_consuming),
    )
    counted = sample.counters
    for verb, number in (("fetch", counted.get("fetches", 0)), ("settle", counted.get("settles", 0))):
        yield SummaryMetricFamily(
            f"{PREFIX}{verb}_round_trip_seconds",
            f"Calls of {verb}, from sending to reading the reply, which waits for the batch that runs.",
            count_value=number,
            sum_value=counted.get(f"{verb}_us", 0) * _US,
        )
    yield SummaryMetricFamily(
        f"{PREFIX}prediction_error_seconds",
        "How far predicted durations were off, of the sampled runs that had a prediction.",
        count_value=counted.get("predictions", 0),
        sum_value=counted.get("prediction_off_us", 0) * _US,
    )
    yield CounterMetricFamily(
        f"{PREFIX}worker_busy_seconds", "Time that workers spent on jobs.", counted.get("busy_ns", 0) / 1e9
    )
    yield from _counters(WORKER_TOTALS, counted)
    fallbacks = CounterMetricFamily(
        f"{PREFIX}model_fallbacks", "Times that order fell back to that of entry.", labels=["reason"]
    )
    for reason in FALLBACKS:
        fallbacks.add_metric([reason], counted.get(f"fallback_{reason}", 0))
    yield fallbacks


def _tasks(tasks: Mapping[str, TaskSample]) -> Iterator[Metric]:
    jobs = CounterMetricFamily(f"{PREFIX}task_jobs", "Jobs by type and outcome.", labels=["type", "outcome"])
    run = HistogramMetricFamily(
        f"{PREFIX}job_execution_duration_seconds", "How long jobs ran.", labels=["type"]
    )
    wait = HistogramMetricFamily(
        f"{PREFIX}job_queue_wait_time_seconds", "How long jobs waited in their lane.", labels=["type"]
    )
    for name, task in capped(tasks).items():
        for outcome, number in task.outcomes.items():
            jobs.add_metric([name, outcome], number)
        run.add_metric([name], buckets(task.run_bins), sum_value=task.run_sum_s)
        wait.add_metric([name], buckets(task.wait_bins), sum_value=task.wait_sum_s)
    yield jobs
    yield run
    yield wait


def capped(tasks: Mapping[str, TaskSample]) -> dict[str, TaskSample]:
    """As many tasks as SERIES_MAX leaves room for, the first ones; the others together as OTHER.

    By their order, never by their size: a task that changed places would make counters fall.
    """
    first = next(iter(tasks.values()), None)
    if first is None:
        return {}
    room = SERIES_MAX // (len(first.run_bins) + 2)
    shown: dict[str, TaskSample] = {}
    for at, (name, task) in enumerate(tasks.items()):
        key = name if len(tasks) <= room or at < room - 1 else OTHER
        shown[key] = shown[key] + task if key in shown else task
    return shown


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
    duties = sample.duties.items()
    for name, text, counted in (
        ("steward_runs", "Runs of the steward's duties.", {n: d.runs for n, d in duties}),
        ("steward_failures", "Runs that failed.", {n: d.failures for n, d in duties}),
    ):
        family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=["duty"])
        for duty, value in counted.items():
            family.add_metric([duty], value)
        yield family
    yield _gauges(
        "steward_last_seconds", "How long a duty took last.", "duty", {n: d.last_s for n, d in duties}
    )
    yield _gauge(
        "steward_lag_seconds",
        "How late the latest of the duties began last.",
        max((duty.lag_s for duty in sample.duties.values()), default=0.0),
    )
    yield from _counters(HOST_TOTALS, sample.host)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}{name}", text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counters(known: Mapping[str, tuple[str, str]], values: Mapping[str, int]) -> Iterator[Metric]:
    # All of them, from 0 on: a counter that appears with its first event has no rate for it.
    for key, (name, text) in known.items():
        yield CounterMetricFamily(f"{PREFIX}{name}", text, value=values.get(key, 0))
