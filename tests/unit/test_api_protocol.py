"""What a connection of the REST API may cost: long heads, slow senders, readers that do not read."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from tests.support.waiting import await_until
from tqe.api import protocol
from tqe.api.room import SMALL_BYTES, Hold, Room

T = TypeVar("T")

BIG = 8 * 1024 * 1024


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Reads all, and answers with as many bytes as the path says, or `ok`."""
    while (await receive()).get("more_body"):
        pass
    body = b"x" * BIG if scope["path"] == "/big" else b"ok"
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "READ_S", 0.3)
    monkeypatch.setattr(protocol, "WRITE_S", 0.3)
    monkeypatch.setattr(protocol, "_LOOK_S", 0.05)


def play(scene: Callable[[int, ServerState], Awaitable[T]]) -> T:
    """A scene with a server on this port, all on the loop that `tqe serve` uses."""

    async def whole() -> T:
        config = uvicorn.Config(echo, lifespan="off", log_config=None, log_level="error", ws="none")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol.GuardedProtocol(config, state, {}), "127.0.0.1", 0)
        async with server:
            return await scene(server.sockets[0].getsockname()[1], state)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole())


def said(sent: bytes) -> bytes:
    """What comes back until the server closes."""

    async def scene(port: int, state: ServerState) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    return play(scene)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 20_000,
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 4_000,
        b"GET / HTTP/1.1\r\na: " + b"b" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\na: " + b"b" * 17_000,
    ],
)
def test_a_head_has_a_size(head: bytes) -> None:
    assert said(head).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\na: b\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nab",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"POST /api/v1/jobs:batch HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
    ],
)
def test_who_sends_no_more_is_told_and_cut_off(part: bytes) -> None:
    assert said(part).startswith(b"HTTP/1.1 408 ")


def test_a_stream_of_lines_may_take_as_long_as_it_keeps_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "READ_S", 1.0)  # a busy machine may stand still for a part of it

    async def scene(port: int, state: ServerState) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /api/v1/jobs:batch HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head)
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 2 * protocol.READ_S:
            writer.write(b"64\r\n" + b"a" * 100 + b"\r\n")
            await asyncio.sleep(0.02)
        writer.write(b"0\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 20)).endswith(b"ok")
        writer.close()

    play(scene)


def test_a_stream_that_trickles_ends() -> None:
    """A byte now and then would hold what has come of a line for ever."""

    async def scene(port: int, state: ServerState) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /api/v1/jobs:batch HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        answer = asyncio.create_task(reader.read())

        def told() -> bool:
            if not answer.done():
                writer.write(b"1\r\na\r\n")
            return answer.done()

        await await_until(told, 20)
        assert answer.result().startswith(b"HTTP/1.1 408 ")
        writer.close()

    play(scene)


def test_a_stream_has_an_end_however_quick_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STREAM_S", 0.5)

    async def scene(port: int, state: ServerState) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /api/v1/jobs:batch HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        answer = asyncio.create_task(reader.read())

        def told() -> bool:
            if not answer.done():
                writer.write(b"400\r\n" + b"a" * 1024 + b"\r\n")
            return answer.done()

        await await_until(told, 20)
        assert answer.result().startswith(b"HTTP/1.1 408 ") and b"0.5 seconds" in answer.result()
        writer.close()

    play(scene)


def test_connections_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(protocol, "READ_S", 20.0)

    async def scene(port: int, state: ServerState) -> None:
        pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        reader, writer = pairs[2]
        writer.write(b"GET / HTTP/1.1\r\n")
        told = await asyncio.wait_for(reader.read(), 20)
        assert told.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in told
        assert b"urn:tqe:problem:too-many-connections" in told
        reader, _ = pairs[3]
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 503 "), "it says nothing"
        reader, writer = pairs[1]
        writer.write(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 200 "), "it came in time"
        for _, writer in pairs:
            writer.close()

    play(scene)


def test_who_comes_on_top_of_many_that_are_refused_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CONNECTIONS_MAX", 0)

    async def scene(port: int, state: ServerState) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        await await_until(lambda: not state.connections)
        writer.close()

    play(scene)


def test_bodies_that_do_not_fit_beside_each_other_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(100_000)
    monkeypatch.setattr(protocol, "_room", room)
    monkeypatch.setattr(protocol, "READ_S", 20.0)

    async def scene(port: int, state: ServerState) -> None:
        def post(size: int) -> bytes:
            return b"POST / HTTP/1.1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size

        async def ask(sent: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            try:
                return await asyncio.wait_for(reader.read(), 20)
            finally:
                writer.close()

        reader, slow = await asyncio.open_connection("127.0.0.1", port)
        slow.write(post(70_001) + b"x" * 70_000)
        await await_until(lambda: room.held_bytes == 70_000 - SMALL_BYTES)
        told = await ask(post(70_000) + b"x" * 70_000)
        assert told.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in told, told
        assert b"urn:tqe:problem:too-busy" in told
        assert (await ask(post(10_000) + b"x" * 10_000)).startswith(b"HTTP/1.1 200 "), "small ones go in"
        slow.write(b"x")
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 200 ")
        assert room.held_bytes == 0
        assert (await ask(post(70_000) + b"x" * 70_000)).startswith(b"HTTP/1.1 200 ")
        _, leaving = await asyncio.open_connection("127.0.0.1", port)
        leaving.write(post(70_001) + b"x" * 70_000)
        await await_until(lambda: room.held_bytes > 0)
        leaving.transport.abort()
        await await_until(lambda: room.held_bytes == 0)
        slow.close()

    play(scene)


def test_what_is_held_and_given_back() -> None:
    room = Room(1_000)
    hold, other = Hold(room), Hold(room)
    assert hold.add(SMALL_BYTES + 900) and not other.add(SMALL_BYTES + 101) and other.over
    assert other.add(SMALL_BYTES) and room.held_bytes == 900
    assert hold.add(-500) and other.add(600) and room.held_bytes == 1_000
    hold.end()
    assert hold.add(10**9) and room.held_bytes == 600, "who works on for a client that is gone holds nothing"


def test_who_takes_no_answer_is_cut_off() -> None:
    async def scene(port: int, state: ServerState) -> None:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(b"GET /big HTTP/1.1\r\n\r\n")
            await await_until(lambda: state.connections, 10, "a connection")
            await await_until(lambda: not state.connections, 20, "its end")

    play(scene)
