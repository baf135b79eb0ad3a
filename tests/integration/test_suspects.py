"""Suspects: what may have ended a host runs alone, marked before it starts, and is charged for a host."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.proxy import HANG, Match, Proxy, runs
from tests.integration.test_lost_replies import (
    MODES,
    Expected,
    check,
    context,
    fault,
    let_it_come,
    proxy,
    settle_kinds,
    taken_over_from,
)
from tests.support.waiting import wait_until
from tests.support.worker import Rig, WorkerProcess
from tqe import codec
from tqe.board import layout
from tqe.job import IDS
from tqe.steward.recovery import Recovery
from tqe.store import housekeeping, settling, working
from tqe.store.call import SyncDoor
from tqe.store.scripts import SCRIPTS
from tqe.worker import suspects

__all__ = ["proxy"]

SUSPECT, STARTED = codec.SUSPECT, codec.STARTED


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "POSTPONE_MS", 100)
    monkeypatch.setattr(settling, "CRASH_DELAY_MS", 20)


def suspect(rig: Rig, *, flags: int = SUSPECT) -> None:
    """What waits in the normal lane are suspects from now on."""
    key = rig.keys.queue("normal")
    frames = rig.redis.lrange(key, 0, -1)
    rig.redis.delete(key)
    rig.redis.rpush(key, *(codec.rewrite(one, flags=codec.peek(one).flags | flags) for one in frames))


def flags_held(rig: Rig) -> list[tuple[int, int]]:
    """(jobs, flags) of each lease."""
    found = [one for key in rig.redis.keys(rig.keys.processing("*")) for one in rig.redis.hvals(key)]
    headers = [codec.peek(one) for one in found]
    return sorted((one.n, one.flags & (SUSPECT | STARTED)) for one in headers)


def tasks(rig: Rig) -> None:
    """Jobs that tell when they begin and end, and what Redis holds meanwhile."""

    @rig.app.task("JOB")
    def job(n: int, s: float = 0.0) -> None:
        rig.journal("began", n)
        with rig.server.client() as own:
            held = [one for key in own.keys(rig.keys.processing("*")) for one in own.hvals(key)]
        rig.journal("held", n, [codec.peek(one).flags & (SUSPECT | STARTED) for one in held])
        time.sleep(s)
        rig.journal("ended", n)

    @rig.app.task("ASYNC")
    async def asynchronous(n: int, s: float = 0.0) -> None:
        rig.journal("began", n)
        await asyncio.sleep(s)
        rig.journal("ended", n)

    @rig.app.task("BOMB")
    def bomb(n: int) -> None:
        rig.journal("began", n)
        os.kill(os.getpid(), signal.SIGKILL)

    @rig.app.task("ABOMB")
    async def abomb(n: int) -> None:
        rig.journal("began", n)
        await asyncio.sleep(0.05)
        rig.journal("bang", n)
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGKILL)
        await asyncio.sleep(5)


def finish(rig: Rig) -> None:
    for worker in rig.workers:
        if worker.running:
            assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []
    assert not any(worker.view.get(layout.C_SUSPECT) for worker in rig.workers if worker.code == 0)


def order(rig: Rig) -> list[tuple[str, int]]:
    return [(note.words[0], note.words[1]) for note in rig.journal.notes() if note.words[0] != "held"]


# ------------------------------------------------------------------ alone


@pytest.mark.parametrize("kind", ["JOB", "ASYNC"])
def test_suspects_run_one_after_the_other_in_frames_of_one(rig: Rig, kind: str) -> None:
    tasks(rig)
    rig.frame(kind, [{"n": n} for n in range(40)])
    suspect(rig)
    rig.submit("JOB", {"n": 100})
    rig.submit("ASYNC", {"n": 101, "s": 0.05})
    rig.worker()
    assert rig.wait_ended()["completed"] == 42
    finish(rig)
    told = order(rig)
    for n in range(40):
        assert told.index(("ended", n)) == told.index(("began", n)) + 1, told
    for note in rig.journal.notes("held"):
        if note.words[1] < 40:
            assert note.words[2] == [SUSPECT | STARTED]  # nothing else is held while it runs


def test_a_suspect_waits_for_the_coroutines_of_its_worker(rig: Rig) -> None:
    tasks(rig)
    rig.frame("ASYNC", [{"n": n, "s": 0.3} for n in range(10)])
    rig.worker()
    wait_until(lambda: len(rig.journal.notes("began")) == 10, 5)
    plant(rig, "JOB", 50)
    rig.wait_ended()
    finish(rig)
    assert order(rig)[-2:] == [("began", 50), ("ended", 50)]


def plant(rig: Rig, kind: str, n: int, **fields: Any) -> None:
    """Submit one suspect without giving a worker the time to see it before."""
    rig.redis.sadd(rig.keys.paused, "normal")
    rig.submit(kind, {"n": n, **fields})
    suspect(rig)
    rig.redis.delete(rig.keys.paused)
    rig.redis.lpush(rig.keys.wake("normal"), "w")


def test_an_idle_neighbour_gets_the_suspect_of_a_worker_that_is_busy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks(rig)
    monkeypatch.setattr(suspects, "REST_NS", 2_000_000_000)
    busy = rig.worker()
    rig.frame("ASYNC", [{"n": n, "s": 1.5} for n in range(3)])
    wait_until(lambda: len(rig.journal.notes("began")) == 3, 5)
    other = rig.worker()
    wait_until(lambda: other.view.get(layout.C_PHASE) == layout.PHASE_IDLE, 5)
    for n in range(50, 56):
        plant(rig, "JOB", n)
        wait_until(lambda n=n: rig.journal.count("ended")[n], 5)
    assert {note.pid for note in rig.journal.notes("ended") if note.words[1] >= 50} == {other.pid}
    assert busy.view.get(layout.C_ASYNC) == 3
    rig.wait_ended()
    finish(rig)


def test_a_worker_that_can_never_be_alone_goes_on_with_other_work(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its coroutine runs for long: the suspect comes again later, and what else there is runs meanwhile."""
    tasks(rig)
    monkeypatch.setattr(suspects, "OWN_WAIT_NS", 50_000_000)
    rig.worker()
    rig.submit("ASYNC", {"n": 1, "s": 1.0})
    wait_until(lambda: rig.journal.count("began")[1], 5)
    plant(rig, "JOB", 50)
    wait_until(lambda: rig.redis.zcard(rig.keys.delayed) == 1, 5)
    rig.submit("ASYNC", {"n": 2})
    wait_until(lambda: rig.journal.count("ended")[2], 5)
    assert not rig.journal.count("ended")[1]
    rig.steward()
    rig.wait_ended()
    finish(rig)
    assert rig.journal.count("began")[50] == 1


