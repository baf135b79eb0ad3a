"""Proves the promises under faults: real `tqe run`s, real redis-servers and signals, the checker's verdict.

Each scenario has a short form for every test run and a long one under the marker `campaign`. A seed chooses
the load and the moments of the faults; the same seed gives the same schedule, not the same interleaving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.arena import RETRY_BASE_MS, Arena
from tests.chaos.audit import parse_frame
from tests.chaos.checker import Limits, Report
from tests.chaos.journal import load, now_ns
from tests.chaos.procs import TqeRun, wait_gone
from tests.chaos.proxy import Proxy
from tests.support.waiting import wait_until

LEASE_S = 2.0
SHORT = pytest.mark.timeout(120)
LONG = (pytest.mark.campaign, pytest.mark.timeout(1800))


def limits(**changes: object) -> Limits:
    base: dict[str, object] = {
        "lease_ms": int(LEASE_S * 1000),
        "retry_base_ms": RETRY_BASE_MS,
        "retry_cap_ms": 2000,
        "grace_ms": 5000,
    }
    return Limits(**{**base, **changes})  # type: ignore[arg-type]


def only(report: Report, *causes: str) -> None:
    """No job ran again for any other reason."""
    assert set(report.reruns) <= {"retry", *causes}, report


def long_form(*values: object) -> object:
    return pytest.param(*values, marks=LONG, id="campaign")


def short_form(*values: object) -> object:
    return pytest.param(*values, marks=SHORT, id="short")


def busy_worker(arena: Arena, run: TqeRun, type_: str = "LONG") -> int:
    """The pid of a worker that is inside of a job now."""

    def inside() -> int:
        journals = load(arena.folder)
        kinds = {sub.id: sub.type for sub in journals.submissions}
        open_ = [r.pid for r in journals.executions if not r.outcome and kinds.get(r.job) == type_]
        return next((pid for pid in run.workers() if pid in open_), 0)

    return wait_until(inside, 20, "a worker is inside of a job")


def jobs_end_again(arena: Arena) -> None:
    """Work goes on without anybody's help; within which time, the caller judges."""
    before = arena.ended_jobs()
    wait_until(lambda: arena.ended_jobs() > before or arena.jobs_left() == 0, 20, "jobs end again")


# ---- processes


