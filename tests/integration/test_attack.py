"""What user code and unlucky moments do to a worker, its neighbours and its books."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker import Rig
from tqe import codec
from tqe.board import layout
from tqe.errors import JobFailed, ScriptError
from tqe.job import IDS
from tqe.store import wire
from tqe.supervisor import process


def finish(rig: Rig) -> None:
    """Drain every worker and look into the books."""
    for worker in rig.workers:
        if worker.running:
            assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []


# ------------------------------------------------------------------ what ends an event loop


@pytest.mark.parametrize("how", ["exit", "interrupt", "stop"])
def test_a_job_that_ends_the_loop_from_within_a_task_of_its_own_ends_nobody_else(rig: Rig, how: str) -> None:
    """asyncio lets SystemExit and KeyboardInterrupt of any task out of the loop; `loop.stop()` ends it."""

    async def inner() -> None:
        if how == "exit":
            sys.exit(3)
        if how == "interrupt":
            raise KeyboardInterrupt
        asyncio.get_running_loop().stop()

    @rig.app.task("NEIGHBOUR", max_retries=0)
    async def neighbour(n: int) -> int:
        rig.journal("began", n)
        await asyncio.sleep(1.0)
        return n

    @rig.app.task("ENDS", max_retries=0)
    async def ends() -> None:
        rig.journal("ends", 1)
        await asyncio.gather(inner())

    worker = rig.worker()
    neighbours = [rig.submit("NEIGHBOUR", {"n": n}) for n in range(3)]
    wait_until(lambda: len(rig.journal.notes("began")) == 3, 5, "the neighbours run")
    one = rig.submit("ENDS")
    assert [handle.result(timeout=5) for handle in neighbours] == [0, 1, 2]
    assert worker.running, worker.told()
    assert one.status() == ("completed" if how == "stop" else "dead")
    assert set(rig.journal.count("began").values()) == {1}
    finish(rig)


def test_jobs_that_are_cut_off_by_the_end_of_their_worker_are_not_charged(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends a worker's loop: the coroutines that asyncio then cancels have not failed."""
    from tqe.worker.loop import Worker

    @rig.app.task("WAITS", max_retries=0)
    async def waits(n: int) -> None:
        rig.journal("began", n)
        if len(rig.journal.notes("began")) <= 3:
            await asyncio.sleep(30)

    def broken(self: Worker) -> None:
        if len(rig.journal.notes("began")) == 3:
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(Worker, "_recycle", broken)
    rig.steward()
    worker = rig.worker()
    handles = [rig.submit("WAITS", {"n": n}) for n in range(3)]
    assert worker.wait() == 1
    worker.bury()
    monkeypatch.undo()
    rig.worker()
    for handle in handles:
        handle.result(timeout=5)
        told = rig.told(handle)
        assert told.get("attempts", 1) == 1 and "crashes" not in told
    finish(rig)


# ------------------------------------------------------------------ what a job's own tasks do


CHILDREN = ["gather", "group", "wait_for", "late"]


async def in_a_child(how: str, step: Callable[[], None]) -> None:
    """Run the step in a task of the job's own."""

    async def inner() -> None:
        await asyncio.sleep(0)
        step()

    if how == "gather":
        await asyncio.gather(inner(), asyncio.sleep(0.1))
    elif how == "group":
        async with asyncio.TaskGroup() as group:
            group.create_task(inner())
    elif how == "wait_for":
        await asyncio.wait_for(inner(), 5)
    else:
        asyncio.get_running_loop().call_soon(lambda: tasks.append(asyncio.ensure_future(inner())))
        tasks: list[asyncio.Future[None]] = []
        await asyncio.sleep(0.2)
        await tasks[0]


@pytest.mark.parametrize("how", CHILDREN)
def test_a_job_that_kills_its_worker_in_a_task_of_its_own_is_charged(rig: Rig, how: str) -> None:
    """With nobody charged it would come back for ever, and take its neighbours with it each time."""

    @rig.app.task("KILLER", max_retries=0)
    async def killer() -> None:
        rig.journal("killer", 1)
        await in_a_child(how, lambda: os.kill(os.getpid(), signal.SIGKILL))

    @rig.app.task("NEIGHBOUR", max_retries=0)
    async def neighbour() -> None:
        rig.journal("neighbour", 1)
        await asyncio.sleep(30 if rig.journal.count("neighbour")[1] == 1 else 0)

    rig.steward()
    worker = rig.worker()
    beside = rig.submit("NEIGHBOUR")
    wait_until(lambda: rig.journal.count("neighbour")[1], 5, "the neighbour runs")
    one = rig.submit("KILLER")
    worker.wait()
    worker.bury()
    wait_until(lambda: rig.told(one).get("crashes"), 5, "the killer is charged")
    assert rig.told(one)["crashes"] == 1
    assert not rig.told(beside).get("crashes")


