"""Scenarios of throughput: how fast what waits is worked off, and what each job costs."""

from __future__ import annotations

from typing import Any, Final

from tqe import clock
from tqe.bench import meters, producing, tasks
from tqe.bench.lab import Lab, Produce, RunFailed, Stage
from tqe.bench.meters import Reading
from tqe.bench.scenario import Figure, Figures, Scenario, cpu, rate, time_ms

SIZES: Final = {100: 500_000, 1_000: 200_000, 10_000: 40_000, 100_000: 4_000}
GROWN: Final = 10_000_000
SMALL: Final = 10_000
WORKERS: Final = (1, 2, 4, 8)
# KiB, workers, jobs
HASHES: Final = ((16, 4, 60_000), (16, 2, 60_000), (16, 1, 60_000), (1, 2, 200_000), (64, 2, 20_000))


def _drain(stage: Stage, jobs: int) -> Reading:
    """Let the workers have what is queued. They stand ready and idle, the lane is paused: the clock runs
    from its resumption to the last job's end, and starting up is not part of it."""
    before = stage.read()
    stage.resume()
    stage.wait_for(jobs)
    return stage.spent(before)


def _full_lane(stage: Stage, produce: Produce) -> dict[str, Any]:
    stage.pause()
    return stage.produce(produce)


def _throughput(spent: Reading, jobs: int) -> Figures:
    return {
        "rate": jobs / spent.at_ns * 1e9,
        "worker_cpu": spent.workers_ns / jobs / 1e3,
        "redis_cpu": spent.redis_ns / jobs / 1e3,
    }


def _play(lab: Lab, produce: Produce, jobs: int, procs: int = 1, **settings: Any) -> Figures:
    with lab.stage() as stage:
        _full_lane(stage, produce)
        stage.start(procs, **settings)
        return _throughput(_drain(stage, jobs), jobs)


# ------------------------------------------------------------------ the runs


def _bulk(lab: Lab) -> Figures:
    jobs = lab.size(2_000_000)
    with lab.stage() as stage:
        filled = _full_lane(stage, producing.bulk(jobs))
        stage.start()
        found = _throughput(_drain(stage, jobs), jobs)
        found["aof_bytes"] = stage.log_bytes() / jobs
        found["payload_bytes"] = filled["payload_bytes"]
        floor_us = stage.produce(producing.floor())["cpu_ns"] / 1e3
    return {**found, "floor": floor_us, "floor_share": floor_us / found["worker_cpu"]}


def _singles(lab: Lab) -> Figures:
    jobs = lab.size(300_000)
    return _play(lab, producing.singles(jobs), jobs)


def _results(lab: Lab) -> Figures:
    jobs = lab.size(300_000)
    return _play(lab, producing.bulk(jobs, "RESULT"), jobs)


def _coroutines(lab: Lab) -> Figures:
    jobs = lab.size(300_000)
    return _play(lab, producing.bulk(jobs, "NOOP_ASYNC"), jobs, concurrency=100)


def _together(lab: Lab) -> Figures:
    """A producer and a worker at the same time: from the first submission to the last job's end."""
    jobs = lab.size(1_000_000)
    with lab.stage() as stage:
        stage.start()
        before = stage.read()
        child = stage.begin(producing.bulk(jobs))
        ended_ns = stage.wait_for(jobs)
        begun_ns = child.answer()["begun_ns"]
        found = _throughput(stage.spent(before), jobs)
    return {**found, "rate": jobs / (ended_ns - begun_ns) * 1e9}


def _eight(lab: Lab) -> Figures:
    """Eight workers against one, one after the other in each run, so that both meet the same machine."""
    jobs = lab.size(2_000_000)
    one = _play(lab, producing.bulk(jobs), jobs)
    eight = _play(lab, producing.bulk(jobs), jobs, procs=8)
    return {**eight, "rate_of_one": one["rate"], "ratio": eight["rate"] / one["rate"]}


def _workers(lab: Lab) -> Figures:
    """No-ops on one worker to eight: what more of them win where Redis and two CPUs are all there is."""
    jobs = lab.size(1_000_000)
    found = {procs: _play(lab, producing.bulk(jobs), jobs, procs=procs) for procs in WORKERS}
    return {
        "rate": max(one["rate"] for one in found.values()),
        **{f"rate_{procs}": one["rate"] for procs, one in found.items()},
        **{f"cpu_{procs}": one["worker_cpu"] + one["redis_cpu"] for procs, one in found.items()},
    }


