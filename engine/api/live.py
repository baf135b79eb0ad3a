"""Owns the live view: what the dashboard shows, read once for all who look, and never while nobody does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tqe import clock
from tqe.api.faults import Faults
from tqe.api.pulse import Bell, Pulse

VIEWERS_MAX: Final = 64  # of one process: each holds a connection for as long as its page is open
READ_S: Final = 5.0  # a part that takes longer is left out this time
HEARTBEAT_S: Final = 5.0  # after so long without news a viewer is told that the connection lives

_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the view: what reads it (None: there is none now), and how many seconds it may be old. One
    with a `mark` is read again only when the mark has become another one."""

    read: Callable[[], Awaitable[Any]]
    every_s: int = 1
    mark: Callable[[], object] | None = None


class Live:
    """Reads the parts with each beat of the pulse while somebody looks, and hands out server-sent events.

    A viewer that reads slowly misses what was in between: nothing is queued up for it.
    """

    def __init__(
        self,
        pulse: Pulse,
        parts: Mapping[str, Part],
        opening: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._pulse = pulse
        self._parts = parts
        self._opening = opening  # what each viewer is sent first, by event
        self._wanted = asyncio.Event()
        self._news = Bell()
        self._turn = 0
        self._events: dict[str, tuple[int, bytes]] = {}  # part → the turn in which it was read, its event
        self._marks: dict[str, object] = {}
        self._faults = Faults()
        self.viewers = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wanted.wait()
            self._turn += 1
            # While Redis is away every part would wait for it in vain: viewers are told that it is.
            for name, part in self._parts.items() if not self._pulse.error else ():
                try:
                    if self._due(name, part):
                        await self._read(name, part)
                except Exception as e:  # one part that cannot be read must not take the others away
                    self._faults.note(f"the part {name} of the live view", e)
            self._events["state"] = self._turn, event("state", self._state())
            if not self.viewers:
                self._forget()
            self._news.ring()
            await self._pulse.looked.heard()

    def _due(self, name: str, part: Part) -> bool:
        last = self._events.get(name, (0, b""))[0]
        if not last:
            return True
        old = self._turn - last >= part.every_s
        return old and (part.mark is None or part.mark() != self._marks.get(name))

    async def _read(self, name: str, part: Part) -> None:
        mark = part.mark() if part.mark is not None else None
        found = await asyncio.wait_for(part.read(), READ_S)
        if found is not None:
            self._events[name] = self._turn, event(name, found)
            self._marks[name] = mark

    def _forget(self) -> None:
        """Whoever comes next must not see what was."""
        self._events.clear()
        self._marks.clear()

    def _state(self) -> dict[str, Any]:
        """Whether Redis answers, and how old the news is."""
        age_s = self._pulse.age_s
        return {
            "atMs": clock.wall_ms(),
            "error": self._pulse.error or None,
            "ageMs": None if age_s is None else round(age_s * 1000),
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """One viewer more, as long as the block lasts."""
        self.viewers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self.viewers -= 1
            if not self.viewers:
                self._wanted.clear()
                self._forget()

    async def events(self, closing: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """What one viewer is sent, until the server closes."""
        for name, data in self._opening().items():
            yield event(name, data)
        seen: dict[str, int] = {}
        closed = asyncio.ensure_future(closing.wait())
        try:
            while not closed.done():
                heard = asyncio.ensure_future(self._news.heard())
                news = [
                    (name, turn, text)
                    for name, (turn, text) in self._events.items()
                    if seen.get(name) != turn
                ]
                for name, turn, text in news:
                    seen[name] = turn
                    yield text
                await asyncio.wait((heard, closed), timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if not heard.done():
                    heard.cancel()
                    yield b": the connection lives\n\n"
        finally:
            closed.cancel()


def event(name: str, data: Any) -> bytes:
    """One server-sent event. JSON has no line breaks of its own, so its data is one line."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode(data))
