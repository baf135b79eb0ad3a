"""Scenarios of submission: what producers reach, and what a waiting job costs in Redis."""

from __future__ import annotations

from typing import Final

from tqe.bench import producing
from tqe.bench.lab import Lab, Produce
from tqe.bench.scenario import Figure, Figures, Scenario, cpu, rate

COROUTINES: Final = 1_000


def _submit(lab: Lab, produce: Produce) -> Figures:
    """Nobody drains meanwhile: only the producer and Redis are at work."""
    with lab.stage() as stage:
        memory = stage.used_memory()
        before = stage.read()
        found = stage.produce(produce)
        spent = stage.spent(before)
        jobs = found["jobs"]
        figures = {
            "rate": jobs / (found["ended_ns"] - found["begun_ns"]) * 1e9,
            "producer_cpu": found["cpu_ns"] / jobs / 1e3,
            "redis_cpu": spent.redis_ns / jobs / 1e3,
            "aof_bytes": stage.log_bytes() / jobs,
        }
        if "payload_bytes" in found:
            figures["memory_over"] = (stage.used_memory() - memory) / jobs - found["payload_bytes"]
        return figures


def _bulk(lab: Lab) -> Figures:
    return _submit(lab, producing.bulk(lab.size(1_000_000)))


def _concurrent(lab: Lab) -> Figures:
    return _submit(lab, producing.concurrent(lab.size(200_000), COROUTINES))


SCENARIOS: Final = (
    Scenario(
        name="submit",
        what="submit_many of 1,000,000 jobs, one producer, nobody drains",
        figures=(
            rate("submitted", 800_000, 1_300_000),
            cpu("producer"),
            cpu("redis"),
            Figure(
                name="memory_over",
                unit="B/job",
                label="memory in Redis over the payload",
                mark=40,
                stretch=20,
            ),
            Figure(name="aof_bytes", unit="B/job", label="AOF of the submission"),
        ),
        play=_bulk,
    ),
    Scenario(
        name="async-submit",
        what=f"200,000 `await submit()` from {COROUTINES:,} coroutines of one process",
        figures=(
            rate("submitted", 100_000, 200_000),
            cpu("producer"),
            cpu("redis"),
            Figure(name="aof_bytes", unit="B/job", label="AOF of the submission"),
        ),
        play=_concurrent,
    ),
)