@pytest.mark.parametrize(("jobs", "kills", "procs"), [short_form(6_000, 12, 2), long_form(100_000, 110, 4)])
def test_killed_workers_lose_nothing_and_one_job_a_kill_runs_again(
    arena: Arena, jobs: int, kills: int, procs: int
) -> None:
    run = arena.run(procs=procs, lease_s=LEASE_S)
    done = 0
    with arena.auditing(), arena.load(jobs):
        while done < kills:
            time.sleep(arena.rng.uniform(0.05, 0.4))
            # A worker that is about to run dry settles at once: only one with a backlog has much to lose.
            wait_until(lambda: arena.jobs_left() > 5, 60, "there is a backlog")
            done += run.kill_worker(arena.rng) != 0
    arena.wait_drained(120)
    # A killed child is reaped at once, but its running job waits 1 s or more before it is tried again.
    report = arena.finish(limits(redis_reruns=False, recovery_ms={"kill": 20_000}))
    only(report, "kill")
    assert report.reruns["kill"] <= done
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize(("jobs", "kills"), [short_form(4_000, 2), long_form(60_000, 30)])
def test_killed_supervisor_takes_its_children_along_and_others_reap_it(
    arena: Arena, jobs: int, kills: int
) -> None:
    """Two supervisors on one Redis; one is killed, its leases end, the other takes them over."""
    arena.run(procs=1, lease_s=LEASE_S)
    with arena.load(jobs):
        for _ in range(kills):
            victim = arena.run(procs=1, lease_s=LEASE_S)
            wait_until(lambda: arena.jobs_left() > 0, 30, "there is work")
            time.sleep(arena.rng.uniform(0.2, 1.0))
            victim.kill_supervisor()
    arena.wait_drained(120)
    report = arena.finish(limits(redis_reruns=False))
    only(report, "host")
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize(("jobs", "kills"), [short_form(5_000, 4), long_form(60_000, 60)])
def test_killed_steward_is_replaced_and_nobody_notices(arena: Arena, jobs: int, kills: int) -> None:
    """Every second time a worker dies too, so that the next steward has to go on with a recovery."""
    run = arena.run(procs=2, lease_s=LEASE_S)
    killed = 0
    with arena.load(jobs):
        for turn in range(kills):
            if turn % 2:
                killed += run.kill_worker(arena.rng) != 0
            wait_until(run.steward, 20, "there is a steward")
            time.sleep(arena.rng.uniform(0.0, 0.3))
            run.kill_steward()
    arena.wait_drained(120)
    report = arena.finish(limits(redis_reruns=False))
    only(report, "kill")
    assert report.reruns["kill"] <= killed
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize("rounds", [short_form(1), long_form(30)])
def test_frozen_worker_wakes_after_its_lease_and_changes_nothing(arena: Arena, rounds: int) -> None:
    """SIGSTOP in a job, past the lease; another worker runs it; the zombie's late end is refused."""
    run = arena.run(procs=2, lease_s=LEASE_S)
    producer = arena.producer()
    for _ in range(rounds):
        producer.bulk("LONG", 2, lambda n: {"ms": 1500})
        producer.bulk("QUICK", 200, lambda n: {"us": 200})
        with run.stopped(busy_worker(arena, run)):
            wait_until(lambda: arena.jobs_left() == 0, LEASE_S * 4 + 20, "the frozen worker's jobs ran")
        arena.wait_drained()
    report = arena.finish(limits(redis_reruns=False))
    only(report, "lease")
    assert report.reruns["lease"] >= rounds, report
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize("rounds", [short_form(1), long_form(10)])
def test_frozen_steward_is_replaced(arena: Arena, rounds: int) -> None:
    """A steward that does not move must not cost a host its leases: the supervisor replaces it."""
    run = arena.run(procs=2, lease_s=LEASE_S)
    producer = arena.producer()
    for _ in range(rounds):
        producer.bulk("LONG", 2, lambda n: {"ms": 4000})
        pid = run.steward()
        with run.stopped(pid, "freeze_steward"):
            wait_until(lambda old=pid: run.steward() not in (0, old), 20, "another steward")  # type: ignore[misc]
        arena.wait_drained()
    report = arena.finish(limits(redis_reruns=False))
    only(report)
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize("rounds", [short_form(1), long_form(10)])
def test_frozen_supervisor_stops_nobody(arena: Arena, rounds: int) -> None:
    """Workers and steward go on without it; when it wakes it must not take its own sleep for theirs."""
    run = arena.run(procs=2, lease_s=LEASE_S)
    producer = arena.producer()
    for _ in range(rounds):
        family = run.children()
        with run.stopped(run.pid, "freeze_supervisor"):
            producer.bulk("LONG", 4, lambda n: {"ms": 1000})
            producer.bulk("QUICK", 500, lambda n: {"us": 100})
            wait_until(lambda: arena.jobs_left() == 0, 30, "jobs end without their supervisor")
            time.sleep(2 * LEASE_S)
        producer.bulk("QUICK", 500, lambda n: {"us": 100})
        arena.wait_drained()
        assert run.children() == family
    report = arena.finish(limits(redis_reruns=False))
    only(report)
    assert report.finals["completed"] == report.jobs


@pytest.mark.alone
@pytest.mark.parametrize("jobs", [short_form(3), long_form(50)])
def test_lease_that_its_worker_does_not_know_of_runs_all_the_same(arena: Arena, jobs: int) -> None:
    """As a late fetch, or a failover, leaves it: in the hash of a live worker that never heard of it."""
    arena.run(procs=2, lease_s=LEASE_S)
    producer, redis = arena.producer(), arena.direct
    for _ in range(jobs):
        producer.app.client.pause("low")
        producer.bulk("QUICK", 2, priority="low")
        raw = redis.lpop("tq:{0}:queue:low")
        frame = parse_frame(raw)
        assert frame is not None
        incarnation = arena.rng.choice(redis.zrange("tq:{0}:incarnations", 0, -1)).decode()
        redis.hset(f"tq:{{0}}:processing:{incarnation}", frame.lease, raw)
        redis.hdel("tq:{0}:depth", "low")
        producer.app.client.resume("low")  # it may also give it back to its lane
        began = time.monotonic()
        wait_until(lambda: arena.jobs_left() == 0, 3 * LEASE_S, "the planted lease ran")
        assert time.monotonic() - began < 2 * LEASE_S
    arena.wait_drained()
    report = arena.finish(limits(redis_reruns=False))
    only(report)
    assert report.finals["completed"] == report.jobs


