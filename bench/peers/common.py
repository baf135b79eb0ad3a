"""What every adapter needs: the payload, a place to count what has run, the producer's command line.

Imported inside of each queue's own environment, so it needs nothing but the standard library. Counts and
latencies go into a file that the measuring process has mapped too: they cost no queue a round trip.
"""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

URL = os.environ.get("BENCH_REDIS_URL", "")
# The file, in words of 8 bytes: how many slots are taken; slots of 8 words (count, time of the first job in
# ns of CLOCK_MONOTONIC), one a process, the first word being slot 0's; latencies in ns, by number.
SLOT_WORDS = 8
SLOTS = 256
LATENCIES = 20_000
AT_LATENCIES = SLOT_WORDS * (SLOTS + 1)
BYTES = 8 * (AT_LATENCIES + LATENCIES)
BULK = 1_000
WIDTH = 50


class Counter:
    """This process' slot, taken when it first counts; a forked child takes its own."""

    def __init__(self) -> None:
        self.words: memoryview | None = None
        self.slot = 0
        self.lock = threading.Lock()

    def open(self) -> memoryview:
        with open(os.environ["BENCH_LEDGER"], "r+b") as file:
            words = memoryview(mmap.mmap(file.fileno(), BYTES)).cast("Q")
            fcntl.flock(file, fcntl.LOCK_EX)
            words[0] += 1
            self.slot = SLOT_WORDS * words[0]
            # The mapping holds a copy of the descriptor, so closing the file would not release the lock.
            fcntl.flock(file, fcntl.LOCK_UN)
        self.words = words
        return words


_counter = Counter()


def _forget() -> None:
    global _counter
    _counter = Counter()


# A queue that forks for each job would run out of slots; its parent's will do, as one job runs at a time.
if os.environ.get("BENCH_FORKS"):
    if "work" in sys.argv:
        _counter.open()
else:
    os.register_at_fork(after_in_child=_forget)


def _done() -> None:
    counter = _counter
    words = counter.words or counter.open()
    if not words[counter.slot]:
        words[counter.slot + 1] = time.monotonic_ns()
    words[counter.slot] += 1


def _done_in_threads() -> None:
    with _counter.lock:
        _done()


done = _done_in_threads if os.environ.get("BENCH_THREADS") else _done


def timed(sent_ns: int, number: int) -> None:
    """A job of the latency phase starts."""
    waited_ns = time.monotonic_ns() - sent_ns
    done()
    words = _counter.words
    if words is not None:
        words[AT_LATENCIES + number] = waited_ns


def payload(n: int) -> dict[str, Any]:
    """About 50 bytes of JSON, the same for every queue."""
    return {"to": f"user{1_000_000 + n}@mail.example.com", "n": 1_000_000 + n}


def chunks(jobs: int) -> Iterator[range]:
    for first in range(0, jobs, BULK):
        yield range(first, min(jobs, first + BULK))


async def side_by_side(submit: Callable[[int], Awaitable[Any]], jobs: int) -> None:
    """Submissions of an asyncio client, so many at a time."""
    numbers = iter(range(jobs))

    async def some() -> None:
        for number in numbers:
            await submit(number)

    await asyncio.gather(*(some() for _ in range(WIDTH)))


# ------------------------------------------------------------------ the producer's command line


def main(
    submit_all: Callable[[int], Any],
    submit_timed: Callable[[int], Any],
    connect: Callable[[], Any] | None = None,
) -> None:
    """`ADAPTER submit JOBS` or `ADAPTER timed JOBS RATE`; prints when it began, ended, and its CPU time."""
    if inspect.iscoroutinefunction(submit_all):
        try:
            import uvloop

            run = uvloop.run
        except ImportError:
            run = asyncio.run
        run(_async_main(submit_all, submit_timed, connect))
        return
    if connect is not None:
        connect()
    watch = _Watch()
    if sys.argv[1] == "submit":
        submit_all(watch.jobs)
    else:
        for number, pause_s in watch.paced():
            submit_timed(number)
            time.sleep(pause_s())
    watch.tell()


async def _async_main(
    submit_all: Callable[[int], Any], submit_timed: Callable[[int], Any], connect: Callable[[], Any] | None
) -> None:
    if connect is not None:
        await connect()
    watch = _Watch()
    if sys.argv[1] == "submit":
        await submit_all(watch.jobs)
    else:
        for number, pause_s in watch.paced():
            await submit_timed(number)
            await asyncio.sleep(pause_s())
    watch.tell()


class _Watch:
    def __init__(self) -> None:
        self.jobs = int(sys.argv[2])
        self.cpu_ns = time.process_time_ns()
        self.begun_ns = time.monotonic_ns()

    def paced(self) -> Iterator[tuple[int, Callable[[], float]]]:
        """(number, how long to sleep after it), on a fixed schedule."""
        gap_ns = 1e9 / float(sys.argv[3])
        for number in range(self.jobs):
            due_ns = self.begun_ns + (number + 1) * gap_ns
            yield number, lambda due_ns=due_ns: max(0.0, (due_ns - time.monotonic_ns()) / 1e9)

    def tell(self) -> None:
        ended_ns = time.monotonic_ns()
        told = {
            "jobs": self.jobs,
            "begun_ns": self.begun_ns,
            "ended_ns": ended_ns,
            "cpu_ns": time.process_time_ns() - self.cpu_ns,
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        # Clients with threads of their own would keep the process.
        os._exit(0)
