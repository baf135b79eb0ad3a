"""What the code of tasks may do to its worker: submit, nest loops, fork, start processes."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import os
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.support.waiting import wait_until
from tests.support.worker import Rig


def finish(rig: Rig) -> None:
    for worker in rig.workers:
        if worker.running:
            assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []


def test_an_app_may_have_hundreds_of_tasks(rig: Rig) -> None:
    def echo(n: int) -> int:
        return n

    async def aecho(n: int) -> int:
        return n

    for k in range(300):
        rig.app.task(f"T{k}")(aecho if k % 2 else echo)
    rig.worker()
    handles = [rig.submit(f"T{k}", {"n": k}) for k in range(300)]
    assert [handle.result(timeout=5) for handle in handles] == list(range(300))
    finish(rig)


def test_a_task_may_have_many_parameters(rig: Rig) -> None:
    made: dict[str, Any] = {}
    exec(f"def wide({', '.join(f'a{k}: int' for k in range(100))}) -> int: return a0 + a99", made)
    rig.app.task("WIDE")(made["wide"])
    rig.worker()
    assert rig.submit("WIDE", {f"a{k}": k for k in range(100)}).result(timeout=5) == 99
    finish(rig)


def test_a_sync_task_may_run_an_event_loop_of_its_own(rig: Rig) -> None:
    """It runs inside of the worker's loop, which it must not see: asyncio.run() would refuse."""

    async def inner(n: int) -> int:
        await asyncio.sleep(0.001)
        return n

    @rig.app.task("NEST", max_retries=0)
    def nest(n: int) -> int:
        return asyncio.run(inner(n))

    @rig.app.task("BESIDE", max_retries=0)
    async def beside(n: int) -> int:
        return await inner(n)

    rig.worker()
    for n in range(3):
        assert rig.submit("NEST", {"n": n}).result(timeout=5) == n
        assert rig.submit("NEST", {"n": n}, max_retries=1).result(timeout=5) == n
        assert rig.submit("BESIDE", {"n": n}).result(timeout=5) == n
    finish(rig)


def test_what_a_start_hook_sets_in_its_context_coroutines_have(rig: Rig) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")
    rig.app.on_worker_start(lambda: tenant.set("ann"))

    @rig.app.task("WHO")
    async def who() -> str:
        await asyncio.sleep(0)
        return tenant.get()

    rig.worker()
    plain, with_options = rig.submit("WHO"), rig.submit("WHO", max_retries=1)
    assert [plain.result(timeout=5), with_options.result(timeout=5)] == ["ann", "ann"]
    finish(rig)


def test_jobs_submit_jobs(rig: Rig) -> None:
    @rig.app.task("CHILD")
    def child(n: int) -> int:
        return n

    @rig.app.task("PARENT")
    def parent(n: int) -> list[str]:
        return [handle.id for handle in child.submit_many([{"n": k} for k in range(n)])]

    @rig.app.task("APARENT")
    async def aparent(n: int) -> list[str]:
        return [(await child.asubmit(n=k)).id for k in range(n)]

    rig.worker()
    born = rig.submit("PARENT", {"n": 20}).result(timeout=5)
    born += rig.submit("APARENT", {"n": 20}).result(timeout=5)
    rig.ids += born
    rig.wait_ended()
    assert len(set(born)) == 40
    finish(rig)


def test_jobs_start_processes(rig: Rig) -> None:
    @rig.app.task("POOL")
    def pool(n: int) -> int:
        with multiprocessing.get_context("fork").Pool(1) as workers:
            return workers.apply(abs, (-n,))

    @rig.app.task("COMMAND")
    def command(n: int) -> str:
        return subprocess.run(["echo", str(n)], capture_output=True, text=True).stdout.strip()

    @rig.app.task("ACOMMAND")
    async def acommand(n: int) -> str:
        process = await asyncio.create_subprocess_exec("echo", str(n), stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0].decode().strip()

    @rig.app.task("ENDED")
    def ended(n: int) -> list[int | None]:
        program = subprocess.Popen(["sleep", "30"])
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        program.terminate()
        child.terminate()
        child.join(5)
        return [program.wait(5), child.exitcode]

    worker = rig.worker()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker.pid, number)  # it does not hear them, and what it starts does
    assert rig.submit("ENDED", {"n": 3}).result(timeout=5) == [-signal.SIGTERM, -signal.SIGTERM]
    assert rig.submit("POOL", {"n": 3}).result(timeout=5) == 3
    assert rig.submit("COMMAND", {"n": 3}).result(timeout=5) == "3"
    assert rig.submit("ACOMMAND", {"n": 3}).result(timeout=5) == "3"
    assert worker.counter("takeovers") == 1
    finish(rig)


def test_a_fork_that_returns_twice_is_no_second_worker(rig: Rig) -> None:
    """The child would go on as the worker, on the same connections: it has to end where the task returns."""

    @rig.app.task("FORK")
    def fork(n: int) -> int:
        pid = os.fork()
        if pid == 0:
            return -1
        _, status = os.waitpid(pid, 0)
        rig.journal("child", n, os.waitstatus_to_exitcode(status))
        return n

    @rig.app.task("AFORK")
    async def afork(n: int) -> int:
        await asyncio.sleep(0)
        return fork(n)

    @rig.app.task("AFTER")
    def after(n: int) -> int:
        rig.journal("after", n)
        return n

    worker = rig.worker()
    handles = rig.frame("FORK", [{"n": n} for n in range(3)])
    more = rig.frame("AFTER", [{"n": n} for n in range(50)])
    assert [handle.result(timeout=5) for handle in handles] == [0, 1, 2]
    assert [handle.result(timeout=5) for handle in more] == list(range(50))
    beside = rig.submit("AFORK", {"n": 3})
    assert beside.result(timeout=5) == 3
    assert rig.journal.count("after") == dict.fromkeys(range(50), 1)
    assert {note.pid for note in rig.journal.notes()} == {worker.pid}
    assert len(rig.journal.notes("child")) == 4
    assert worker.counter("takeovers") == 1
    finish(rig)


def test_large_payloads_flow(rig: Rig) -> None:
    @rig.app.task("BIG")
    def big(text: str) -> int:
        return len(text)

    rig.worker()
    handles = [rig.submit("BIG", {"text": os.urandom(250_000).hex()}) for _ in range(20)]
    assert [handle.result(timeout=10) for handle in handles] == [500_000] * 20
    finish(rig)


def test_thousands_of_frames_of_one_with_options(rig: Rig) -> None:
    def one(n: int) -> None:
        rig.journal("began", n)

    async def aone(n: int) -> None:
        rig.journal("began", n)

    rig.app.task("ONE")(one)
    rig.app.task("AONE")(aone)
    items = [("ONE" if n % 2 else "AONE", {"n": n}, {"expires": 100 + n}) for n in range(3_000)]
    rig.ids += [handle.id for handle in rig.client.submit_many(items)]
    for _ in range(2):
        rig.worker()
    rig.wait_ended(timeout=30)
    assert rig.journal.count("began") == dict.fromkeys(range(3_000), 1)
    finish(rig)


@pytest.mark.alone
def test_an_app_whose_start_hook_fails_tells_and_ends(rig: Rig) -> None:
    @rig.app.on_worker_start
    def broken() -> None:
        raise OSError("no database")

    worker = rig.worker(ready=False)
    assert worker.wait(5) == 1
    assert "no database" in worker.told()
    wait_until(lambda: not rig.incarnations(), 1)