def _hashes(lab: Lab) -> Figures:
    """Real work: a SHA-256 of 16 KiB a job on 1, 2 and 4 workers, and of 1 and 64 KiB on 2."""
    found: Figures = {}
    for kib, procs, full in HASHES:
        jobs = lab.size(full)
        spent = _play(lab, producing.bulk_of(jobs, "HASH", {"kib": kib}), jobs, procs=procs)
        name = f"rate_{procs}" if kib == 16 else f"rate_{kib}kib"
        found[name] = spent["rate"]
    return {**found, "rate": max(found[f"rate_{procs}"] for procs in (1, 2, 4))}


def _mixed(lab: Lab) -> Figures:
    """Jobs of 50 µs to 50 ms that all wait at the start, on one worker to eight. They sleep, so two CPUs are
    enough for eight; what a sleep takes too long counts against the share of the perfect."""
    durations_ms = tasks.durations_ms(lab.turns(1_000))
    jobs = len(durations_ms)
    found: Figures = {}
    for procs in WORKERS:
        with lab.stage() as stage:
            _full_lane(stage, producing.numbered("MIXED", [{"ms": ms} for ms in durations_ms]))
            stage.start(procs)
            begun_ns = clock.monotonic_ns()
            spent = _drain(stage, jobs)
            ends = [end_ns - begun_ns for end_ns in lab.ledger.values(0, jobs)]
            found |= {
                f"rate_{procs}": jobs / spent.at_ns * 1e9,
                f"share_{procs}": sum(durations_ms) * 1e6 / procs / spent.at_ns,
                f"p50_{procs}": meters.percentile(ends, 0.5) / 1e6,
                f"p99_{procs}": meters.percentile(ends, 0.99) / 1e6,
            }
    return {**found, "rate": max(found[f"rate_{procs}"] for procs in WORKERS)}


def _waits(lab: Lab) -> Figures:
    """Jobs that wait 10 ms for others, 100 at a time: 10,000 a second would be perfect."""
    jobs = lab.size(20_000)
    found = _play(lab, producing.bulk_of(jobs, "WAIT", {"ms": 10}), jobs, concurrency=100)
    return {**found, "share": found["rate"] / 10_000}


def _sizes(lab: Lab) -> Figures:
    """Payloads of text of four sizes; from 1 KiB on they are compressed where that helps."""
    found: Figures = {}
    for size, full in SIZES.items():
        jobs = lab.size(full)
        data = tasks.text(size - len('{"n":10000,"data":""}'))
        spent = _play(lab, producing.bulk_of(jobs, "BLOB", {"data": data}), jobs)
        found |= {f"rate_{size}": spent["rate"], f"mb_{size}": spent["rate"] * size / 1e6}
        found |= {f"cpu_{size}": spent["worker_cpu"] + spent["redis_cpu"]}
    return {"rate": found["rate_100"], **found}


def _growth(lab: Lab) -> Figures:
    """CPU a job with ten million in the queue, and with never more than ten thousand."""
    grown, jobs = lab.size(GROWN), lab.size(500_000)
    with lab.stage() as stage:
        _full_lane(stage, producing.bulk(grown))
        stage.start()
        before = stage.read()
        stage.resume()
        stage.wait_for(jobs)
        ended = stage.ended()
        large = _throughput(stage.spent(before), ended)
    with lab.stage() as stage:
        stage.start()
        client, task = stage.observer, lab.app.registry.get("NOOP")
        if task is None:
            raise RunFailed("the task is missing")
        distinct = tasks.distinct_payloads()
        workers_ns = redis_ns = done = 0
        while done < jobs:
            stage.pause()
            client.submit_alike(task, tasks.payloads(SMALL, distinct))
            before = stage.read()
            stage.resume()
            done += SMALL
            stage.wait_for(done)
            spent = stage.spent(before)
            workers_ns, redis_ns = workers_ns + spent.workers_ns, redis_ns + spent.redis_ns
    small_us = (workers_ns + redis_ns) / done / 1e3
    large_us = large["worker_cpu"] + large["redis_cpu"]
    return {"ratio": large_us / small_us, "cpu_large": large_us, "cpu_small": small_us}


# ------------------------------------------------------------------ the table


def _mixed_figures(procs: int) -> tuple[Figure, ...]:
    many = f"{procs} workers"
    return (
        rate(many, name=f"rate_{procs}"),
        Figure(name=f"share_{procs}", unit="", label=f"of the perfect, {many}", more=True),
        time_ms(f"p50_{procs}", f"from the start to a job's end, p50, {many}"),
        time_ms(f"p99_{procs}", f"the same, p99, {many}"),
    )