@pytest.mark.alone
@pytest.mark.parametrize("rounds", [short_form(3), long_form(60)])
def test_sigterm_at_random_moments_charges_nothing(arena: Arena, rounds: int) -> None:
    producer = arena.producer()
    for _ in range(rounds):
        run = arena.run(procs=2, lease_s=LEASE_S)
        producer.mixed(1_500)
        time.sleep(arena.rng.uniform(0.0, 0.8))
        began = time.monotonic()
        assert run.stop() == 0, run.text()[-3000:]
        assert time.monotonic() - began < 5.0 + 2.0
        assert arena.direct.keys("tq:{0}:processing:*") == []
    arena.run(procs=2, lease_s=LEASE_S)
    arena.wait_drained()
    report = arena.finish(limits(redis_reruns=False))
    only(report)  # sync jobs of 2 ms end within any grace: none is cut short
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize("rounds", [short_form(1), long_form(10)])
def test_sigterm_cuts_long_jobs_short_without_charging_them(arena: Arena, rounds: int) -> None:
    producer = arena.producer()
    for _ in range(rounds):
        run = arena.run(procs=2, lease_s=LEASE_S, grace_s=0.5)
        producer.bulk("LONG", 4, lambda n: {"ms": 1500})
        busy_worker(arena, run)
        assert run.stop() == 0, run.text()[-3000:]
    arena.run(procs=2, lease_s=LEASE_S)
    arena.wait_drained()
    report = arena.finish(limits(redis_reruns=False, grace_ms=1500))
    only(report, "drain")
    assert report.reruns["drain"] >= 1
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize(("poisons", "innocents"), [short_form(1, 200), long_form(8, 4_000)])
def test_poison_among_innocents(arena: Arena, poisons: int, innocents: int) -> None:
    """One frame holds them all: whoever was prefetched beside the poison is never blamed."""
    producer = arena.producer()
    per_poison = innocents // poisons
    for _ in range(poisons):
        first, producer.number = producer.number, producer.number + per_poison + 1
        at = first + arena.rng.randrange(per_poison)
        numbers = range(first, first + per_poison + 1)
        for n in numbers:
            kind = ("POISON", "poison") if n == at else ("QUICK", "ok")
            producer.journal.invoke(n, *kind)
        bodies = [("POISON" if n == at else "QUICK", {"n": n, "us": 100}) for n in numbers]
        producer.told(first, producer.app.submit_many(bodies))
    run = arena.run(procs=2, lease_s=LEASE_S)
    arena.wait_drained(60 + 20 * poisons)
    dead = arena.direct.hvals("tq:{0}:dlq_meta")
    report = arena.finish(limits(redis_reruns=False))
    only(report, "poison")
    assert (report.finals["dead"], report.finals["completed"]) == (poisons, innocents // poisons * poisons)
    assert len(dead) == poisons and all(b"SIGKILL" in meta for meta in dead), dead
    assert report.reruns["poison"] == 2 * poisons, run.text()[-2000:]


@pytest.mark.parametrize(
    ("bombs", "crashes_max", "innocents"),
    [pytest.param(1, 1, 20, marks=LONG, id="one"), long_form(2, 3, 400)],
)
def test_job_that_kills_its_host_is_found_and_charged_and_nobody_else(
    arena: Arena, bombs: int, crashes_max: int, innocents: int
) -> None:
    """Supervisor, steward and all workers die at once, and the next ones of the same name take their place.

    Nobody is left to read a board: two deaths are blind, then what was held runs alone and marked. With one
    crash allowed, a neighbour that was charged but once would be dead.
    """
    producer = arena.producer()
    producer.app.client.pause("normal")
    numbers = range(innocents + bombs)
    guilty = set(arena.rng.sample(numbers, bombs))
    producer.number = len(numbers)
    for n in numbers:
        producer.journal.invoke(n, *(("HOSTBOMB", "poison") if n in guilty else ("QUICK", "ok")))
    bodies = [("HOSTBOMB", {"n": n, "ms": 50}) if n in guilty else ("QUICK", {"n": n}) for n in numbers]
    producer.told(0, producer.app.submit_many(bodies))
    producer.bulk("LONG", 2, lambda n: {"ms": 300})  # in the other worker when it dies

    deaths = 0
    while True:
        producer.app.client.pause("normal")  # or the host may die before it has started
        run = arena.run(procs=2, lease_s=1.0, env={"TQE_CRASHES_MAX": str(crashes_max)})
        workers = run.workers()
        producer.app.client.resume("normal")
        wait_until(lambda: not run.running or arena.total("dead") == bombs, 60, "a death of any kind")  # noqa: B023
        if run.running:
            break
        deaths += 1
        wait_gone(workers)
        kinds = {sub.id: sub.type for sub in load(arena.folder).submissions}
        last = max(
            (one for one in load(arena.folder).executions if kinds[one.job] == "HOSTBOMB"),
            key=lambda one: one.start_ns,
        )
        others = [pid for pid in workers if pid != last.pid]
        arena.faults.record("kill_host", others, t_ns=last.start_ns, until_ns=now_ns(), supervisor=run.pid)
        assert deaths <= bombs * (2 + crashes_max), run.text()[-2000:]
    arena.wait_drained()
    found = [parse_frame(raw) for raw in arena.direct.hvals("tq:{0}:dlq")]
    report = arena.finish(limits(redis_reruns=False, max_crashes=2 + crashes_max))
    only(report, "poison", "host")
    assert (report.finals["dead"], report.finals["completed"]) == (bombs, innocents + 2)
    assert [one.crashes for one in found if one] == [crashes_max] * bombs
    assert all(one.reaps >= 2 for one in found if one), "the blind deaths are counted"
    assert 2 + bombs * crashes_max <= deaths


@pytest.mark.parametrize("rounds", [short_form(1), long_form(10)])
def test_replayed_poison_dies_again_and_once(arena: Arena, rounds: int) -> None:
    run = arena.run(procs=2, lease_s=LEASE_S)
    producer = arena.producer()
    producer.bulk(
        "FLAKY", 5, lambda n: {"failures": 99}, expect="dead", journal_opts={"max_retries": 1}, max_retries=1
    )
    arena.wait_drained()
    for _ in range(rounds):
        for name in sorted(job.decode() for job in arena.direct.hkeys("tq:{0}:dlq")):
            began = now_ns()
            answers = [producer.app.client.replay(name) for _ in range(2)]
            for answer in answers:
                arena.submits.write(f"V\t{began}\treplay\t{name}\t{len(answer.replayed)}\n")
        arena.wait_drained()
    report = arena.finish(limits(redis_reruns=False))
    only(report, "replay")
    assert report.finals["dead"] == 5, run.text()[-2000:]


# ---- redis-server


@pytest.mark.alone
@pytest.mark.parametrize(("jobs", "kills"), [short_form(6_000, 3), long_form(100_000, 60)])
def test_killed_redis_loses_nothing_acknowledged(arena: Arena, jobs: int, kills: int) -> None:
    """AOF everysec: a SIGKILL keeps the page cache, so what was answered is there."""
    arena.run(procs=2, lease_s=LEASE_S)
    resumed: list[float] = []
    with arena.load(jobs, pause_s=0.01):
        for _ in range(kills):
            time.sleep(arena.rng.uniform(0.3, 1.0))
            arena.redis_faults.kill(arena.rng.choice((0.0, 0.2, 1.0)))
            back = time.monotonic()
            jobs_end_again(arena)
            resumed.append(time.monotonic() - back)
    arena.wait_drained(120)
    report = arena.finish(limits())
    only(report, "redis")
    assert report.finals["completed"] == report.jobs
    assert max(resumed) < 5.0, resumed


@pytest.mark.parametrize("rounds", [short_form(1), long_form(20)])
def test_silent_redis_costs_no_lease(arena: Arena, rounds: int) -> None:
    """Redis stands still for two leases under healthy workers: every lease has ended, and nobody reaps.

    What renews them is frozen beforehand and wakes a while after Redis, or a renewal that waits in a socket
    would hide what the other host's reaper does at its first looks.
    """
    run = arena.run(procs=2, lease_s=LEASE_S)
    producer = arena.producer()
    for _ in range(rounds):
        producer.bulk("LONG", 2, lambda n: {"ms": int(LEASE_S * 3000)})
        busy_worker(arena, run)
        other = arena.run(procs=1, lease_s=LEASE_S)
        producer.bulk("QUICK", 500, lambda n: {"us": 100})
        with run.stopped(run.pid, "freeze_supervisor"), run.stopped(run.steward(), "freeze_steward"):
            arena.redis_faults.pause(2 * LEASE_S)
            time.sleep(0.8 * LEASE_S)  # several looks of a reaper, and less than a lease
        arena.wait_drained()
        assert other.stop() == 0
    report = arena.finish(limits(redis_reruns=False))
    only(report)
    assert report.finals["completed"] == report.jobs


@pytest.mark.parametrize(("jobs", "seconds"), [short_form(5_000, 4), long_form(60_000, 60)])
def test_flushed_scripts_are_loaded_again(arena: Arena, jobs: int, seconds: int) -> None:
    arena.run(procs=2, lease_s=LEASE_S)
    deadline = time.monotonic() + seconds
    with arena.auditing(), arena.load(jobs):
        while time.monotonic() < deadline:
            arena.redis_faults.flush_scripts()
            time.sleep(0.02)
    arena.wait_drained()
    report = arena.finish(limits(redis_reruns=False))
    only(report)
    assert sum(producer.unknown for producer in arena.producers) == 0
    assert report.finals["completed"] == report.jobs


# ---- the wire


@pytest.fixture
def wire(arena: Arena) -> Iterator[Proxy]:
    """Engine and producers reach Redis through the proxy; the arena's own eyes do not."""
    with Proxy(arena.server.socket, Path(arena.server.folder) / "wire.sock") as proxy:
        arena.redis_url = proxy.url
        yield proxy
        assert proxy.errors == []


@pytest.mark.parametrize(("jobs", "resets"), [short_form(5_000, 30), long_form(60_000, 1_000)])
def test_storm_of_resets(arena: Arena, wire: Proxy, jobs: int, resets: int) -> None:
    arena.run(procs=2, lease_s=LEASE_S)
    with arena.load(jobs):
        for _ in range(resets):
            time.sleep(arena.rng.uniform(0.02, 0.15))
            began = now_ns()
            wire.reset_all()
            arena.faults.record("net_reset", t_ns=began, until_ns=now_ns())
    arena.wait_drained()
    report = arena.finish(limits())
    only(report, "net")
    assert report.finals["completed"] == report.jobs
    assert wire.links < 40, "connections leak"


@pytest.mark.parametrize("rounds", [short_form(1), long_form(20)])
def test_silent_network_is_noticed(arena: Arena, wire: Proxy, rounds: int) -> None:
    """No reset, no reply: the peer that is silently gone. Workers must notice by themselves and go on."""
    arena.run(procs=2, lease_s=LEASE_S)
    producer = arena.producer()
    for _ in range(rounds):
        producer.bulk("QUICK", 2_000, lambda n: {"us": 1_000})
        wait_until(lambda: arena.ended_jobs() > 0, 20, "jobs end")
        began = now_ns()
        wire.silence()
        time.sleep(arena.rng.uniform(0.5, 1.5))
        wire.heal()
        arena.faults.record("net_silence", t_ns=began, until_ns=now_ns())
        jobs_end_again(arena)
        arena.wait_drained()
    report = arena.finish(limits())
    only(report, "net")
    assert report.finals["completed"] == report.jobs


# ---- everything at once


@pytest.mark.parametrize(("jobs", "faults"), [short_form(6_000, 10), long_form(200_000, 300)])
def test_everything_at_once(arena: Arena, jobs: int, faults: int) -> None:
    """Two supervisors, every kind of fault in random order; safety first, then liveness once it is quiet."""
    rng = arena.rng
    runs = [arena.run(procs=1, lease_s=LEASE_S), arena.run(procs=1, lease_s=LEASE_S)]

    def restart(run: TqeRun, how: str) -> None:
        runs.remove(run)
        if how == "kill":
            run.kill_supervisor()
        else:
            assert run.stop() == 0
        runs.append(arena.run(procs=1, lease_s=LEASE_S))

    def freeze(run: TqeRun) -> None:
        workers = run.workers()
        if workers:
            with run.stopped(rng.choice(workers)):
                time.sleep(rng.uniform(0.1, 2.5 * LEASE_S))

    deeds: dict[str, tuple[int, Callable[[], object]]] = {
        "worker": (10, lambda: rng.choice(runs).kill_worker(rng)),
        "steward": (4, lambda: rng.choice(runs).kill_steward()),
        "supervisor": (2, lambda: restart(rng.choice(runs), "kill")),
        "drain": (2, lambda: restart(rng.choice(runs), "term")),
        "freeze": (2, lambda: freeze(rng.choice(runs))),
        "redis": (3, lambda: arena.redis_faults.kill(rng.choice((0.0, 0.5)))),
        "pause": (1, lambda: arena.redis_faults.pause(rng.uniform(0.1, 1.5 * LEASE_S))),
        "scripts": (4, arena.redis_faults.flush_scripts),
        "clients": (2, arena.redis_faults.kill_clients),
    }
    names = list(deeds)
    weights = [deeds[name][0] for name in names]

    with arena.load(jobs, pause_s=0.01):
        for _ in range(faults):
            time.sleep(rng.uniform(0.1, 0.7))
            name = rng.choices(names, weights)[0]
            arena.faults.record("deed", name=name)
            deeds[name][1]()
    arena.wait_drained(180)
    report = arena.finish(limits())
    assert report.finals["lost"] == 0
    assert report.finals["completed"] + report.finals["dead"] == report.jobs
