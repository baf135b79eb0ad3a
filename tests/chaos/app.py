"""The app of the campaigns: tasks that journal their starts and ends, and fail, hang or die on demand."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from types import TracebackType
from typing import Any

from tests.chaos.journal import END_FAIL, END_OK, ExecJournal
from tests.chaos.procs import children, send
from tqe import App, current_job

app = App()
_journal = ExecJournal(os.environ.get("CHAOS_JOURNAL", "/nonexistent"))


class Deliberate(Exception):
    """The failure that a test asked for."""


class running:
    """Journals one execution. No generator: it runs around jobs of a few microseconds."""

    __slots__ = ("job", "n")

    def __init__(self, n: int) -> None:
        self.n = n

    def __enter__(self) -> Any:
        self.job = job = current_job()
        _journal.start(job.id, self.n, job.attempt, job.token)
        return job

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            outcome = END_OK
        elif issubclass(kind, asyncio.CancelledError):
            outcome = "returned"
        elif kind.__name__ == "JobCancelled":
            outcome = "cancelled"
        else:
            outcome = END_FAIL
        _journal.end(self.job.id, outcome)


def _spin(us: int) -> None:
    until = time.perf_counter_ns() + us * 1000
    while time.perf_counter_ns() < until:
        pass


@app.task("QUICK")
def quick(n: int, us: int = 0) -> None:
    """Holds the CPU for some microseconds, as real work does."""
    with running(n):
        _spin(us)


@app.task("RESULT")
def result(n: int, us: int = 0) -> list[int]:
    with running(n):
        _spin(us)
        return [n, n * n]


@app.task("FLAKY")
def flaky(n: int, failures: int) -> None:
    """Fails on its first attempts, as counted by the engine: a crash in between must not count."""
    with running(n) as job:
        if job.attempt <= failures:
            raise Deliberate(f"attempt {job.attempt} of {failures} that fail")


@app.task("POISON")
def poison(n: int, us: int = 0) -> None:
    with running(n):
        _spin(us)
        os.kill(os.getpid(), signal.SIGKILL)


@app.task("HOSTBOMB")
def hostbomb(n: int, ms: int) -> None:
    """Takes the whole host along, as the kernel does with a container that is out of memory."""
    with running(n):
        time.sleep(ms / 1000)
        supervisor = os.getppid()
        family = children(supervisor)
        for pid in (supervisor, *(one for one in family if one != os.getpid()), os.getpid()):
            send(pid, signal.SIGKILL)


@app.task("LONG")
def long(n: int, ms: int) -> None:
    with running(n):
        time.sleep(ms / 1000)


@app.task("ASYNC")
async def slow_io(n: int, ms: int) -> None:
    with running(n):
        await asyncio.sleep(ms / 1000)


@app.task("HANG", timeout=1)
def hang(n: int) -> None:
    """Ignores its soft limit, so that only a kill ends it. Never journals an end."""
    job = current_job()
    _journal.start(job.id, n, job.attempt, job.token)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue
