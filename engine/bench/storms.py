"""Scenarios of crowds and of size: many jobs due at once, many that fail together, many workers."""

from __future__ import annotations

from statistics import median
from typing import Final

from tqe import clock
from tqe.bench import meters, producing
from tqe.bench.lab import Lab, RunFailed
from tqe.bench.scenario import Figure, Figures, Scenario, cpu, rate, time_ms

WARM_JOBS: Final = 10_000
FAILING: Final = 10_000


def _delayed(lab: Lab) -> Figures:
    """A million jobs due at one moment, one worker; the clock begins at that moment."""
    jobs = lab.size(1_000_000)
    in_s = 4.0 + 6.0 * lab.scale
    with lab.stage() as stage:
        found = stage.produce(producing.due_at(jobs, in_s))
        stage.start()
        if clock.monotonic_ns() > found["due_ns"]:
            raise RunFailed("the machine is too slow: the jobs were due before the workers had started")
        before = stage.read()
        if stage.ended():
            raise RunFailed("jobs ran before they were due")
        ended_ns = stage.wait_for(jobs)
        spent = stage.spent(before)
        took_ns = ended_ns - found["due_ns"]
        return {
            "rate": jobs / took_ns * 1e9,
            "total": took_ns / 1e6,
            "worker_cpu": spent.workers_ns / jobs / 1e3,
            "redis_cpu": spent.redis_ns / jobs / 1e3,
        }


def _retries(lab: Lab) -> Figures:
    """Ten thousand jobs fail together at their first try and succeed at the second, 0.25 to 0.5 s later."""
    jobs = lab.size(FAILING)
    with lab.stage() as stage:
        stage.pause()
        stage.produce(producing.bulk_of(jobs, "FLAKY", {}))
        stage.start()
        before = stage.read()
        stage.resume()
        ended_ns = stage.wait_for(jobs)
        spent = stage.spent(before)
        return {
            "total": (ended_ns - before.at_ns) / 1e6,
            "worker_cpu": spent.workers_ns / jobs / 1e3,
            "redis_cpu": spent.redis_ns / jobs / 1e3,
        }


def _memory(lab: Lab) -> Figures:
    """What four workers share with nobody, after 10,000 jobs each."""
    with lab.stage() as stage:
        stage.pause()
        stage.produce(producing.bulk(4 * WARM_JOBS))
        stage.start(4)
        stage.resume()
        stage.wait_for(4 * WARM_JOBS)
        supervisor, family = stage.supervisor_and_children()
        stewards = [pid for pid in family if pid not in stage.workers]
        mib = 1 << 20
        return {
            "worker": median(meters.private_bytes(pid) for pid in stage.workers) / mib,
            "largest": max(meters.private_bytes(pid) for pid in stage.workers) / mib,
            "supervisor": meters.private_bytes(supervisor) / mib,
            "steward": sum(meters.private_bytes(pid) for pid in stewards) / mib,
        }


SCENARIOS: Final = (
    Scenario(
        name="memory",
        what="private memory of each of four workers after 10,000 jobs",
        figures=(
            Figure(name="worker", unit="MiB", label="each worker", mark=12, stretch=8),
            Figure(name="largest", unit="MiB", label="the largest worker"),
            Figure(name="steward", unit="MiB", label="the steward"),
            Figure(name="supervisor", unit="MiB", label="the supervisor"),
        ),
        play=_memory,
    ),
    Scenario(
        name="delayed",
        what="1,000,000 jobs due at one moment, one worker",
        figures=(
            rate("drained after they were due"),
            time_ms("total", "from due to the last end"),
            cpu("worker"),
            cpu("redis"),
        ),
        play=_delayed,
        core=False,
    ),
    Scenario(
        name="retries",
        what="10,000 jobs that fail together once, one worker",
        figures=(time_ms("total", "until all have succeeded"), cpu("worker"), cpu("redis")),
        play=_retries,
        core=False,
    ),
)
