"""How work flows through workers: lanes, spreading, waking, draining, and frames that are damaged."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker import Rig, WorkerProcess
from tqe import codec
from tqe.board import layout
from tqe.job import IDS


def finish(rig: Rig) -> None:
    """Drain every worker and look into the books."""
    for worker in rig.workers:
        if worker.running:
            assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []


def pass_time(seconds: float) -> None:
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, seconds + 5)


def began(rig: Rig, n: Any, timeout: float = 5.0) -> None:
    wait_until(lambda: rig.journal.count("began")[n], timeout, f"job {n} begins")


# ------------------------------------------------------------------ lanes


@pytest.mark.alone
def test_a_high_job_waits_at_most_for_the_running_low_one(rig: Rig) -> None:
    @rig.app.task("JOB")
    def job(n: int, ms: int) -> None:
        rig.journal("began", n)
        time.sleep(ms / 1000)

    rig.worker()
    rig.frame("JOB", [{"n": n, "ms": 20} for n in range(60)], priority="low")
    rig.frame("JOB", [{"n": 100 + n, "ms": 20} for n in range(20)], priority="normal")
    began(rig, 100)
    began(rig, 105)
    waits_ms, overtaken = [], []
    for n in range(1_000, 1_010):
        sent = time.monotonic_ns()
        handle = rig.submit("JOB", {"n": n, "ms": 0}, priority="high")
        handle.result(timeout=5)
        (note,) = (note for note in rig.journal.notes("began") if note.words[1] == n)
        waits_ms.append((note.at_ns - sent) / 1e6)
        overtaken.append(
            sum(
                1
                for other in rig.journal.notes("began")
                if sent < other.at_ns < note.at_ns and other.words[1] < 1000
            )
        )
    # The one that ran, and one that may have been started before the fetch was answered.
    assert max(overtaken) <= 2, (overtaken, waits_ms)
    rig.wait_ended(timeout=20)
    order = [note.words[1] for note in rig.journal.notes("began") if note.words[1] < 1_000]
    first_low = next(at for at, n in enumerate(order) if n < 100)
    assert all(n >= 100 for n in order[:first_low]) and sum(n < 100 for n in order[: 20 + first_low]) <= 20
    assert Counter(order) == dict.fromkeys((*range(60), *range(100, 120)), 1)
    finish(rig)


@pytest.mark.alone
def test_a_frame_of_long_jobs_spreads_over_all_workers(rig: Rig) -> None:
    @rig.app.task("LONG")
    def long(n: int) -> None:
        rig.journal("began", n)
        time.sleep(0.005)

    for _ in range(4):
        rig.worker()
    sent = time.monotonic_ns()
    rig.frame("LONG", [{"n": n} for n in range(1_000)])
    rig.wait_ended()
    notes = rig.journal.notes("began")
    first = {worker.pid: min(n.at_ns for n in notes if n.pid == worker.pid) for worker in rig.workers}
    late_ms = [(at - sent) / 1e6 for at in first.values()]
    share = Counter(note.pid for note in notes)
    span_s = (max(n.at_ns for n in notes) - min(n.at_ns for n in notes)) / 1e9
    assert max(late_ms) < 250, late_ms
    assert min(share.values()) > 125, share
    assert span_s < 4, span_s  # 1.25 s if four sleep side by side without a pause; alone it takes 5 s
    assert rig.journal.count("began") == dict.fromkeys(range(1_000), 1)
    finish(rig)


@pytest.mark.parametrize("weights", [(), (1, 1), (1, 3)])
def test_lanes_with_weights_share_the_time_of_a_worker(
    rig_of: Callable[..., Rig], weights: tuple[int, ...]
) -> None:
    """Jobs of ten times the length get no more of it; without weights the first lane gets all."""
    rig = rig_of(lanes=("long", "short"), default_lane="short", lane_weights=weights)

    @rig.app.task("JOB")
    def job(lane: str, ms: int) -> None:
        begun = time.monotonic_ns()
        time.sleep(ms / 1000)
        rig.journal("ran", lane, (time.monotonic_ns() - begun) / 1e6)

    rig.frame("JOB", [{"lane": "long", "ms": 20}] * 200, priority="long")
    rig.frame("JOB", [{"lane": "short", "ms": 2}] * 2_000, priority="short")
    worker = rig.worker()
    wait_until(lambda: sum(note.words[2] for note in rig.journal.notes("ran")) > 1_500, 20)
    assert worker.drain() == 0
    ms = Counter[str]()
    for note in rig.journal.notes("ran"):
        ms[note.words[1]] += note.words[2]
    if weights:
        expected = weights[0] / weights[1]
        assert 0.6 * expected < ms["long"] / ms["short"] < 1.6 * expected, ms
    else:
        assert set(ms) == {"long"}
    finish(rig)


def test_coroutines_are_charged_to_their_lane_while_they_run(rig_of: Callable[..., Rig]) -> None:
    """Starting one costs the same whatever it waits for; what it holds is a slot."""
    rig = rig_of(lanes=("long", "short"), default_lane="short", lane_weights=(1, 1), concurrency=4)

    @rig.app.task("CALL")
    async def call(lane: str, ms: int) -> None:
        rig.journal("began", lane)
        await asyncio.sleep(ms / 1000)

    rig.frame("CALL", [{"lane": "long", "ms": 100}] * 300, priority="long")
    rig.frame("CALL", [{"lane": "short", "ms": 5}] * 900, priority="short")
    worker = rig.worker()
    wait_until(lambda: sum(rig.journal.count("began").values()) > 200, 20)
    assert worker.drain() == 0
    began = rig.journal.count("began")
    assert began["short"] > 3 * began["long"], began
    finish(rig)


@pytest.mark.alone
def test_a_paused_lane_waits_and_the_others_go_on(rig: Rig) -> None:
    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    rig.worker()
    rig.client.pause("high")
    rig.frame("JOB", [{"n": n} for n in range(50)], priority="high")
    assert rig.submit("JOB", {"n": 50}).result(timeout=5) is None
    pass_time(1.2)  # beyond the backstop of a lost token
    assert rig.journal.count("began") == {50: 1}
    rig.client.resume("high")
    rig.wait_ended(timeout=1)
    finish(rig)


def test_a_lane_that_is_not_served_is_left_alone(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(lanes=("high", "normal", "low", "bulk"))
    narrow = rig_of(lanes=("bulk", "high"), default_lane="high")

    @narrow.app.task("JOB")
    def job(n: int) -> None:
        narrow.journal("began", n)

    for n, lane in enumerate(("low", "bulk", "normal", "high")):
        rig.frame("JOB", [{"n": n}], priority=lane)
    worker = narrow.worker()
    rig.wait_ended(2)
    pass_time(0.1)
    # Its own order of lanes, too.
    assert [note.words[1] for note in narrow.journal.notes("began")] == [1, 3]
    assert worker.drain() == 0
    books = rig.books()
    assert books.problems() == [] and books.states() == {"queued": 2, "completed": 2}


def test_what_others_have_measured_is_known_at_once(rig: Rig) -> None:
    """A fresh worker cuts a frame of long jobs by their published mean, and keeps one of them."""

    @rig.app.task("LONG")
    def long(n: int) -> None:
        time.sleep(0.02)

    rig.redis.hset(rig.keys.means, "LONG", 20_000)
    rig.frame("LONG", [{"n": n} for n in range(40)])
    rig.worker()
    wait_until(lambda: rig.redis.zcard(rig.keys.sorted("normal")), 5)
    back = [codec.parse(frame) for frame in rig.redis.zrange(rig.keys.sorted("normal"), 0, -1)]
    assert len(back) >= 19 and max(header.n for header in back) <= 2
    rig.wait_ended()
    finish(rig)


def test_a_worker_that_is_used_up_says_so_and_goes_on(rig_of: Callable[..., Rig]) -> None:
    """The supervisor replaces it when it likes."""
    rig = rig_of(recycle_jobs=10)

    @rig.app.task("JOB")
    def job(n: int) -> None: ...

    worker = rig.worker()
    rig.frame("JOB", [{"n": n} for n in range(9)])
    rig.wait_ended()
    pass_time(0.25)
    assert worker.view.get(layout.C_RECYCLE) == layout.RECYCLE_NONE
    rig.frame("JOB", [{"n": n} for n in range(9)])
    wait_until(lambda: worker.view.get(layout.C_RECYCLE) == layout.RECYCLE_JOBS, 5)
    rig.frame("JOB", [{"n": n} for n in range(9)])
    rig.wait_ended()
    finish(rig)


# ------------------------------------------------------------------ waking


def test_where_many_tiny_jobs_wait_the_next_ones_come_while_these_run(
    rig_of: Callable[..., Rig],
) -> None:
    """Neither Redis nor the worker waits for the other: no batch ends with nothing under way."""
    rig = rig_of(quantum_us=6_000_000)
    jobs, started = 2_000, 0
    redis = rig.server.client()
    queue = rig.keys.queue("normal")

    def more_comes() -> bool:
        left = redis.llen(queue)
        return left == 0 or jobs - left > started

    @rig.app.task("TINY")
    def tiny(n: int) -> None:
        nonlocal started
        started += 1
        if n >= 1_000 and not more_comes():
            try:
                wait_until(more_comes, 2)
            except AssertionError:
                rig.journal("waited", n)

    for n in range(jobs):
        rig.submit("TINY", {"n": n})
    rig.worker()
    rig.wait_ended()
    assert rig.journal.notes("waited") == []
    finish(rig)


@pytest.mark.alone
def test_an_idle_worker_is_cheap_and_wakes_at_once(rig: Rig) -> None:
    @rig.app.task("JOB")
    def job(n: int) -> int:
        return n

    workers = [rig.worker() for _ in range(2)]
    rig.submit("JOB", {"n": 0}).result(timeout=5)
    for worker in workers:
        wait_until(lambda worker=worker: worker.view.get(layout.C_PHASE) == layout.PHASE_IDLE, 5)
    pass_time(0.1)
    rig.redis.config_resetstat()
    cpu_s = [_cpu_s(worker) for worker in workers]
    pass_time(2)
    calls = {
        name: stat["calls"]
        for name, stat in rig.redis.info("commandstats").items()
        if name in ("cmdstat_blpop", "cmdstat_evalsha", "cmdstat_eval")
    }
    assert sum(calls.values()) / 2 / 2 < 5, calls  # a second and worker
    spent_s = [_cpu_s(worker) - before for worker, before in zip(workers, cpu_s, strict=True)]
    assert max(spent_s) < 0.02, spent_s  # 1 %
    waits_ms = []
    for n in range(20):
        pass_time(0.02)
        sent = time.monotonic()
        assert rig.submit("JOB", {"n": n}).result(timeout=5) == n
        waits_ms.append((time.monotonic() - sent) * 1000)
    assert sorted(waits_ms)[10] < 20, waits_ms
    finish(rig)


def _cpu_s(worker: WorkerProcess) -> float:
    return int(Path(f"/proc/{worker.pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.mark.alone
def test_a_lost_token_costs_a_second_at_most(rig: Rig) -> None:
    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    worker = rig.worker()
    wait_until(lambda: worker.view.get(layout.C_PHASE) == layout.PHASE_IDLE, 5)
    pass_time(0.2)
    frame = codec.pack(
        [(b"JOB", b'{"n":1}', b"", False)], frame_id=IDS.frame_id(), lane="normal", tracked=False
    )
    sent = time.monotonic_ns()
    rig.redis.rpush(rig.keys.queue("normal"), frame)  # and no token
    began(rig, 1)
    (note,) = rig.journal.notes("began")
    assert (note.at_ns - sent) / 1e9 < 1.3
    finish_untold(rig)


def finish_untold(rig: Rig) -> None:
    """Like `finish`, where the jobs came into Redis by hand, so that the sums cannot agree."""
    for worker in rig.workers:
        assert worker.drain() == 0, worker.told()
    assert rig.leases() == {} and rig.incarnations() == []


# ------------------------------------------------------------------ stopping


def test_a_drain_gives_back_what_was_not_started(rig: Rig) -> None:
    """And settles the rest: nothing is charged, nothing is in flight, the incarnation is gone."""

    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)
        time.sleep(0.0002)

    @rig.app.task("ASYNC")
    async def asynchronous(n: int) -> None:
        rig.journal("began", n)
        await asyncio.sleep(0.2)

    worker = rig.worker()
    rig.frame("JOB", [{"n": n} for n in range(2_000)])
    began(rig, 500)
    assert worker.drain() == 0
    assert rig.leases() == {} and rig.incarnations() == []
    books = rig.books()
    assert books.problems() == []
    ran = rig.journal.count("began")
    assert books.states() == {"completed": len(ran), "queued": 2_000 - len(ran)}
    assert 0 < len(ran) < 2_000 and set(ran.values()) == {1}
    for frame in rig.redis.zrange(rig.keys.sorted("normal"), 0, -1):
        header = codec.parse(frame)
        assert (header.run, header.attempts, header.crashes, header.reaps) == (0, 0, 0, 0)
    worker = rig.worker()
    rig.frame("ASYNC", [{"n": 2_000 + n} for n in range(200)])
    began(rig, 2_050, 10)
    assert worker.drain() == 0
    books = rig.books()
    assert books.problems() == []
    ran = rig.journal.count("began")
    assert books.states() == {"completed": len(ran), "queued": 2_200 - len(ran)}
    assert set(ran.values()) == {1}
    rig.worker()
    rig.wait_ended()
    assert rig.journal.count("began") == dict.fromkeys(range(2_200), 1)
    finish(rig)


def test_a_drain_at_any_moment_loses_nothing(rig: Rig) -> None:
    """The stop word meets fetches and settles that are under way."""

    @rig.app.task("JOB")
    def job(n: int) -> int:
        rig.journal("began", n)
        return n

    @rig.app.task("AJOB")
    async def ajob(n: int) -> int:
        rig.journal("began", n)
        await asyncio.sleep(0)
        return n

    handles = []
    for turn in range(12):
        worker = rig.worker(ready=False)
        base = turn * 400
        handles += rig.frame("JOB", [{"n": base + n} for n in range(200)])
        handles += rig.frame("AJOB", [{"n": base + n} for n in range(200, 400)])
        wanted = turn * 37 + 1
        wait_until(lambda wanted=wanted: len(rig.journal.count("began")) >= wanted or False, 10)
        assert worker.drain() == 0, worker.told()
        assert rig.books().problems() == []
    rig.worker()
    rig.wait_ended()
    assert rig.journal.count("began") == dict.fromkeys(range(4_800), 1)
    assert [handle.result(timeout=1) for handle in handles[::97]] == list(range(0, 4_800, 97))
    finish(rig)


def test_stop_now_returns_what_runs_beside_others(rig: Rig) -> None:
    @rig.app.task("ASLEEP")
    async def asleep(n: int) -> int:
        rig.journal("began", n)
        await asyncio.sleep(30)
        return n

    @rig.app.task("SLEEP")
    def sleep(n: int) -> None:
        rig.journal("began", n)
        for _ in range(3_000):
            time.sleep(0.01)

    worker = rig.worker()
    rig.frame("ASLEEP", [{"n": n} for n in range(20)])
    began(rig, 19)
    rig.submit("SLEEP", {"n": 20})
    began(rig, 20)
    worker.say(layout.STOP_DRAIN)
    pass_time(0.2)
    assert worker.running
    worker.say(layout.STOP_NOW)
    assert worker.wait(5) == 0
    books = rig.books()
    assert books.problems() == [] and books.states() == {"queued": 21}
    for frame in rig.redis.zrange(rig.keys.sorted("normal"), 0, -1):
        header = codec.parse(frame)
        assert (header.run, header.attempts, header.crashes) == (1, 0, 0)


def test_a_worker_told_to_resync_goes_on_where_it_was(rig: Rig) -> None:
    """Takeovers without end under load: every job runs once, what runs meanwhile is not started again."""

    @rig.app.task("JOB")
    def job(n: int) -> int:
        rig.journal("began", n)
        time.sleep(0.0005)
        return n

    @rig.app.task("AJOB", timeout=30)
    async def ajob(n: int) -> int:
        rig.journal("began", n)
        await asyncio.sleep(0.05)
        return n

    worker = rig.worker()
    handles = [*rig.frame("JOB", [{"n": n} for n in range(1_000)])]
    handles += rig.frame("AJOB", [{"n": n} for n in range(1_000, 1_400)])
    names = {worker.incarnation}
    while sum(rig.stats().get(name, 0) for name in ("completed", "dead")) < 1_400:
        worker.say(layout.STOP_RESYNC)
        pass_time(0.02)
        names.add(worker.incarnation)
        assert len(rig.incarnations()) == 1
    rig.wait_ended()
    assert len(names) > 10 and worker.counter("takeovers") > 10
    assert rig.journal.count("began") == dict.fromkeys(range(1_400), 1)
    assert [handle.result(timeout=1) for handle in handles[::101]] == list(range(0, 1_400, 101))
    finish(rig)


# ------------------------------------------------------------------ frames that are not what they should be


def make(n: int, jobs: int = 1, *, tracked: bool = False, kind: bytes = b"JOB") -> bytes:
    body = [(kind, b'{"n":%d}' % (n + k), b"", False) for k in range(jobs)]
    made: bytes = codec.pack(
        body, frame_id=IDS.frame_id(), lane="normal", tracked=tracked, enqueued_us=1_700_000_000_000_000
    )
    return made


def test_a_frame_planted_in_a_live_workers_hash_runs(rig: Rig) -> None:
    """A late command of a connection that is gone leaves a lease in the hash of a worker that knows nothing
    of it."""

    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    @rig.app.task("BUSY")
    def busy() -> None:
        time.sleep(0.01)

    worker = rig.worker()
    for n, load in ((0, False), (10, True)):
        if load:
            rig.frame("BUSY", [{}] * 40)
        planted = make(n, 5)
        rig.redis.hset(rig.keys.processing(worker.incarnation), planted[4:45], planted)
        began(rig, n + 4, 5)
        wait_until(lambda: len(rig.leases().get(worker.incarnation, [])) <= 2, 5)
    rig.wait_ended(50)
    assert rig.journal.count("began") == dict.fromkeys((*range(5), *range(10, 15)), 1)
    finish_untold(rig)


def test_a_completed_frame_that_was_put_back_runs_or_returns(rig: Rig) -> None:
    """A failover undoes the last second: finished leases stand in the hash of a worker that has forgotten
    them."""

    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    worker = rig.worker()
    rig.client.pause("normal")
    rig.frame("JOB", [{"n": n} for n in range(3)])
    (frame,) = rig.redis.lrange(rig.keys.queue("normal"), 0, -1)
    rig.client.resume("normal")
    rig.wait_ended()
    wait_until(lambda: not rig.leases(), 5)
    rig.redis.hset(rig.keys.processing(worker.incarnation), frame[4:45], frame)
    wait_until(lambda: rig.journal.count("began")[2] == 2, 6)
    wait_until(lambda: not rig.leases(), 5)
    finish_untold(rig)


def test_damaged_frames_go_to_quarantine_and_their_neighbours_run(rig: Rig) -> None:
    """One bit flipped in each byte of the header, of the options and of the first job, truncations, and
    noise."""

    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    worker = rig.worker()
    damaged = []
    whole = make(10_000, 3)
    for at in range(len(whole)):
        for bit in (0, 3, 7):
            sick = bytearray(make(10_000, 3))
            sick[at] ^= 1 << bit
            # The time of entry is outside of the checksum: another digit is another time.
            if not (111 <= at < 127 and sick[at : at + 1].isdigit()):
                damaged.append(bytes(sick))
    damaged += [make(10_000, 3)[:size] for size in (0, 1, 50, 127, 128, 129, 140, 170)]
    damaged += [make(10_000) + b"x", b"\xff" * 200, b"F1@ " + b"\xe4" * 200]
    healthy = [make(n) for n in range(len(damaged))]
    with rig.redis.pipeline(transaction=True) as pipe:
        for sick, fit in zip(damaged, healthy, strict=True):
            pipe.rpush(rig.keys.queue("normal"), sick, fit)
        pipe.execute()
    wait_until(lambda: len(rig.journal.count("began")) == len(healthy), 20)
    wait_until(lambda: not rig.leases(), 10)
    assert rig.journal.count("began") == dict.fromkeys(range(len(healthy)), 1)
    aside = rig.redis.lrange(rig.keys.quarantine, 0, -1) + rig.redis.lrange(rig.keys.parked, 0, -1)
    assert Counter(aside) == Counter(damaged)
    assert worker.running and rig.stats()["quarantined"] + rig.stats().get("parked", 0) >= len(damaged)
    finish_untold(rig)


def test_a_damaged_tracked_frame_says_so(rig: Rig) -> None:
    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    rig.client.pause("normal")
    handles = rig.frame("JOB", [{"n": n} for n in range(3)])
    (frame,) = rig.redis.lrange(rig.keys.queue("normal"), 0, -1)
    rig.redis.lset(rig.keys.queue("normal"), 0, frame.replace(b'{"n":1}', b'{"n":7}'))
    rig.client.resume("normal")
    rig.worker()
    fit = rig.submit("JOB", {"n": 3})
    assert fit.result(timeout=5) is None
    wait_until(lambda: rig.stats().get("quarantined"), 5)
    books = rig.books()
    assert books.states() == {"damaged": 3, "completed": 1}
    assert rig.journal.count("began") == {3: 1}
    # As dead: nobody will run it until somebody looks after it.
    assert {handle.status() for handle in handles} == {"dead"}


def test_a_frame_of_a_newer_version_is_parked(rig: Rig) -> None:
    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    rig.worker()
    newer = b"F2" + make(7, 3)[2:]
    rig.redis.rpush(rig.keys.queue("normal"), newer, make(1))
    rig.redis.rpush(rig.keys.wake("normal"), "w")
    began(rig, 1)
    assert rig.redis.lrange(rig.keys.parked, 0, -1) == [newer]
    assert rig.journal.count("began") == {1: 1} and rig.stats()["parked"] == 1
    finish_untold(rig)


# ------------------------------------------------------------------ both kinds at once


def test_timers_of_coroutines_do_not_wait_for_sync_jobs(rig_of: Callable[..., Rig]) -> None:
    """200 coroutines with limits of one second beside sync jobs of two, which run on the helper thread."""
    rig = rig_of(concurrency=300)

    @rig.app.task("LIMITED", timeout=1, max_retries=0)
    async def limited(n: int) -> None:
        rig.journal("began", n)
        try:
            await asyncio.sleep(30)
        finally:
            rig.journal("ended", n)

    @rig.app.task("SYNC")
    def sync(n: int) -> None:
        rig.journal("sync", n)
        time.sleep(2)

    worker = rig.worker()
    rig.frame("LIMITED", [{"n": n} for n in range(100)])
    began(rig, 99)
    rig.submit("SYNC", {"n": 0})
    wait_until(lambda: rig.journal.count("sync"), 5)
    rig.frame("LIMITED", [{"n": n} for n in range(100, 200)])
    stats = rig.wait_ended()
    assert (stats["completed"], stats["dead"]) == (1, 200)
    starts = {note.words[1]: note.at_ns for note in rig.journal.notes("began")}
    late = {n: (note.at_ns - starts[n]) / 1e9 for note in rig.journal.notes("ended") for n in note.words[1:]}
    assert len(late) == 200
    slow = {n: s for n, s in late.items() if not 0.95 <= s <= 1.4}
    assert slow == {}
    assert worker.running
    finish(rig)


def test_sync_jobs_beside_coroutines_have_their_limits(rig: Rig) -> None:
    """On the helper thread a soft limit is raised by name of the thread."""

    @rig.app.task("BESIDE")
    async def beside() -> None:
        rig.journal("beside")
        while not rig.journal.notes("go"):
            await asyncio.sleep(0.01)

    @rig.app.task("SLOW", timeout=0.2, max_retries=0)
    def slow(n: int) -> None:
        rig.journal("began", n)
        while True:
            time.sleep(0.005)

    @rig.app.task("FINE")
    def fine(n: int) -> int:
        return n

    rig.worker()
    rig.submit("BESIDE")
    wait_until(lambda: rig.journal.notes("beside"), 5)
    late, good = rig.submit("SLOW", {"n": 1}), [rig.submit("FINE", {"n": n}) for n in range(20)]
    assert [handle.result(timeout=5) for handle in good] == list(range(20))
    wait_until(lambda: late.status() == "dead", 5)
    assert rig.told(late)["error"]["reason"] == "timeout"
    rig.journal("go")
    rig.wait_ended()
    finish(rig)


def both_kinds(rig: Rig) -> None:
    """A coroutine that lasts until "go", and a sync job; each tells its process, the latter its thread."""

    @rig.app.task("HOLD")
    async def hold() -> None:
        rig.journal("hold", 0)
        while not rig.journal.notes("go"):
            await asyncio.sleep(0.005)

    @rig.app.task("SYNC")
    def sync() -> None:
        rig.journal("sync", threading.current_thread() is threading.main_thread())


def test_a_sync_job_that_meets_coroutines_goes_to_a_worker_without(rig: Rig) -> None:
    both_kinds(rig)
    rig.worker()
    rig.worker()
    wait_until(lambda: all(one.view.get(layout.C_PHASE) == layout.PHASE_IDLE for one in rig.workers), 5)
    mixed = rig.client.submit_many([("HOLD", {}), ("SYNC", {})])  # one frame: one worker gets both
    rig.ids += [handle.id for handle in mixed]
    wait_until(lambda: rig.journal.notes("sync") and rig.journal.notes("hold"), 10)
    (held,), (ran,) = rig.journal.notes("hold"), rig.journal.notes("sync")
    assert held.pid != ran.pid and ran.words == ("sync", True)
    rig.journal("go")
    rig.wait_ended()
    finish(rig)


def test_a_sync_job_that_meets_coroutines_everywhere_runs_on_the_helper(rig: Rig) -> None:
    both_kinds(rig)
    rig.worker()
    mixed = rig.client.submit_many([("HOLD", {}), ("SYNC", {})])
    rig.ids += [handle.id for handle in mixed]
    wait_until(lambda: rig.journal.notes("sync") and rig.journal.notes("hold"), 10)
    (held,), (ran,) = rig.journal.notes("hold"), rig.journal.notes("sync")
    assert held.pid == ran.pid and ran.words == ("sync", False)
    rig.journal("go")
    rig.wait_ended()
    finish(rig)


def test_a_worker_without_coroutines_begins_with_its_sync_jobs(rig: Rig) -> None:
    """Else the first coroutine sends them all to others, or to the helper thread."""
    both_kinds(rig)
    rig.submit("HOLD")
    rig.submit("SYNC")
    rig.worker()
    wait_until(lambda: rig.journal.notes("sync") and rig.journal.notes("hold"), 10)
    assert [note.words for note in rig.journal.notes()] == [("sync", True), ("hold", 0)]
    rig.journal("go")
    rig.wait_ended()
    finish(rig)


@pytest.mark.parametrize("concurrency", [1, 7])
def test_no_more_coroutines_run_than_allowed(rig_of: Callable[..., Rig], concurrency: int) -> None:
    rig = rig_of(concurrency=concurrency)

    @rig.app.task("COUNT")
    async def count(n: int) -> None:
        rig.journal("began", n)
        await asyncio.sleep(0.005)
        rig.journal("ended", n)

    rig.worker()
    rig.worker()
    rig.frame("COUNT", [{"n": n} for n in range(60)])
    rig.wait_ended()
    for worker in rig.workers:
        running = most = 0
        for note in rig.journal.notes():
            if note.pid == worker.pid:
                running += 1 if note.words[0] == "began" else -1
                most = max(most, running)
        assert 0 < most <= concurrency
    assert rig.journal.count("began") == dict.fromkeys(range(60), 1)
    finish(rig)


def test_every_supported_server_serves_a_worker(any_redis: RedisServer, rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(any_redis)

    @rig.app.task("MIX")
    def mix(n: int) -> int | None:
        rig.journal("began", n)
        if n % 10 == 3:
            raise ValueError(n)
        return n if n % 2 else None

    @rig.app.task("AMIX")
    async def amix(n: int) -> int | None:
        await asyncio.sleep(0.001)
        return mix(n)

    rig.steward()
    rig.worker()
    rig.worker()
    handles = [*rig.frame("MIX", [{"n": n} for n in range(200)], max_retries=1)]
    handles += rig.frame("AMIX", [{"n": n} for n in range(200, 400)], max_retries=0)
    rig.wait_ended()
    assert handles[201].result(timeout=1) == 201
    assert rig.books().states() == {"completed": 360, "dead": 40}
    finish(rig)
