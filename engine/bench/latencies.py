"""Scenarios of latency and sharing: how soon a job starts, and how work spreads over workers."""

from __future__ import annotations

from typing import Final

from tqe import clock
from tqe.bench import meters, producing
from tqe.bench.lab import PATIENCE_S, Lab, RunFailed, Stage, until
from tqe.bench.scenario import Figure, Figures, Scenario, time_ms

WARM_UP: Final = 50
BATCH: Final = 100
LONG_MS: Final = 5
EIGHT: Final = 8
HIGH_FIRST: Final = 100_000
QUANTUM_MS: Final = 5  # of a worker, as by default


def _percentiles(values: list[int]) -> Figures:
    """Of latencies in ns."""
    return {name: meters.percentile(values, part) / 1e6 for name, part in (("p50", 0.5), ("p99", 0.99))}


def _idle(lab: Lab) -> Figures:
    """Single submissions to a worker that has nothing to do, 5 ms apart on average."""
    jobs = lab.turns(1_000) + WARM_UP
    with lab.stage() as stage:
        stage.start()
        before = stage.read()
        stage.produce(producing.one_by_one(jobs, 0.005))
        stage.wait_for(jobs)
        spent = stage.spent(before)
        return {
            **_percentiles(lab.ledger.values(WARM_UP, jobs)),
            "worker_cpu": spent.workers_ns / jobs / 1e3,
            "redis_cpu": spent.redis_ns / jobs / 1e3,
        }


def _half(lab: Lab) -> Figures:
    """Batches of 100 jobs at half of the rate that the same producer and one worker reach flat out, measured
    just before on the same stage. The clock of a job begins when its batch was due, not when it was sent."""
    seconds = 5.0 * max(lab.scale, 0.2)
    with lab.stage() as stage:
        stage.start()
        most = _capacity(stage, 1.5 * max(lab.scale, 0.3))
        lab.ledger.clear()
        ended = stage.ended()
        before = stage.read()
        found = stage.produce(producing.paced(most / 2, seconds, BATCH))
        stage.wait_for(ended + found["jobs"])
        stage.spent(before)
        offered = found["jobs"] / (found["ended_ns"] - found["begun_ns"]) * 1e9
        values = lab.ledger.values(found["batches"] // 10, found["batches"])
        return {**_percentiles(values), "offered": offered, "most": most}


def _capacity(stage: Stage, seconds: float) -> float:
    begun_ns = clock.monotonic_ns()
    found = stage.produce(producing.paced(0, seconds, BATCH))
    ended_ns = stage.wait_for(found["jobs"])
    return float(found["jobs"] / (ended_ns - max(begun_ns, found["begun_ns"])) * 1e9)


def _spread(lab: Lab) -> Figures:
    """One frame of 1,000 jobs of 5 ms for eight idle workers; they sleep, so two CPUs are enough."""
    with lab.stage() as stage:
        stage.start(EIGHT)
        before = stage.read()
        found = stage.produce(producing.bulk_of(1_000, "BUSY", {"ms": LONG_MS}))
        ended_ns = stage.wait_for(1_000)
        stage.spent(before)
        starts = sorted(lab.ledger.first_by_process(1_000).values())
        all_ns = starts[EIGHT - 1] - found["begun_ns"] if len(starts) >= EIGHT else ended_ns
        return {
            "all_busy": all_ns / 1e6,
            "workers": float(len(starts)),
            "total": (ended_ns - found["begun_ns"]) / 1e6,
            "share": 1_000 * LONG_MS / EIGHT / ((ended_ns - found["begun_ns"]) / 1e6),
        }


def _priority(lab: Lab) -> Figures:
    """Stamped jobs of the high lane while the low one is full of jobs of 5 ms, one worker."""
    jobs = lab.turns(200)
    filling = jobs * 8
    with lab.stage() as stage:
        stage.start()
        before = stage.read()
        stage.produce(producing.bulk_of(filling, "BUSY", {"ms": LONG_MS}, priority="low"))
        _until_left(lab, range(1))  # it is inside of the low lane
        # Numbers above those of the filler, which writes to the ledger as well.
        high = range(HIGH_FIRST, HIGH_FIRST + jobs)
        stage.produce(producing.one_by_one(jobs, 0.02, first=HIGH_FIRST, lane="high"))
        _until_left(lab, high)
        stage.spent(before)
        if len(lab.ledger.values(0, filling)) == filling:
            raise RunFailed("the low lane ran empty before the high jobs had come")
        return _percentiles(lab.ledger.values(high.start, high.stop))


def _until_left(lab: Lab, numbers: range) -> None:
    """Wait until each of these jobs has left its figure."""
    if not until(lambda: len(lab.ledger.values(numbers.start, numbers.stop)) == len(numbers), PATIENCE_S):
        raise RunFailed(f"{len(lab.ledger.values(numbers.start, numbers.stop))} of {len(numbers)} jobs ran")


def _lag(lab: Lab) -> Figures:
    """200 coroutines that sleep 10 ms again and again, beside sync jobs of 16 KiB SHA-256, one worker."""
    rounds = lab.turns(200)
    with lab.stage() as stage:
        stage.start(concurrency=200)
        before = stage.read()
        stage.produce(producing.bulk_of(200, "TICKS", {"rounds": rounds, "ms": 10}))
        stage.produce(producing.bulk_of(rounds * 100, "HASH", {"kib": 16}))
        stage.wait_for(200 + rounds * 100)
        stage.spent(before)
        return _percentiles(lab.ledger.values(0, 200 * rounds))


SCENARIOS: Final = (
    Scenario(
        name="latency",
        what="submit to handler start, 1,000 single submissions to an idle worker",
        figures=(
            time_ms("p50", "p50", 0.5, 0.25),
            time_ms("p99", "p99", 2, 1),
            Figure(name="worker_cpu", unit="µs/job", label="CPU of worker"),
            Figure(name="redis_cpu", unit="µs/job", label="CPU of redis"),
        ),
        play=_idle,
    ),
    Scenario(
        name="latency-half",
        what="submit to handler start at half of the highest load, batches of 100, one worker",
        figures=(
            time_ms("p99", "p99", 10, 5),
            time_ms("p50", "p50"),
            Figure(name="offered", unit="jobs/s", label="offered", more=True, steady=False),
            Figure(name="most", unit="jobs/s", label="highest load", more=True, steady=False),
        ),
        play=_half,
    ),
    Scenario(
        name="spread",
        what="one frame of 1,000 jobs of 5 ms, eight workers",
        figures=(
            time_ms("all_busy", "until all eight are busy", 100),
            time_ms("total", "until all jobs have ended (625 ms would be perfect)"),
            Figure(name="share", unit="", label="of the perfect", more=True, steady=False),
            Figure(name="workers", unit="", label="workers that took part", more=True, mark=8, steady=False),
        ),
        play=_spread,
    ),
    Scenario(
        name="priority",
        what="submit to handler start in the high lane while the low one is full of 5 ms jobs, one worker",
        # What is promised is the rest of the job that runs and one quantum.
        figures=(time_ms("p99", "p99", LONG_MS + QUANTUM_MS), time_ms("p50", "p50")),
        play=_priority,
        core=False,
    ),
    Scenario(
        name="lag",
        what="how late the loop wakes 200 coroutines beside sync jobs, one worker",
        figures=(time_ms("p99", "p99", 10, 5), time_ms("p50", "p50")),
        play=_lag,
        core=False,
    ),
)