def test_two_workers_of_a_host_never_run_two_suspects(rig: Rig) -> None:
    """One would be charged for the host that the other one ends."""
    tasks(rig)
    for n in range(30):
        rig.submit("JOB", {"n": n, "s": 0.005})
    suspect(rig)
    rig.steward()
    rig.worker()
    rig.worker()
    assert rig.wait_ended()["completed"] == 30
    finish(rig)
    told = order(rig)
    assert all(told.index(("ended", n)) == told.index(("began", n)) + 1 for n in range(30)), told
    for note in rig.journal.notes("held"):
        assert note.words[2].count(SUSPECT | STARTED) == 1


# ------------------------------------------------------------------ what ends a host


def reap(rig: Rig, incarnation: str) -> None:
    """What a reaper elsewhere does with a host that is gone, board and all."""
    door = SyncDoor(rig.redis)
    mine = IDS.frame_id().decode()
    taken = working.read_takeover(door.run(working.takeover(rig.keys, incarnation, mine, 60_000)))
    policy = settling.CrashPolicy(reason="reaped", reaped=True, crashes_max=rig.settings.crashes_max)
    batch = settling.recover(taken.leases, [], policy)
    housekeeping.settle(door, rig.keys, mine, batch, result_ttl_s=3600, dlq_max=1000)
    door.run(working.leave(rig.keys, mine))


