"""Owns what a connection may cost: the size of a request's head, how long bytes may take to come and to go.

uvicorn's protocol reads a head of any length, waits for its end for ever, and keeps an answer for ever that
nobody takes. Each would let a few clients fill the memory or hold all connections.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from uvicorn.protocols.http import httptools_impl

from tqe.api.problems import MEDIA_TYPE, Problem

HEAD_BYTES_MAX: Final = 16 * 1024
CONNECTIONS_MAX: Final = 2_000  # a process; who comes on top is told 503
READ_S: Final = 10.0
# Without a byte that leaves for the client. Long: the kernels between take some megabytes at once.
WRITE_S: Final = 60.0
_LOOK_S: Final = 1.0
# A stream of lines may take longer in all; what counts there is that its bytes keep coming.
STREAMS: Final = frozenset({b"/api/v1/jobs:batch"})


class GuardedProtocol(httptools_impl.HttpToolsProtocol):
    """uvicorn's protocol with a limit for the head (16 KiB: 431) and deadlines, for reading (10 s: 408) and
    for being read (60 s: the connection is cut)."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._in_head = True
        self._head_bytes = 0  # that have come while the head was not complete
        self._own_bytes = 0  # of this head, as it was parsed
        self._since: float | None = None  # when what we wait for now was begun, None: for nothing
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = (0, 0.0)  # bytes of an answer that wait to be taken, and since when so many
        self._refusal: Problem | None = None
        # The request that is being answered. `cycle` is the one that was read last, maybe many behind it.
        self._answered: httptools_impl.RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._timer = self.loop.call_later(_LOOK_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._give_up()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: httptools_impl.RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _give_up(self) -> None:
        """Nobody hears an answer any more: not to what is under way, nor to what waits behind it. uvicorn
        tells the last request only, and the others would write to a closed connection, which raises."""
        for cycle in (self._answered, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return  # what still comes after a refusal is nobody's
        if self._in_head:
            # Before it is parsed: the parser keeps a header that never ends.
            self._head_bytes += len(data)
        elif self._since is not None and self._streams():
            self._since = self.loop.time()
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES_MAX and self._refusal is None:
            self._refuse(_head_too_large())

    def _streams(self) -> bool:
        """Whether a stream of lines comes in and is wanted: it is, until it is answered."""
        return self.url.partition(b"?")[0] in STREAMS and not self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(400, "bad-request", "This is no HTTP request", msg))

    def on_message_begin(self) -> None:
        self._since = self.loop.time()
        self._in_head = True
        self._own_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        """Of a head that came in one piece with other things only its own bytes count."""
        self._own_bytes += size
        if self._own_bytes > HEAD_BYTES_MAX and self._refusal is None:
            self._refuse(_head_too_large())

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._refusal is None and len(self.connections) > CONNECTIONS_MAX:
            self._refuse(_too_many_connections())
        if self._refusal is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refusal is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._since = None
        self._in_head = True
        self._head_bytes = 0
        if self._refusal is None:
            super().on_message_complete()

    def _look(self) -> None:
        self._timer = self.loop.call_later(_LOOK_S, self._look)
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent[0]:
            self._unsent = (unsent, self.loop.time())
        elif self.loop.time() - self._unsent[1] > WRITE_S:
            self.transport.abort()
            return
        if self._since is None or self._refusal is not None:
            return
        if self.flow.read_paused:
            self._since = self.loop.time()  # it is we who do not read
        elif self.loop.time() - self._since > READ_S:
            detail = f"the request did not arrive within {READ_S:g} seconds"
            self._refuse(Problem(408, "too-slow", "The request came too slowly", detail))

    def _refuse(self, problem: Problem) -> None:
        """Answer, unless an answer has begun, and close."""
        self._refusal = problem
        if self.transport.is_closing():
            return
        cycle = self._answered
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_answer(problem))
        self._give_up()
        self.transport.close()


def _head_too_large() -> Problem:
    detail = f"the request line and the headers have more than {HEAD_BYTES_MAX} bytes"
    return Problem(431, "head-too-large", "The head is too large", detail)


def _too_many_connections() -> Problem:
    detail = (
        f"this server process has {CONNECTIONS_MAX} connections, which is the most: use fewer, for longer"
    )
    return Problem(503, "too-many-connections", "Too many connections", detail, retry_after_s=1)


def _answer(problem: Problem) -> bytes:
    body = msgspec.json.encode(problem.document())
    retry = f"retry-after: {problem.retry_after_s}\r\n" if problem.retry_after_s else ""
    head = (
        f"HTTP/1.1 {problem.status} {problem.title}\r\ncontent-type: {MEDIA_TYPE}\r\n{retry}"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