SCENARIOS: Final = (
    Scenario(
        name="drain",
        what="2,000,000 no-op jobs submitted in bulk, one worker",
        figures=(
            rate("drained", 900_000, 1_400_000),
            cpu("worker", 0.65, 0.45),
            cpu("redis", 0.35, 0.25),
            Figure(name="floor", unit="µs/job", label="floor: decode and call in a bare loop"),
            Figure(
                name="floor_share",
                unit="",
                label="floor / CPU of worker",
                more=True,
                mark=0.45,
                stretch=0.6,
            ),
            Figure(name="aof_bytes", unit="B/job", label="AOF, submission to end", mark=140, stretch=120),
            Figure(name="payload_bytes", unit="B", label="payload"),
        ),
        play=_bulk,
    ),
    Scenario(
        name="singles",
        what="300,000 no-op jobs in frames of one, one worker",
        figures=(rate("drained", 230_000, 330_000), cpu("worker", 1.6, 1.2), cpu("redis", 3.0, 2.4)),
        play=_singles,
    ),
    Scenario(
        name="together",
        what="1,000,000 no-op jobs, produced in bulk and drained by one worker at the same time",
        figures=(rate("through", 450_000, 700_000), cpu("worker"), cpu("redis")),
        play=_together,
    ),
    Scenario(
        name="results",
        what="300,000 jobs that return a number, results kept, one worker",
        figures=(rate("drained", 200_000, 350_000), cpu("worker"), cpu("redis")),
        play=_results,
    ),
    Scenario(
        name="coroutines",
        what="300,000 `async def` no-op jobs, concurrency 100, one worker",
        figures=(rate("drained", 150_000, 300_000), cpu("worker"), cpu("redis")),
        play=_coroutines,
    ),
    Scenario(
        name="eight",
        what="2,000,000 no-op jobs in bulk, eight workers, and the same with one",
        figures=(
            Figure(name="ratio", unit="", label="eight / one", more=True, mark=0.8, stretch=1.0),
            rate("eight workers"),
            rate("one worker", name="rate_of_one"),
            cpu("worker"),
            cpu("redis"),
        ),
        play=_eight,
    ),
    Scenario(
        name="workers",
        what="1,000,000 no-op jobs in bulk on 1, 2, 4 and 8 workers",
        figures=(
            rate("best"),
            *(rate(f"{procs} workers", name=f"rate_{procs}") for procs in WORKERS),
            *(
                Figure(name=f"cpu_{procs}", unit="µs/job", label=f"CPU of worker and redis, {procs} workers")
                for procs in WORKERS
            ),
        ),
        play=_workers,
        core=False,
    ),
    Scenario(
        name="mixed",
        what="1,000 jobs of 50 µs to 50 ms (log-normal) on 1, 2, 4 and 8 workers",
        figures=(
            rate("best"),
            *(figure for procs in WORKERS for figure in _mixed_figures(procs)),
        ),
        play=_mixed,
        core=False,
    ),
    Scenario(
        name="hashes",
        what="SHA-256: 60,000 of 16 KiB on 1, 2 and 4 workers; 200,000 of 1 KiB and 20,000 of 64 KiB on 2",
        figures=(
            rate("best of 16 KiB"),
            *(rate(f"16 KiB, {procs} workers", name=f"rate_{procs}") for procs in (1, 2, 4)),
            *(rate(f"{kib} KiB, 2 workers", name=f"rate_{kib}kib") for kib in (1, 64)),
        ),
        play=_hashes,
        core=False,
    ),
    Scenario(
        name="waits",
        what="20,000 coroutines that sleep 10 ms, concurrency 100, one worker",
        figures=(
            rate("drained"),
            Figure(name="share", unit="", label="of the possible 10,000/s", more=True),
            cpu("worker"),
            cpu("redis"),
        ),
        play=_waits,
        core=False,
    ),
    Scenario(
        name="sizes",
        what="payloads of 100 B to 100 KB, one worker",
        figures=tuple(
            figure
            for size in SIZES
            for figure in (
                rate(f"{size:,} B", name=f"rate_{size}"),
                Figure(name=f"mb_{size}", unit="MB/s", label=f"{size:,} B", more=True),
                Figure(name=f"cpu_{size}", unit="µs/job", label=f"{size:,} B, CPU of worker and redis"),
            )
        ),
        play=_sizes,
        core=False,
    ),
    Scenario(
        name="growth",
        what="500,000 jobs from a queue of 10,000,000 against a queue of 10,000, one worker",
        figures=(
            Figure(name="ratio", unit="", label="CPU a job, large / small", mark=1.1, stretch=1.0),
            Figure(name="cpu_large", unit="µs/job", label="CPU of worker and redis, large queue"),
            Figure(name="cpu_small", unit="µs/job", label="CPU of worker and redis, small queue"),
        ),
        play=_growth,
        core=False,
    ),
)
