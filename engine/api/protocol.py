"""Owns what a connection may cost: the size of a request's head, how long bytes may take to come and to go,
and that there are not too many of them, nor of their bytes.

uvicorn's protocol reads a head of any length, waits for its end for ever, and keeps an answer for ever that
nobody takes. Each would let a few clients fill the memory or hold all connections.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

import msgspec
from uvicorn.protocols.http import httptools_impl

from tqe.api.problems import MEDIA_TYPE, Problem
from tqe.api.room import HOLD, Hold, Room, hold_of, no_room

HEAD_BYTES_MAX: Final = 16 * 1024
CONNECTIONS_MAX: Final = 2_000  # a process; who comes on top is told 503, and cut off beyond twice as many
READ_S: Final = 10.0
# Without a byte that leaves for the client. Long: the kernels between take some megabytes at once.
WRITE_S: Final = 60.0
_LOOK_S: Final = 1.0
# A stream of lines may take longer: each KiB gives a second more, up to so many in all. Without that a byte
# now and then would hold what has been read of it for ever.
STREAMS: Final = frozenset({b"/api/v1/jobs:batch"})
STREAM_BYTES_PER_S: Final = 1024
STREAM_S: Final = 600.0
_room: Final = Room()


class GuardedProtocol(httptools_impl.HttpToolsProtocol):
    """uvicorn's protocol with a limit for the head (16 KiB: 431), room for the bytes of all requests (503),
    and deadlines, for reading (10 s: 408) and for being read (60 s: the connection is cut)."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._in_head = True
        self._head_bytes = 0  # that have come while the head was not complete
        self._own_bytes = 0  # of this head, as it was parsed
        self._since: float | None = None  # when what we wait for now was begun, None: for nothing
        self._stream_since = 0.0  # when the request was begun that is read now
        self._surplus = False  # there were enough connections before this one
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = (0, 0.0)  # bytes of an answer that wait to be taken, and since when so many
        self._refusal: Problem | None = None
        # The request that is being answered. `cycle` is the one that was read last, maybe many behind it.
        self._answered: httptools_impl.RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * CONNECTIONS_MAX:
            transport.abort()
            return
        # Told when it asks for something: an answer before that would be lost with a reset.
        self._surplus = len(self.connections) > CONNECTIONS_MAX
        self._since = self._stream_since = self.loop.time()
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
                hold_of(cycle.scope).end()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return  # what still comes after a refusal is nobody's
        if self._surplus:
            self._refuse(_too_many_connections())
            return
        if self._in_head:
            # Before it is parsed: the parser keeps a header that never ends.
            self._head_bytes += len(data)
        elif self._since is not None and self._streams():
            self._since = min(self.loop.time(), self._since + len(data) / STREAM_BYTES_PER_S)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES_MAX and self._refusal is None:
            self._refuse(_head_too_large())

    def _streams(self) -> bool:
        """Whether a stream of lines comes in and is wanted: it is, until it is answered."""
        return self.url.partition(b"?")[0] in STREAMS and not self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(400, "bad-request", "This is no HTTP request", msg))

    def on_message_begin(self) -> None:
        self._since = self._stream_since = self.loop.time()
        self._in_head = True
        self._own_bytes = 0
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[HOLD] = Hold(_room)

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
        if self._refusal is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refusal is not None:
            return
        fits = self.cycle.response_complete or hold_of(self.cycle.scope).add(len(body))
        if fits or self._streams():  # a batch sees it by itself, and tells which lines were submitted
            super().on_body(body)
        else:
            self._refuse(no_room())

    def on_response_complete(self) -> None:
        if self._answered is not None:
            hold_of(self._answered.scope).end()
        super().on_response_complete()

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
        now = self.loop.time()
        if self._surplus:
            self._refuse(_too_many_connections())
        elif self.flow.read_paused:
            self._since = now  # it is we who do not read
            self._stream_since += _LOOK_S
        elif now - self._since > READ_S:
            detail = f"the request did not arrive within {READ_S:g} seconds"
            self._refuse(Problem(408, "too-slow", "The request came too slowly", detail))
        elif now - self._stream_since > STREAM_S:
            detail = f"the batch did not arrive within {STREAM_S:g} seconds: send several"
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
