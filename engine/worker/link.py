"""One worker's life in Redis: its connection and its incarnation, and how it becomes a new one when a reply
is lost."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Final

from tqe import clock
from tqe.board import layout
from tqe.board.board import SlotView
from tqe.errors import LeaseLost, RedisUnavailable, ScriptError
from tqe.job import IDS
from tqe.settings import Settings
from tqe.store import learning, model, wire, working
from tqe.store.call import Call
from tqe.store.keys import Keys

log = logging.getLogger("tqe.worker")

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 1.0
WAKE_TIMEOUT_S: Final = 1  # how long a blocking pop waits: the backstop for a lost token


class Stopped(Exception):
    """The worker was told to stop while Redis could not be reached."""


class Link:
    """The connection for scripts, the one that waits for wake tokens, and the incarnation that both speak
    for."""

    def __init__(self, settings: Settings, keys: Keys, view: SlotView, url: str) -> None:
        self._settings = settings
        self._keys = keys
        self._view = view
        self._url = url
        self._wire: wire.Wire | None = None
        self._waiter: wire.Wire | None = None
        self.incarnation = ""
        # End of our lease, CLOCK_BOOTTIME, counted from before the last request that extended it.
        self.until_ns = 0
        self._timeout_ms = max(1_000, settings.lease_ms // 3)

    async def take_over(self) -> working.Taken:
        """Begin a new incarnation that holds what the old one held. Returns what that is, or raises Stopped.

        What is still on the wire under the old name finds no hash. The same pair of names is repeated until
        it is answered, and both stand on the board meanwhile, so that whoever has to recover us takes over
        both.
        """
        old, new = self.incarnation, IDS.frame_id().decode("ascii")
        self._view.set_text(layout.C_NEXT_INCARNATION, new)
        backoff_s = BACKOFF_FIRST_S
        while True:
            if self._view.get(layout.C_STOP) == layout.STOP_NOW:
                raise Stopped
            self._view.set(layout.C_BEAT, clock.boottime_ns())
            try:
                self.close()
                self._wire = await wire.connect(self._url, timeout_ms=self._timeout_ms)
                sent_ns = clock.boottime_ns()
                (answer,) = self._wire.call(
                    [working.takeover(self._keys, old, new, self._settings.lease_ms)],
                    timeout_ms=self._timeout_ms,
                )
                taken = working.read_takeover(await self._answer(answer))
                break
            except (RedisUnavailable, ScriptError) as e:
                log.warning("cannot register with Redis (%s); trying again in %.2f s", e, backoff_s)
                self._view.add("reconnects")
                await self._rest(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
        self.incarnation = new
        self._view.set_text(layout.C_INCARNATION, new)
        self._view.set_text(layout.C_NEXT_INCARNATION, "")
        self._view.add("takeovers")
        self.extended(sent_ns)
        return taken

    def extended(self, sent_ns: int) -> None:
        """Redis has extended our lease in answer to what was sent at `sent_ns`."""
        self.until_ns = max(self.until_ns, sent_ns + self._settings.lease_ms * 1_000_000)

    def seen_until_ns(self) -> int:
        """End of our lease as of now: what we know, and what the steward has written on the board."""
        self.until_ns = max(self.until_ns, self._view.get(layout.C_LEASE_UNTIL))
        return self.until_ns

    def send(self, calls: list[Call]) -> list[asyncio.Future[Any]]:
        """Send script calls in one write."""
        if self._wire is None:
            raise RedisUnavailable("not connected", applied=False)
        return self._wire.call(calls, timeout_ms=self._timeout_ms)

    async def leave(self) -> bool:
        """End the incarnation, if it holds nothing. Best effort: if it fails, the steward or the lease ends
        it."""
        try:
            (answer,) = self.send([working.leave(self._keys, self.incarnation)])
            return bool(await answer)
        except (RedisUnavailable, ScriptError):
            return False

    def add_traces(self, traces: list[bytes]) -> None:
        """Write to the stream of traces, and do not wait for the answer: nothing depends on it."""
        if self._wire is not None:
            for trace in traces:
                command = learning.add_trace(self._keys, trace, self._settings.traces_max)
                self._wire.command(*command, timeout_ms=self._timeout_ms)

    async def means(self) -> dict[str, float]:
        """Mean durations by type, in µs, as the stewards publish them; empty if they cannot be read."""
        try:
            if self._wire is None:
                return {}
            flat = await self._wire.command("HGETALL", self._keys.means, timeout_ms=self._timeout_ms)
            return {flat[at].decode(): float(flat[at + 1]) for at in range(0, len(flat), 2)}
        except (RedisUnavailable, ScriptError, ValueError):
            return {}

    async def order(self) -> model.Order | None:
        """How our lanes are to be ordered; None if it cannot be read now."""
        lanes = self._settings.lanes
        try:
            if self._wire is None:
                return None
            told = await self._wire.command(
                *model.order_command(self._keys, lanes), timeout_ms=self._timeout_ms
            )
            return model.read_order(told, lanes)
        except RedisUnavailable:
            return None
        except ScriptError as e:
            log.warning("the order of the lanes cannot be read, they are FIFO: %s", e)
            return model.NO_ORDER

    async def cancels(self, frames: list[bytes]) -> dict[int, set[int]]:
        """By position: indexes of these frames' jobs that somebody wants cancelled. Best effort, as every
        such request is."""
        if self._wire is None or not frames:
            return {}
        ids = [frame[4:30] for frame in frames]
        try:
            told = await self._wire.command("HMGET", self._keys.cancel, *ids, timeout_ms=self._timeout_ms)
        except (RedisUnavailable, ScriptError):
            return {}
        return {
            at: {int(index) for index in indexes.split(b",") if index}
            for at, indexes in enumerate(told)
            if indexes
        }

    async def token(self) -> asyncio.Future[Any]:
        """Begin to wait for a wake token on the second connection; the future ends after a second at the
        latest."""
        if self._waiter is None or self._waiter.closed:
            self._waiter = await wire.connect(self._url, timeout_ms=self._timeout_ms)
        command = working.wait_command(self._keys, self._settings.lanes, WAKE_TIMEOUT_S)
        return self._waiter.command(*command, timeout_ms=WAKE_TIMEOUT_S * 1000 + self._timeout_ms)

    def check(self) -> None:
        """Close a connection whose reply is overdue."""
        for connection in (self._wire, self._waiter):
            if connection is not None:
                connection.check()

    def close(self) -> None:
        """Close both connections."""
        for connection in (self._wire, self._waiter):
            if connection is not None:
                connection.close()
        self._wire = self._waiter = None

    async def _answer(self, answer: asyncio.Future[Any]) -> Any:
        while not answer.done():
            await asyncio.wait([answer], timeout=0.25)
            self._view.set(layout.C_BEAT, clock.boottime_ns())
            self.check()
        return answer.result()

    async def _rest(self, seconds: float) -> None:
        end = clock.monotonic_ns() + int(seconds * 1e9)
        while clock.monotonic_ns() < end:
            if self._view.get(layout.C_STOP) == layout.STOP_NOW:
                raise Stopped
            self._view.set(layout.C_BEAT, clock.boottime_ns())
            await asyncio.sleep(min(0.1, max(0.0, (end - clock.monotonic_ns()) / 1e9)))


LOST: Final = (RedisUnavailable, LeaseLost, ScriptError)