def host_dies(rig: Rig, worker: WorkerProcess) -> None:
    worker.wait()
    incarnation = worker.incarnation
    worker.buried = True
    worker.view.set(layout.C_STATE, layout.FREE)  # another board altogether
    reap(rig, incarnation)


def test_a_job_that_takes_the_host_with_it_ends_in_the_dead_letter_queue(rig: Rig) -> None:
    """Two deaths without a name (the first is forgiven), then each is charged; its neighbours never are."""
    tasks(rig)
    rig.redis.hset(rig.keys.means, mapping={"JOB": 5, "BOMB": 5})  # µs: a worker keeps all of them together
    bomb = rig.submit("BOMB", {"n": 99})
    rig.frame("JOB", [{"n": n} for n in range(20)])
    rig.steward()
    deaths = 0
    while not rig.stats().get("dead"):
        worker = rig.worker(ready=False)  # it may be gone before anybody sees it ready
        wait_until(lambda before=deaths: rig.journal.count("began")[99] > before, 10)
        host_dies(rig, worker)
        deaths += 1
        assert deaths < 10
    rig.worker()
    assert rig.wait_ended() == {**rig.stats(), "completed": 20, "dead": 1}
    finish(rig)
    assert deaths == 2 + rig.settings.crashes_max
    assert rig.journal.count("began") == Counter({99: deaths, **dict.fromkeys(range(20), 1)})
    assert (rig.told(bomb)["crashes"], rig.told(bomb)["error"]["reason"]) == (3, "reaped")


def test_a_coroutine_that_ends_its_process_unseen_is_found_among_many(rig: Rig) -> None:
    """No step is marked when it happens. All that had started come back, each runs alone, one is charged."""
    tasks(rig)
    bomb = rig.submit("ABOMB", {"n": 13})
    handles = rig.frame("ASYNC", [{"n": n, "s": 0.2} for n in range(8)])
    rig.steward()
    deaths = 0
    while not rig.stats().get("dead"):
        worker = rig.worker(ready=False)  # it may be gone before anybody sees it ready
        wait_until(lambda one=worker: not one.running, 10, "the bomb goes off")
        worker.bury()
        wait_until(lambda one=worker: one.view.get(layout.C_STATE) == layout.RECOVERED, 5)
        worker.view.set(layout.C_STATE, layout.FREE)
        deaths += 1
    rig.worker()
    rig.wait_ended()
    finish(rig)
    assert rig.told(bomb)["crashes"] == 3
    assert deaths == 4  # the first one without a name
    assert not any("crashes" in rig.told(handle) for handle in handles)


# ------------------------------------------------------------------ the mark, lost and late


def marks() -> Match:
    is_settle = runs(SCRIPTS["settle"].sha)
    return lambda command: is_settle(command) and settle_kinds(command) == {"k"}


@pytest.mark.parametrize("mode", MODES)
def test_a_mark_whose_reply_is_lost(rig: Rig, proxy: Proxy, mode: str) -> None:
    tasks(rig)
    rig.frame("JOB", [{"n": n} for n in range(5)])
    suspect(rig)
    rule = fault(proxy, mode, marks())
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(10)
    taken_over_from(worker, rule)
    let_it_come(rule)
    check(rig, Expected(dict.fromkeys(range(5), 1), {"completed": 5}), worker)


def marked_and_not_started(rig: Rig, proxy: Proxy) -> WorkerProcess:
    tasks(rig)
    rig.submit("JOB", {"n": 1})
    suspect(rig)
    rule = proxy.drop_reply(marks(), then=HANG)
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(10)
    wait_until(lambda: flags_held(rig) == [(1, SUSPECT | STARTED)], 5)
    assert rig.journal.notes("began") == []  # it does not start before it knows
    return worker