@pytest.mark.parametrize("how", CHILDREN)
def test_a_task_of_a_jobs_own_that_blocks_the_loop_is_a_running_step_of_that_job(rig: Rig, how: str) -> None:
    """What the supervisor sees of it, and where its limit signal raises."""

    @rig.app.task("BLOCKS", timeout=30, max_retries=0)
    async def blocks() -> str:
        def block() -> None:
            rig.journal("began", 1)
            end = time.monotonic() + 20
            while time.monotonic() < end:
                time.sleep(0.01)

        try:
            await in_a_child(how, block)
        except BaseException as e:
            raised = e.exceptions[0] if isinstance(e, BaseExceptionGroup) else e
            return type(raised).__name__
        return "ran on"

    worker = rig.worker()
    one = rig.submit("BLOCKS")
    wait_until(lambda: rig.journal.notes("began"), 5, "it blocks")
    step = worker.view.get(layout.C_IN_USER)
    assert step, "the board says that a step runs"
    worker.view.set(layout.C_CONDEMN_KIND, layout.CONDEMN_SOFT)
    worker.view.set(layout.C_CONDEMN_STEP, step)
    os.kill(worker.pid, process.SOFT_SIGNAL)
    assert one.result(timeout=5) == "SoftTimeLimit"
    finish(rig)


def test_a_task_that_outlives_its_job_is_nobodys(rig: Rig) -> None:
    """Its job's row may be another lease's by then."""

    @rig.app.task("LEAVES")
    async def leaves() -> None:
        async def on() -> None:
            await asyncio.sleep(0.3)
            rig.journal("on", 1)
            time.sleep(0.5)
            rig.journal("off", 1)

        kept.append(asyncio.ensure_future(on()))

    kept: list[asyncio.Future[None]] = []
    worker = rig.worker()
    rig.submit("LEAVES").result(timeout=5)
    wait_until(lambda: rig.journal.notes("on"), 5, "what it left runs")
    assert worker.view.get(layout.C_IN_USER) == 0
    wait_until(lambda: rig.journal.notes("off"), 5, "it has ended")
    finish(rig)


def test_debuggers_and_libraries_see_the_coroutine_of_a_task(rig: Rig) -> None:
    @rig.app.task("LOOKS")
    async def looks() -> list[str]:
        async def inner() -> list[str]:
            await asyncio.sleep(0)
            task = asyncio.current_task()
            assert task is not None
            coroutine: Any = task.get_coro()
            return [coroutine.__name__, inspect.getcoroutinestate(coroutine), str("inner" in repr(task))]

        return await asyncio.create_task(inner())

    rig.worker()
    assert rig.submit("LOOKS").result(timeout=5) == ["inner", inspect.CORO_RUNNING, "True"]
    finish(rig)


# ------------------------------------------------------------------ outcomes that found no room


@pytest.mark.alone
def test_an_outcome_that_found_no_room_is_told_while_its_neighbours_run_on(rig: Rig) -> None:
    """Twenty results of 60 KiB at once do not fit in half the outcome area; each is told in time."""

    @rig.app.task("BIG")
    async def big(n: int) -> str | None:
        if n == 0:
            while not rig.journal.notes("told"):
                await asyncio.sleep(0.02)
            return None
        await asyncio.sleep(0.5)
        return "x" * 60_000

    rig.worker()
    rig.frame("BIG", [{"n": n} for n in range(21)])
    wait_until(lambda: rig.stats().get("completed", 0) >= 20, 4, "all but the slow one are told")
    rig.journal("told")
    rig.wait_ended()
    finish(rig)


# ------------------------------------------------------------------ what a foreign producer writes


