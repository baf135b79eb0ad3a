"""Workers and a Redis that misbehaves: flushed scripts, killed connections, restarts, silence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.chaos.proxy import HANG, Proxy, every, named, runs
from tests.support.ports import reserved_port
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker import Rig
from tqe.board import layout
from tqe.job import IDS
from tqe.store import housekeeping, settling, wire, working
from tqe.store.call import SyncDoor
from tqe.store.scripts import SCRIPTS
from tqe.worker import loop


@pytest.fixture
def proxy(redis_server: RedisServer, tmp_path: Path) -> Iterator[Proxy]:
    """Stands between the workers and the shared server."""
    with Proxy(redis_server.socket, redis_server.folder / "proxy.sock") as made:
        yield made
    (redis_server.folder / "proxy.sock").unlink(missing_ok=True)
    assert made.errors == []


def finish(rig: Rig) -> None:
    for worker in rig.workers:
        if worker.running:
            assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []


def load(rig: Rig, ms: float = 1.0) -> None:
    """Tasks of all kinds that journal each start."""

    @rig.app.task("JOB")
    def job(n: int) -> int | None:
        rig.journal("began", n)
        time.sleep(ms / 1000)
        return n if n % 3 else None

    @rig.app.task("AJOB")
    async def ajob(n: int) -> int:
        rig.journal("began", n)
        await asyncio.sleep(ms / 100)
        return n


def submit(rig: Rig, jobs: int) -> list[Any]:
    half = jobs // 2
    handles = [*rig.frame("JOB", [{"n": n} for n in range(half)])]
    return [*handles, *rig.frame("AJOB", [{"n": n} for n in range(half, jobs)])]


def ran_once(rig: Rig, jobs: int) -> None:
    assert rig.journal.count("began") == dict.fromkeys(range(jobs), 1)


def ended(rig: Rig) -> int:
    stats = rig.stats()
    return sum(stats.get(name, 0) for name in ("completed", "dead", "cancelled", "expired"))


def test_flushed_scripts_are_no_event(rig: Rig) -> None:
    load(rig)
    worker = rig.worker()
    submit(rig, 800)
    flushed = 0
    while ended(rig) < 800:
        rig.redis.script_flush()
        flushed += 1
        time.sleep(0.005)
    assert flushed > 10
    ran_once(rig, 800)
    assert worker.counter("takeovers") == 1  # nothing was unknown, so nothing had to be taken over
    finish(rig)


def test_killed_connections_lose_nothing_and_repeat_nothing(rig: Rig) -> None:
    load(rig)
    worker = rig.worker()
    handles = submit(rig, 800)
    killed = 0
    mine = rig.redis.client_id()
    while ended(rig) < 800:
        for client in rig.redis.client_list():
            if int(client["id"]) != mine:
                killed += rig.redis.client_kill_filter(_id=client["id"])
        time.sleep(0.03)
    assert killed > 10 and worker.counter("takeovers") > 5
    ran_once(rig, 800)
    assert handles[799].result(timeout=5) == 799
    assert rig.stats()["completed"] == 800
    finish(rig)


@pytest.mark.alone
def test_a_killed_redis_comes_back_and_nothing_is_lost(
    make_redis: Callable[..., RedisServer], rig_of: Callable[..., Rig]
) -> None:
    """kill -9 of the server: what was acknowledged is in its AOF. Work goes on within two seconds of its
    return."""
    rig = rig_of(make_redis(appendfsync="always"))
    load(rig, 2)
    worker = rig.worker()
    handles = submit(rig, 600)
    for _ in range(2):
        before = ended(rig)
        wait_until(lambda before=before: ended(rig) > before + 50, 10)
        rig.server.kill()
        time.sleep(0.3)
        rig.server.start()
        back = time.monotonic()
        before = ended(rig)
        wait_until(lambda before=before: ended(rig) > before, 10)
        assert time.monotonic() - back < 2
    rig.wait_ended()
    # The server may die between applying a command and answering it, so that a lease is taken over and seen
    # to be gone.
    ran_once(rig, 600)
    assert handles[599].result(timeout=5) == 599 and worker.running
    assert worker.counter("takeovers") >= 3
    finish(rig)


@pytest.mark.parametrize("which", ["scripts", "tokens", pytest.param("all", marks=pytest.mark.campaign)])
def test_a_silent_connection_is_noticed(rig_of: Callable[..., Rig], proxy: Proxy, which: str) -> None:
    """A peer that is gone without a word sends no reset: what is overdue is given up."""
    rig = rig_of(lease_ms=3_000)
    load(rig)
    worker = rig.worker(url=proxy.url)
    wait_until(lambda: worker.view.get(layout.C_PHASE) == layout.PHASE_IDLE, 5)
    rule = None
    if which == "all":
        proxy.silence()
    else:
        rule = proxy.black_hole(runs(SCRIPTS["fetch"].sha) if which == "scripts" else named("BLPOP"))
        wait_until(rule.fired.is_set, 5)
    submit(rig, 20)
    if which == "all":
        time.sleep(0.5)
        proxy.heal()
    rig.wait_ended(timeout=6)
    ran_once(rig, 20)
    finish(rig)


def test_replies_in_single_bytes_are_understood(rig: Rig, proxy: Proxy) -> None:
    load(rig, 0.1)
    proxy.slice_replies = True
    worker = rig.worker(url=proxy.url)
    submit(rig, 60)
    rig.wait_ended()
    ran_once(rig, 60)
    assert worker.counter("takeovers") == 1
    finish(rig)


@pytest.mark.parametrize(
    "error",
    [
        "LOADING Redis is loading",
        *(pytest.param(e, marks=pytest.mark.campaign) for e in ("BUSY", "READONLY")),
    ],
)
def test_a_server_that_refuses_for_a_while_is_asked_again(rig: Rig, proxy: Proxy, error: str) -> None:
    load(rig)
    rule = proxy.answer(lambda command: bool(command.sha), f"-{error}\r\n".encode(), nth=3, times=5)
    worker = rig.worker(url=proxy.url)
    submit(rig, 100)
    rig.wait_ended()
    ran_once(rig, 100)
    assert rule.fired.is_set() and worker.running
    finish(rig)


def test_a_server_that_is_full_does_not_stop_workers(rig: Rig) -> None:
    """At maxmemory nothing is accepted, and all that was is finished: that is what frees memory."""
    load(rig)

    @rig.app.task("FAIL", max_retries=0)
    def fail(n: int) -> None:
        rig.journal("began", n)
        raise ValueError(n)

    submit(rig, 200)
    rig.frame("FAIL", [{"n": n} for n in range(200, 220)])
    rig.redis.config_set("maxmemory", "1")
    worker = rig.worker()
    wait_until(lambda: ended(rig) == 220, 15)
    rig.redis.config_set("maxmemory", "0")
    ran_once(rig, 220)
    assert worker.counter("takeovers") == 1
    finish(rig)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda reply: b"!!" + reply, id="no-protocol"),
        # Announced and never ended: collected until the deadline, if there were no cap.
        pytest.param(lambda reply: b"$500000000\r\n" + bytes(1 << 20), id="too-long"),
    ],
)
def test_garbage_instead_of_a_reply_ends_the_connection_only(
    rig_of: Callable[..., Rig], proxy: Proxy, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(wire, "REPLY_BYTES_MAX", 1 << 19)
    rig = rig_of(lease_ms=120_000)  # the deadline of a reply is a third of that: longer than the test waits
    load(rig)
    rule = proxy.corrupt_reply(runs(SCRIPTS["fetch"].sha), spoil, nth=3)
    worker = rig.worker(url=proxy.url)
    submit(rig, 100)
    rig.wait_ended()
    assert rule.fired.is_set() and worker.running and worker.counter("takeovers") == 2
    ran_once(rig, 100)
    finish(rig)


# ------------------------------------------------------------------ leases


def reap(rig: Rig, incarnation: str) -> int:
    """What a reaper elsewhere does with an incarnation whose lease has ended: leases that it returned."""
    door = SyncDoor(rig.redis)
    mine = IDS.frame_id().decode()
    end = int(rig.redis.zscore(rig.keys.incarnations, incarnation))
    call = working.takeover(rig.keys, incarnation, mine, rig.settings.lease_ms, guard=str(end))
    taken = working.read_takeover(door.run(call))
    batch = settling.recover(taken.leases, [], settling.CrashPolicy(reason="reaped", reaped=True))
    settled = housekeeping.settle(door, rig.keys, mine, batch, result_ttl_s=3600, dlq_max=1000)
    door.run(working.leave(rig.keys, mine))
    return settled.applied


def ended_lease(rig: Rig, incarnation: str) -> bool:
    seconds, us = rig.redis.time()
    return rig.redis.zscore(rig.keys.incarnations, incarnation) < seconds * 1000 + us // 1000


def test_a_stopped_worker_that_goes_on_after_its_lease_changes_nothing(rig_of: Callable[..., Rig]) -> None:
    """SIGSTOP past the lease: its jobs have gone to others, and what it still says is refused."""
    rig = rig_of(lease_ms=1_000)

    @rig.app.task("JOB")
    def job(n: int) -> int:
        rig.journal("began", n)
        if n == 7 and rig.journal.count("began")[7] == 1:
            os.kill(os.getpid(), signal.SIGSTOP)  # goes on when somebody says SIGCONT
        return n

    rig.redis.hset(rig.keys.means, "JOB", 50)  # µs: a worker keeps the whole frame, and times each job
    stopped = rig.worker()
    first = stopped.incarnation
    handles = rig.frame("JOB", [{"n": n} for n in range(10)])
    wait_until(lambda: rig.journal.count("began")[7], 5)
    wait_until(lambda: ended_lease(rig, first), 5)
    assert reap(rig, first) >= 1
    second = rig.worker()
    for handle in handles:
        handle.result(timeout=10)
    ran = rig.journal.count("began")
    os.kill(stopped.pid, signal.SIGCONT)
    wait_until(lambda: stopped.incarnation != first, 5)
    assert rig.submit("JOB", {"n": 100}).result(timeout=5) == 100
    after = rig.journal.count("began") - Counter({100: 1})
    # The job that stood still has ended twice; none of those behind it was started by the worker that had
    # lost them.
    assert after == ran and ran[7] == 2 and {ran[8], ran[9]} == {1}
    assert rig.stats()["completed"] == 11 and rig.stats()["fenced"] >= 1
    assert second.running and stopped.running
    finish(rig)


def test_without_a_steward_a_long_job_outlives_its_lease(rig_of: Callable[..., Rig]) -> None:
    """Nobody reaped it, so the worker finds its leases as they were, and starts the next job only then."""
    # One slice: else the reply to a fetch may extend the lease between the jobs, before anybody looks.
    rig = rig_of(lease_ms=1_000, quantum_us=6_000_000)

    @rig.app.task("JOB")
    def job(n: int, s: float) -> int:
        rig.journal("began", n)
        time.sleep(s)
        return n

    worker = rig.worker()
    rig.frame("JOB", [{"n": n, "s": 0} for n in range(600)])
    rig.wait_ended()
    handles = rig.frame("JOB", [{"n": 600, "s": 1.3}, *({"n": n, "s": 0} for n in range(601, 620))])
    assert [handle.result(timeout=5) for handle in handles] == list(range(600, 620))
    ran_once(rig, 620)
    assert worker.counter("takeovers") >= 2
    finish(rig)


def test_an_incarnation_that_redis_forgot_is_begun_anew(rig: Rig) -> None:
    load(rig)
    worker = rig.worker()
    submit(rig, 100)
    first = worker.incarnation
    wait_until(lambda: ended(rig) > 10, 10)
    rig.redis.zrem(rig.keys.incarnations, first)
    rig.wait_ended()
    wait_until(lambda: worker.incarnation != first, 5)
    ran_once(rig, 100)
    finish(rig)


def test_all_data_gone_is_survived(rig: Rig) -> None:
    """FLUSHALL under a running worker: what was there is lost, what comes is served."""
    load(rig)
    worker = rig.worker()
    submit(rig, 200)
    wait_until(lambda: ended(rig) > 10, 10)
    rig.redis.flushall()
    rig.ids.clear()
    handle = rig.submit("AJOB", {"n": 1_000})
    assert handle.result(timeout=5) == 1_000
    assert worker.running
    assert worker.drain() == 0
    assert rig.leases() == {} and rig.incarnations() == []


def test_stop_now_ends_a_worker_whose_redis_is_gone(
    make_redis: Callable[..., RedisServer], rig_of: Callable[..., Rig]
) -> None:
    rig = rig_of(make_redis())
    load(rig)
    worker = rig.worker()
    rig.server.kill()
    wait_until(lambda: worker.counter("reconnects"), 5)
    worker.say(layout.STOP_DRAIN)
    time.sleep(0.5)
    assert worker.running
    worker.say(layout.STOP_NOW)
    assert worker.wait(3) == 0
    assert "what was leased comes back" in worker.told()
    rig.server.start()


def test_a_worker_starts_while_redis_is_away(
    make_redis: Callable[..., RedisServer], rig_of: Callable[..., Rig]
) -> None:
    rig = rig_of(make_redis())
    load(rig)
    rig.server.kill()
    worker = rig.worker(ready=False)
    wait_until(lambda: worker.counter("reconnects") >= 2, 5)
    rig.server.start()
    submit(rig, 10)
    rig.wait_ended(timeout=5)
    ran_once(rig, 10)
    finish(rig)


def test_silence_towards_everything_is_survived(rig_of: Callable[..., Rig], proxy: Proxy) -> None:
    """Silent in the middle of work: what was sent and not answered is neither lost nor run again."""
    rig = rig_of(lease_ms=3_000)
    load(rig)
    rig.worker(url=proxy.url)
    submit(rig, 300)
    wait_until(lambda: ended(rig) > 50, 10)
    rule = proxy.drop_reply(every, then=HANG)
    wait_until(rule.fired.is_set, 5)
    rig.wait_ended(timeout=8)
    ran_once(rig, 300)
    finish(rig)


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize("user", ["", "worker"])
def test_a_worker_logs_in_over_tcp_and_uses_its_database(
    make_redis: Callable[..., RedisServer], rig_of: Callable[..., Rig], user: str
) -> None:
    port = reserved_port()
    server = make_redis(port=str(port))
    with contextlib.closing(server.client()) as admin:
        if user:
            admin.acl_setuser(
                user, enabled=True, passwords=["+p@ss:word"], keys=["*"], channels=["*"], categories=["+@all"]
            )
        else:
            admin.config_set("requirepass", "p@ss:word")
        rig = rig_of(server, redis_url=f"redis://{user}:p%40ss%3Aword@127.0.0.1:{port}/3")
        rig.redis = redis.Redis(port=port, db=3, username=user or None, password="p@ss:word")
        load(rig)
        worker = rig.worker(url=rig.settings.redis_url)
        submit(rig, 40)
        rig.wait_ended()
        ran_once(rig, 40)
        finish(rig)
        assert worker.counter("takeovers") == 1
        assert "p@ss" not in worker.told() and "p%40ss" not in worker.told()


def test_a_wrong_password_is_told_without_it(
    make_redis: Callable[..., RedisServer], rig_of: Callable[..., Rig]
) -> None:
    port = reserved_port()
    server = make_redis(port=str(port))
    rig = rig_of(server)
    load(rig)
    with contextlib.closing(server.client()) as admin:
        admin.config_set("requirepass", "right")
        worker = rig.worker(url=f"redis://:wrong@127.0.0.1:{port}/0", ready=False)
        wait_until(lambda: worker.counter("reconnects") >= 2, 5)
        assert (
            "WRONGPASS" in worker.told() and "wrong@" not in worker.told() and ":wrong" not in worker.told()
        )
        worker.say(layout.STOP_NOW)
        assert worker.wait(3) == 0
        admin.config_set("requirepass", "")


@pytest.mark.parametrize(
    ("load", "woken"), [("sync", True), ("mixed", True), ("frames", True), ("mixed", False)]
)
def test_work_goes_on_without_the_tick(
    rig: Rig, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, load: str, woken: bool
) -> None:
    """Whatever ends while a worker waits for a slow reply, a job or another reply, it goes on then, and not
    when
    it next looks at its board, here every five seconds. Not `woken`: what that looks like when it is
    broken."""
    monkeypatch.setattr(loop, "TICK_S", 5.0)
    if not woken:
        monkeypatch.setattr(loop.Worker, "_wake", lambda self, future: None)

    @rig.app.task("LONG")
    async def long() -> None:
        while not rig.journal.notes("go"):
            await asyncio.sleep(0.02)

    @rig.app.task("JOB")
    def job(n: int) -> None:
        rig.journal("began", n)

    @rig.app.task("AJOB")
    async def ajob(n: int) -> None:
        rig.journal("began", n)

    proxy.latency_s = 0.004
    rig.worker(url=proxy.url)
    rig.submit("LONG")
    kinds = ["JOB", "JOB" if load == "sync" else "AJOB"]
    if load == "frames":
        for first, kind in enumerate(kinds):
            rig.frame(kind, [{"n": n} for n in range(first, 300, 2)])
    else:
        for n in range(300):
            rig.submit(kinds[n % 2], {"n": n})
    if woken:
        rig.wait_ended(300, timeout=4)
        ran_once(rig, 300)
    else:
        with pytest.raises(AssertionError):
            rig.wait_ended(300, timeout=1.5)
    rig.journal("go")