def test_a_worker_that_dies_between_mark_and_start_charges_nobody(rig: Rig, proxy: Proxy) -> None:
    """Its board says that the job had not started."""
    worker = marked_and_not_started(rig, proxy)
    worker.kill()
    worker.bury()
    Recovery(context(rig)).run_once()
    (back,) = rig.redis.zrange(rig.keys.sorted("normal"), 0, -1)
    header = codec.peek(back)
    assert (header.flags & (SUSPECT | STARTED), header.crashes, header.reaps, header.run) == (
        SUSPECT,
        0,
        0,
        0,
    )
    rig.worker()
    rig.wait_ended()
    finish(rig)


def test_a_host_that_dies_between_mark_and_start_charges_the_suspect(rig: Rig, proxy: Proxy) -> None:
    """Nobody can tell; the window is the time of one reply."""
    worker = marked_and_not_started(rig, proxy)
    worker.kill()
    host_dies(rig, worker)
    (late,) = rig.redis.zrange(rig.keys.delayed, 0, -1)
    assert (codec.peek(late).crashes, codec.peek(late).flags & STARTED) == (1, 0)
    rig.steward()
    rig.worker()
    rig.wait_ended()
    finish(rig)


@pytest.mark.parametrize("where", ["waiting", "marking", "running"])
def test_a_drain_with_a_suspect_in_hand(rig: Rig, proxy: Proxy, where: str) -> None:
    tasks(rig)
    if where == "marking":
        rig.submit("JOB", {"n": 1})
        suspect(rig)
        rule = proxy.delay(marks(), 0.4)
        worker = rig.worker(url=proxy.url)
        assert rule.fired.wait(10)
    elif where == "waiting":
        worker = rig.worker()
        rig.submit("ASYNC", {"n": 100, "s": 0.6})
        wait_until(lambda: rig.journal.count("began")[100], 5)
        plant(rig, "JOB", 1)
        wait_until(lambda: (1, SUSPECT) in flags_held(rig), 5)
    else:
        worker = rig.worker()
        plant(rig, "JOB", 1, s=0.3)
        wait_until(lambda: rig.journal.count("began")[1], 5)
    assert worker.drain() == 0
    back = [
        codec.peek(one).flags & (SUSPECT | STARTED)
        for one in rig.redis.zrange(rig.keys.sorted("normal"), 0, -1)
    ]
    assert back == ([] if where == "running" else [SUSPECT])
    assert flags_held(rig) == []
    rig.worker()
    rig.wait_ended()
    finish(rig)
    assert rig.journal.count("began")[1] == 1


# ------------------------------------------------------------------ teeth


def test_without_the_mark_a_bomb_is_never_charged(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        settling, "marked", lambda frame, header, index: settling._one(
            header, index, settling.Part(settling.KEPT, b"", codec.single(frame, index), header.lane)
        )
    )  # fmt: skip
    tasks(rig)
    rig.submit("BOMB", {"n": 13})
    suspect(rig)
    for _ in range(4):
        host_dies(rig, rig.worker(ready=False))
    (back,) = rig.redis.zrange(rig.keys.sorted("normal"), 0, -1)
    assert codec.peek(back).crashes == 0


def test_without_the_hosts_word_two_suspects_run_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects.Suspects, "_first_on_host", lambda self: True)
    tasks(rig)
    for n in range(10):
        rig.submit("JOB", {"n": n, "s": 0.05})
    suspect(rig)
    rig.worker()
    rig.worker()
    rig.wait_ended()
    told = order(rig)
    assert any(told.index(("ended", n)) != told.index(("began", n)) + 1 for n in range(10))


def test_without_waiting_a_suspect_runs_beside_coroutines(
    rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of()

    def at_once(self: Any) -> None:
        if self._lease is not None and self._phase == suspects.WAITING and self._known(self._lease):
            self._mark(self._lease)

    monkeypatch.setattr(suspects.Suspects, "look", at_once)
    tasks(rig)
    rig.worker()
    rig.submit("ASYNC", {"n": 1, "s": 0.5})
    wait_until(lambda: rig.journal.count("began")[1], 5)
    plant(rig, "JOB", 50)
    wait_until(lambda: rig.journal.count("began")[50], 5)
    assert not rig.journal.count("ended")[1]
