"""A worker's own connection to Redis: many requests in one write, replies in order, one deadline for all of
them.

redis-py's asyncio connection copies each frame twice, pauses the transport at 64 KiB and arms a timer for
every read; here a reply goes from the socket into hiredis and from there to whoever waits. Requests are never
repeated, except that a script that the server does not know is sent again with its text: a NOSCRIPT reply
means that nothing was applied.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from tqe import clock, codec
from tqe.errors import RedisUnavailable
from tqe.formats import REPLY_BYTES_MAX
from tqe.store.call import Call, reply_error

_BUFFER_BYTES: Final = 256 * 1024
_KEEPALIVE_S: Final = 5

Argument = bytes | str | int | float


class Wire(asyncio.BufferedProtocol):
    """One connection. Use `connect`; `call` and `command` give futures that end with the reply or an
    exception."""

    def __init__(self) -> None:
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._none = object()
        self._reader = hiredis.Reader(notEnoughData=self._none)
        self._unread_bytes = 0  # since the last whole reply, or a little less
        self._waiting: deque[tuple[asyncio.Future[Any], Call | None, int]] = deque()
        self._known: set[str] = set()  # scripts that were sent in full
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.closed = False

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes, so a check by class would refuse them.
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A peer that vanished without a word (no RST) is found even while a blocking pop waits for
            # nothing.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self._unread_bytes += nbytes
        try:
            self._reader.feed(cast(bytes, self._buffer), 0, nbytes)  # it takes any buffer; its types say less
            while (reply := self._reader.gets()) is not self._none:
                self._unread_bytes = 0
                self._answer(reply)
        except (hiredis.ProtocolError, IndexError, MemoryError) as e:
            # MemoryError: an array of four thousand million was announced.
            what = str(e) or "a reply larger than memory"
            self.close(RedisUnavailable(f"Redis answered what is not its protocol: {what}", applied=None))
        # A length is only announced: without a cap a damaged one would be collected until the deadline, into
        # as much memory as the network brings.
        if self._unread_bytes > REPLY_BYTES_MAX:
            self.close(RedisUnavailable(f"a reply of more than {REPLY_BYTES_MAX:,} bytes", applied=None))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(RedisUnavailable("the connection to Redis was closed", applied=None))

    # -- ours

    def call(self, calls: Sequence[Call], *, timeout_ms: int) -> list[asyncio.Future[Any]]:
        """Send script calls in one write; one future a call, in order.

        A connection's first call of a script carries its text: what is sent right before a long job must not
        come back as unknown, since nobody reads that before the job has ended.
        """
        packed: list[bytes] = []
        futures: list[asyncio.Future[Any]] = []
        for call in calls:
            known = call.script in self._known
            packed.append(codec.pack_command(call.evalsha() if known else call.eval()))
            self._known.add(call.script)
            futures.append(self._expect(call, timeout_ms))
        self._write(b"".join(packed))
        return futures

    def command(self, *arguments: Argument, timeout_ms: int) -> asyncio.Future[Any]:
        """Send one plain command."""
        future = self._expect(None, timeout_ms)
        self._write(codec.pack_command(arguments))
        return future

    def check(self) -> None:
        """Close the connection if a reply is overdue. The caller's tick calls this: one deadline, no timer a
        request."""
        if self._waiting and clock.monotonic_ns() > self._waiting[0][2]:
            self.close(RedisUnavailable("Redis did not answer in time", applied=None))

    def close(self, error: Exception | None = None) -> None:
        """Close; whoever still waits gets the error. What was sent may yet be executed: nobody may assume
        that it was not."""
        if self.closed:
            return
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
        failure = error or RedisUnavailable("the connection to Redis was closed", applied=None)
        while self._waiting:
            future, _, _ = self._waiting.popleft()
            if not future.done():
                future.set_exception(failure)
                future.exception()  # a failure that nobody awaits any more is not worth a log line

    def _expect(self, call: Call | None, timeout_ms: int) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.append((future, call, clock.monotonic_ns() + timeout_ms * 1_000_000))
        return future

    def _write(self, data: bytes) -> None:
        if self.closed or self._transport is None:
            self.closed = False  # let close() fail those who have just begun to wait
            self.close()
            return
        self._transport.write(data)

    def _answer(self, reply: Any) -> None:
        future, call, deadline = self._waiting.popleft()
        if isinstance(reply, hiredis.ReplyError):
            if call is not None and str(reply).startswith("NOSCRIPT"):
                self._waiting.append((future, None, deadline))
                self._write(codec.pack_command(call.eval()))
                return
            if not future.done():
                future.set_exception(reply_error(str(reply), call.script if call else ""))
                future.exception()
        elif not future.done():
            future.set_result(reply)


def _tls(query: Mapping[str, list[str]]) -> ssl.SSLContext:
    """How to trust the server and be trusted, by the parameters of a URL as redis-py has them."""
    told = {name: values[0] for name, values in query.items() if name.startswith("ssl_")}
    context = ssl.create_default_context(
        cafile=told.get("ssl_ca_certs"), capath=told.get("ssl_ca_path"), cadata=told.get("ssl_ca_data")
    )
    if told.get("ssl_check_hostname", "").lower() in ("false", "0", "no"):
        context.check_hostname = False
    if told.get("ssl_cert_reqs", "").lower() in ("none", "0"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if "ssl_certfile" in told:
        context.load_cert_chain(told["ssl_certfile"], told.get("ssl_keyfile"), told.get("ssl_password"))
    return context


async def connect(url: str, *, timeout_ms: int, made: type[Wire] = Wire) -> Wire:
    """Open a connection and log in. Raises RedisUnavailable, never with the password in its text."""
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    wire: Wire | None = None
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            if parts.scheme == "unix":
                _, wire = await loop.create_unix_connection(made, unquote(parts.path))
                database = query.get("db", ["0"])[0]
            else:
                context = _tls(query) if parts.scheme == "rediss" else None
                _, wire = await loop.create_connection(
                    made, parts.hostname or "127.0.0.1", parts.port or 6379, ssl=context
                )
                database = parts.path.strip("/") or query.get("db", ["0"])[0]
            if parts.password:
                names = [unquote(parts.username)] if parts.username else []
                await wire.command("AUTH", *names, unquote(parts.password), timeout_ms=timeout_ms)
            if database != "0":
                await wire.command("SELECT", database, timeout_ms=timeout_ms)
            ready, wire = wire, None
            return ready
    except TimeoutError as e:
        raise RedisUnavailable("Redis did not accept a connection in time", applied=False) from e
    except OSError as e:
        raise RedisUnavailable(f"cannot reach Redis: {e.strerror or type(e).__name__}", applied=False) from e
    finally:
        # Refused or unanswered: the caller tries again, each second if need be, and has only so many files.
        if wire is not None:
            wire.close()