def test_options_that_make_no_sense_end_their_job_and_not_the_worker(rig: Rig) -> None:
    """The CRC holds, so the frame is what its sender meant. If it ended the worker, it would come back for
    ever and be charged never, since its job had not started."""

    @rig.app.task("A")
    def a() -> None: ...

    worker = rig.worker()
    odd = [b"no JSON", b"[1]", b'{"timeout_ms":"1"}', b'{"max_retries":"x"}', b'{"expires_ms":-1e30}']
    for options in odd:
        for own in (options, b""):
            frame = codec.pack(
                [(b"A", b"{}", own, False)],
                frame_id=IDS.frame_id(),
                lane="normal",
                tracked=False,
                options=b"" if own else options,
            )
            rig.redis.rpush(rig.keys.queue("normal"), frame)
            rig.redis.hincrby(rig.keys.depth, "normal", 1)
    rig.submit("A").result(timeout=5)
    rig.wait_held()
    assert worker.running, worker.told()
    ended = rig.redis.hlen(rig.keys.dlq) + rig.redis.llen(rig.keys.quarantine)
    assert (ended, rig.stats()["completed"]) == (2 * len(odd), 1)


# ------------------------------------------------------------------ Redis that accepts and then says no


def test_a_connection_that_is_refused_at_the_greeting_is_closed(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    """A worker tries each second for as long as it takes. Connections left open would use up its files, and
    then it could not come back when Redis does."""

    async def refused(times: int) -> None:
        url = redis_server.url + ("&" if "?" in redis_server.url else "?") + "db=9999"
        before = len(redis_client.client_list())
        for _ in range(times):
            with pytest.raises(ScriptError, match="DB index"):
                await wire.connect(url, timeout_ms=2_000)
        await asyncio.to_thread(
            wait_until, lambda: len(redis_client.client_list()) <= before, 5, "all are closed"
        )

    asyncio.run(refused(5))


# ------------------------------------------------------------------ hard limits beside others


@pytest.mark.parametrize("kind", ["HANGS", "SWALLOWS"])
def test_a_hard_limit_holds_beside_others_too(rig_of: Callable[..., Rig], kind: str) -> None:
    """A soft limit does not reach a helper thread in a call that blocks, and a coroutine may swallow it.
    Without an end of the process the one would keep the helper, the other its slot, for ever."""
    rig = rig_of(hard_after_ms=300)

    @rig.app.task("HANGS", timeout=0.2, max_retries=0)
    def hangs() -> None:
        rig.journal("began", "HANGS")
        time.sleep(30)

    @rig.app.task("SWALLOWS", timeout=0.2, max_retries=0)
    async def swallows() -> None:
        rig.journal("began", "SWALLOWS")
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)

    @rig.app.task("NEIGHBOUR", max_retries=0)
    async def neighbour() -> None:
        rig.journal("began", "NEIGHBOUR")
        await asyncio.sleep(30 if rig.journal.count("began")["NEIGHBOUR"] == 1 else 0)

    rig.steward()
    worker = rig.worker()
    beside = rig.submit("NEIGHBOUR")
    wait_until(lambda: rig.journal.count("began")["NEIGHBOUR"], 5, "the neighbour runs")
    one = rig.submit(kind)
    worker.wait(timeout=5)
    worker.bury()
    with pytest.raises(JobFailed, match="hard"):
        one.result(timeout=5)
    rig.worker()
    beside.result(timeout=5)
    assert rig.told(beside).get("attempts", 1) == 1 and "crashes" not in rig.told(beside)
    assert "crashes" not in rig.told(one) or rig.told(one)["crashes"] == 0
    assert rig.journal.count("began")[kind] == 1
    finish(rig)


# ------------------------------------------------------------------ deaths while outcomes wait


def test_who_ended_while_redis_was_away_is_not_charged_for_a_kill(
    make_redis: Callable[..., RedisServer], rig_of: Callable[..., Rig]
) -> None:
    """Its outcome waits in memory and it runs again; but when the worker is killed meanwhile, nothing ran."""
    server = make_redis()
    rig = rig_of(server=server, lease_ms=2_000)

    @rig.app.task("A", max_retries=0)
    async def a() -> None:
        rig.journal("began", 1)
        await asyncio.sleep(5 if rig.journal.count("began")[1] == 1 else 0)
        rig.journal("ended", 1)

    worker = rig.worker()
    handle = rig.submit("A")
    wait_until(lambda: rig.journal.notes("began"), 5, "it runs")
    server.pause()
    wait_until(lambda: rig.journal.notes("ended"), 10, "it has ended")
    time.sleep(0.3)
    worker.kill()
    server.resume()
    rig.steward()
    worker.bury()
    rig.worker()
    handle.result(timeout=10)
    assert "crashes" not in rig.told(handle), rig.told(handle)
    finish(rig)
