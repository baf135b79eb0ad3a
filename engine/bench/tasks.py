"""The tasks that benchmarks run, registered like a user's, and the payloads that they are given."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Iterator
from itertools import cycle, islice
from math import log
from typing import Any, Final

from tqe import clock
from tqe.app import App
from tqe.bench.ledger import Ledger
from tqe.current import current_job

_HASHED: Final = bytes(range(256)) * 256
_DISTINCT: Final = 100_000
_WORDS: Final = ("lorem", "ipsum", "dolor", "sit", "amet", "elit", "sed", "do", "eiusmod", "tempor")


class FailsOnce(Exception):
    """What the retry storm raises at each job's first try."""


def make_app(ledger: Ledger) -> App:
    """An App of its own for each session of benchmarks. No-op tasks leave nothing in the ledger."""
    app = App("bench")
    _no_ops(app)
    _measuring(app, ledger)
    _working(app)
    return app


def _no_ops(app: App) -> None:
    @app.task("NOOP")
    def noop(to: str, n: int) -> None:
        pass

    @app.task("NOOP_ASYNC")
    async def noop_async(to: str, n: int) -> None:
        pass

    @app.task("RESULT")
    def result(to: str, n: int) -> int:
        return n

    @app.task("BLOB")
    def blob(n: int, data: str) -> None:
        pass


def _measuring(app: App, ledger: Ledger) -> None:
    @app.task("STAMP")
    def stamp(sent_ns: int, n: int) -> None:
        ledger.latency(n, sent_ns)

    @app.task("PACED")
    def paced(to: str, n: int, sent_ns: int = 0) -> None:
        if sent_ns:
            ledger.latency(n, sent_ns)

    @app.task("BUSY")
    def busy(n: int, ms: float) -> None:
        ledger.put(n, clock.monotonic_ns())
        time.sleep(ms / 1000)

    @app.task("MIXED")
    def mixed(n: int, ms: float) -> None:
        time.sleep(ms / 1000)
        ledger.put(n, clock.monotonic_ns())

    @app.task("TICKS")
    async def ticks(n: int, rounds: int, ms: float) -> None:
        """How much later than asked the loop comes back, each time."""
        for turn in range(rounds):
            begun = clock.monotonic_ns()
            await asyncio.sleep(ms / 1000)
            late_ns = clock.monotonic_ns() - begun - round(ms * 1e6)
            ledger.put(n * rounds + turn, max(1, late_ns))


def _working(app: App) -> None:
    @app.task("HASH")
    def hashed(n: int, kib: int) -> None:
        hashlib.sha256(_HASHED[: kib * 1024]).digest()

    @app.task("WAIT")
    async def wait(n: int, ms: float) -> None:
        await asyncio.sleep(ms / 1000)

    @app.task("FLAKY", max_retries=3, backoff=0.5, backoff_max=0.5)
    def flaky(n: int) -> None:
        if current_job().attempt == 1:
            raise FailsOnce("the first try of each job fails")


# ------------------------------------------------------------------ payloads


def distinct_payloads() -> list[dict[str, Any]]:
    """Payloads of about 50 bytes, made before the clock starts: building them is the caller's work."""
    return [{"to": f"user{n}@mail.example.com", "n": n} for n in range(1_000_000, 1_000_000 + _DISTINCT)]


def payloads(n: int, distinct: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """So many payloads, the distinct ones again and again."""
    return islice(cycle(distinct), n)


def durations_ms(jobs: int) -> list[float]:
    """Run times between 50 µs and 50 ms, log-normal around their geometric middle, the same each time."""
    low_ms, high_ms = 0.05, 50.0
    chance = random.Random(jobs)
    middle, sigma = log(low_ms * high_ms) / 2, log(high_ms / low_ms) / 6
    return [min(high_ms, max(low_ms, chance.lognormvariate(middle, sigma))) for _ in range(jobs)]


def text(size: int) -> str:
    """Words that compress about as well as prose does."""
    words: list[str] = []
    length, state = 0, 1
    while length < size:
        # A linear congruential step (constants of Numerical Recipes): no two words in a fixed rhythm.
        state = (1_664_525 * state + 1_013_904_223) & 0xFFFFFFFF
        words.append(f"{_WORDS[state % len(_WORDS)]}{state >> 20 & 0xFF if state >> 16 & 1 else ''}")
        length += len(words[-1]) + 1
    return " ".join(words)[:size]
