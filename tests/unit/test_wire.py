"""The worker's own connection: what it makes of replies that are announced and never end."""

import asyncio
from typing import Any

import pytest

from tqe import formats
from tqe.errors import RedisUnavailable, SettingsError
from tqe.settings import load
from tqe.store import wire as wire_module
from tqe.store.wire import Wire


class Transport:
    """The other end takes everything and says nothing by itself."""

    def __init__(self) -> None:
        self.aborted = False

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


def opened() -> tuple[Wire, Transport]:
    wire, transport = Wire(), Transport()
    wire.connection_made(transport)  # type: ignore[arg-type]
    return wire, transport


def receive(wire: Wire, data: bytes) -> None:
    """Hand it over as a socket would, until the connection is closed."""
    while data and not wire.closed:
        room = wire.get_buffer(-1)
        part, data = data[: len(room)], data[len(room) :]
        room[: len(part)] = part
        wire.buffer_updated(len(part))


async def test_a_reply_without_an_end_is_given_up_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "REPLY_BYTES_MAX", 1 << 20)
    wire, transport = opened()
    first = wire.command("GET", "a", timeout_ms=60_000)
    second = wire.command("GET", "b", timeout_ms=60_000)
    receive(wire, b"$500000000\r\n" + bytes(1 << 20))
    assert transport.aborted and wire.closed
    for future in (first, second):
        with pytest.raises(RedisUnavailable, match="more than 1,048,576 bytes") as caught:
            await future
        assert caught.value.applied is None


async def test_whole_replies_do_not_add_up_to_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "REPLY_BYTES_MAX", 1 << 20)
    wire, _ = opened()
    asked = [wire.command("GET", "a", timeout_ms=60_000) for _ in range(10)]
    receive(wire, b"".join(b"$600000\r\n" + bytes(600_000) + b"\r\n" for _ in asked))
    assert not wire.closed
    assert [len(reply) for reply in await asyncio.gather(*asked)] == [600_000] * 10


async def test_an_array_that_no_memory_can_hold_ends_the_connection() -> None:
    class Reader:
        def feed(self, *_: Any) -> None:
            pass

        def gets(self) -> Any:
            raise MemoryError  # what hiredis does at `*4294967295`, if the machine has less than 34 GB

    wire, transport = opened()
    wire._reader = Reader()  # type: ignore[assignment]
    asked = wire.command("GET", "a", timeout_ms=60_000)
    receive(wire, b"*4294967295\r\n")
    assert transport.aborted
    with pytest.raises(RedisUnavailable, match="larger than memory"):
        await asked


def test_no_honest_reply_reaches_the_cap() -> None:
    """A worker that fetches holds less than half of what it may; it may get one frame, however large."""
    largest = formats.REPLY_BYTES_MAX - formats.IN_FLIGHT_BYTES_MAX
    with pytest.raises(SettingsError, match="payload_max_bytes"):
        load(code={"payload_max_bytes": largest // 2})
