"""The doors of producers: a call goes the shortest way, and another can be prepared while it is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import redis.asyncio

from tqe import clock
from tqe.errors import TQEError
from tqe.store import wire
from tqe.store.call import AsyncDoor, Call, Reply, SyncDoor, pieces

_TIMEOUT_MS: Final = 5_000
_TICK_S: Final = 1.0
_AGAIN_S: Final = 0.05


class ProducerDoor(SyncDoor):
    """A door whose single call goes the short way: a blocking submit is little else."""

    def run(self, call: Call) -> Reply:
        return self.finish(self.begin(call))


def speaks(url: str) -> bool:
    """Whether our own connection does all that the URL asks for; redis-py knows more, such as kinds of
    TLS."""
    parts = urlsplit(url)
    return parts.scheme in ("unix", "redis") and parse_qs(parts.query).keys() <= {"db"}


class AsyncProducerDoor(AsyncDoor):
    """Calls go over one connection of our own, many at a time; the rest through redis-py's."""

    def __init__(self, client: redis.asyncio.Redis, url: str) -> None:
        super().__init__(client)
        self._url = url
        self._wire: _Wire | None = None
        self._opening = asyncio.Lock()

    async def run(self, call: Call) -> Reply:
        (answer,) = (await self._connected()).call((call,), timeout_ms=_TIMEOUT_MS)
        return await answer

    async def begin(self, call: Call) -> Awaitable[Reply]:
        try:
            connection = await self._connected()
        except TQEError as e:
            failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            failed.set_exception(e)
            failed.exception()  # who never asks for it need not read of it in the log
            return failed
        answer = connection.call_in_pieces(call, timeout_ms=_TIMEOUT_MS)
        await connection.left()
        return answer

    async def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
        await super().close()

    async def _connected(self) -> _Wire:
        if self._wire is not None and not self._wire.closed:
            return self._wire
        async with self._opening:
            if self._wire is None or self._wire.closed:
                connection = await wire.connect(self._url, timeout_ms=_TIMEOUT_MS, made=_Wire)
                assert isinstance(connection, _Wire)
                self._wire = connection
            return self._wire


class _Wire(wire.Wire):
    """A connection that watches its own deadline, and whose sender can wait until all has left."""

    def __init__(self) -> None:
        super().__init__()
        self._blocked: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._suspect: Any = None  # the request that seemed overdue at the last look

    def call_in_pieces(self, call: Call, *, timeout_ms: int) -> asyncio.Future[Any]:
        """Send one call with large arguments, without copying them."""
        answer = self._expect(call, timeout_ms)
        if self.closed or self._transport is None:
            self._write(b"")  # fails whoever waits
        else:
            self._transport.writelines(pieces(call.evalsha()))
        return answer

    async def left(self) -> None:
        """Wait until the system has taken all that was written. Whoever computes before that keeps Redis
        waiting for the rest."""
        if self._blocked is not None:
            await asyncio.shield(self._blocked)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=0)

    def pause_writing(self) -> None:
        self._blocked = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._blocked is not None and not self._blocked.done():
            self._blocked.set_result(None)
        self._blocked = None

    def close(self, error: Exception | None = None) -> None:
        super().close(error)
        self.resume_writing()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expect(self, call: Call | None, timeout_ms: int) -> asyncio.Future[Any]:
        if self._timer is None:
            self._timer = self._loop.call_later(_TICK_S, self._tick)
        return super()._expect(call, timeout_ms)

    def _tick(self) -> None:
        """A loop that was blocked runs its timers before it reads: so what seems overdue is looked at once
        more."""
        self._timer = None
        head = self._waiting[0] if self._waiting else None
        if head is None or clock.monotonic_ns() <= head[2]:
            self._suspect = None
        elif self._suspect is head:
            self.check()
        else:
            self._suspect = head
        if self._waiting:
            self._timer = self._loop.call_later(_AGAIN_S if self._suspect else _TICK_S, self._tick)
