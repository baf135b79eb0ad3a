"""Owns the faults of the wire: a proxy before a real redis-server that loses, holds and spoils commands.

It runs its own event loop in a thread, so the code under test may block. A rule waits for the n-th command
that matches, fires, and tells by events what has happened, so a test never sleeps:

    with Proxy(server.socket) as proxy:
        late = proxy.late(runs(sha), nth=3)   # the third call of that script is held back
        ...                                   # the client sees its connection die, and recovers
        late.release()                        # Redis executes it, as it does with commands of a closed socket
        late.applied.wait(5)

What follows a held command on the same connection is held too, in order, as it would be in a socket's buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.chaos.resp import Framer, ProtocolError, parse_command, script_sha

COMMANDS_KEPT = 200_000
_CHUNK = 64 * 1024
# Their replies do not come one to a command: from here on the link only passes bytes.
_STREAMING = frozenset({b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR"})
RESET, CLOSE, HANG = "reset", "close", "hang"  # what the client sees of its connection after a fault


@dataclass(frozen=True, slots=True)
class Command:
    """One command as it came by."""

    argv: list[bytes]
    name: str
    sha: str
    link: int

    @property
    def keys(self) -> list[bytes]:
        return self.argv[3 : 3 + int(self.argv[2])] if self.sha else []

    @property
    def args(self) -> list[bytes]:
        return self.argv[3 + int(self.argv[2]) :] if self.sha else self.argv[1:]


Match = Callable[[Command], bool]


def runs(sha: str) -> Match:
    """Commands that run the script with this SHA-1, by EVALSHA or by EVAL."""
    return lambda command: command.sha == sha


def named(name: str) -> Match:
    return lambda command: command.name == name.upper()


def every(command: Command) -> bool:
    return True


@dataclass(eq=False)
class Rule:
    """A fault that waits for its command. Set by the test's thread, fired by the proxy's."""

    match: Match
    action: str
    nth: int = 1
    times: int = 1
    then: str = RESET
    seconds: float = 0.0
    change: Callable[[bytes], bytes] = bytes
    seen: int = 0
    command: Command | None = None
    replies: list[bytes] = field(default_factory=list)  # what Redis answered, whoever got to see it
    fired: threading.Event = field(default_factory=threading.Event)
    applied: threading.Event = field(default_factory=threading.Event)
    _go: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let a held command go on to Redis."""
        self._go.set()

    @property
    def released(self) -> bool:
        return self._go.is_set()

    def wants(self, command: Command) -> bool:
        if not self.match(command):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times

    @property
    def spent(self) -> bool:
        return self.seen >= self.nth + self.times - 1


@dataclass(slots=True)
class _Awaited:
    """A reply that is still to come, or one that the proxy gives by itself when its turn comes."""

    rule: Rule | None = None
    canned: bytes | None = None


class Proxy:
    """Listens on loopback, or on the unix socket `listen`, and passes on to the server at `upstream`."""

    def __init__(self, upstream: str | Path | tuple[str, int], listen: Path | None = None) -> None:
        self._upstream = upstream
        self._listen = listen
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[_Link] = set()
        self._made = 0
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self.port = 0
        # Shared with the proxy's thread; single stores, read once a chunk.
        self.silent = False
        self.slice_replies = False
        self.latency_s = 0.0
        self.commands: deque[Command] = deque(maxlen=COMMANDS_KEPT)
        self.errors: list[str] = []

    # ---- life

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"unix://{self._listen}" if self._listen else f"redis://127.0.0.1:{self.port}/0"

    @property
    def links(self) -> int:
        """Connections that are open on the client's side."""
        return sum(1 for link in list(self._links) if link.client_open)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self) -> None:
        if self._listen is not None:
            self._server = await asyncio.start_unix_server(self._accept, str(self._listen))
        else:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._end_links()
        _, left = await asyncio.wait(self._tasks, timeout=5) if self._tasks else (set(), set())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await self._connect()
        except OSError:
            writer.transport.abort()  # no server: the client sees its connection go, as it would without us
            return
        self._made += 1
        link = _Link(self, self._made, (reader, writer), (up_reader, up_writer))
        self._links.add(link)
        self._spawn(link.serve())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._upstream, tuple):
            return await asyncio.open_connection(*self._upstream)
        return await asyncio.open_unix_connection(str(self._upstream))

    # ---- faults of one command

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def drop_request(self, match: Match, *, nth: int = 1, times: int = 1, then: str = RESET) -> Rule:
        """Redis never sees it. `then=HANG`: and nobody tells the client, the silent half-open peer."""
        return self.add(Rule(match, "drop_request", nth, times, then))

    def cut_request(self, match: Match, *, nth: int = 1) -> Rule:
        """Redis sees half of it, then the connection dies."""
        return self.add(Rule(match, "cut_request", nth))

    def drop_reply(self, match: Match, *, nth: int = 1, times: int = 1, then: str = RESET) -> Rule:
        """Redis applies it, and the client never hears of it."""
        return self.add(Rule(match, "drop_reply", nth, times, then))

    def late(self, match: Match, *, nth: int = 1, then: str = RESET) -> Rule:
        """Redis applies it after `release()`, long after the client gave up on it."""
        return self.add(Rule(match, "late", nth, 1, then))

    def delay(self, match: Match, seconds: float, *, nth: int = 1, times: int = 1) -> Rule:
        return self.add(Rule(match, "delay", nth, times, seconds=seconds))

    def black_hole(self, match: Match, *, nth: int = 1) -> Rule:
        """From this command on its connection swallows everything, without a reset."""
        return self.drop_request(match, nth=nth, then=HANG)

    def slice_reply(self, match: Match, *, nth: int = 1, times: int = 1) -> Rule:
        """The reply comes a byte at a time."""
        return self.add(Rule(match, "slice", nth, times))

    def corrupt_reply(
        self, match: Match, change: Callable[[bytes], bytes], *, nth: int = 1, times: int = 1
    ) -> Rule:
        return self.add(Rule(match, "corrupt", nth, times, change=change))

    def answer(self, match: Match, reply: bytes, *, nth: int = 1, times: int = 1) -> Rule:
        """The proxy answers, Redis never sees it: `-LOADING …`, `-NOSCRIPT …`, `-READONLY …`."""
        return self.add(Rule(match, "answer", nth, times, change=lambda _: reply))

    def take(self, command: Command) -> Rule | None:
        """The rule that fires for this command. Every rule counts, the first that wants it gets it."""
        with self._lock:
            found: Rule | None = None
            for rule in list(self._rules):
                if rule.wants(command) and found is None:
                    found = rule
                if rule.spent:
                    self._rules.remove(rule)
        if found is not None:
            found.command = command
        return found

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    # ---- faults of all connections

    def reset_all(self) -> None:
        """Every connection dies at once."""
        self._loop.call_soon_threadsafe(self._end_links)

    def _end_links(self) -> None:
        for link in list(self._links):
            link.end()

    def silence(self) -> None:
        """Nothing passes any more and nobody is told, old connections and new ones, until `heal`."""
        self.silent = True
        for link in list(self._links):
            link.silent = True

    def heal(self) -> None:
        """New connections work; the silenced ones stay silent, since what they swallowed is lost."""
        self.silent = False


class _Link:
    """One client connection and its connection to Redis."""

    def __init__(
        self,
        proxy: Proxy,
        number: int,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.proxy = proxy
        self.number = number
        self.client_reader, self.client_writer = client
        self.reader, self.writer = upstream
        self.requests = Framer(inline=True)
        self.replies = Framer()
        self.awaited: deque[_Awaited] = deque()
        self.streaming = False
        self.silent = proxy.silent
        self.client_open = True
        self.held: list[bytes] = []
        self.frozen: Rule | None = None
        self.ended = False

    async def serve(self) -> None:
        try:
            await asyncio.gather(self.pass_requests(), self.pass_replies())
        finally:
            self.end()
            for writer in (self.client_writer, self.writer):
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    # ---- client to Redis

    async def pass_requests(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self.client_reader.read(_CHUNK):
                if self.proxy.latency_s:
                    await asyncio.sleep(self.proxy.latency_s)
                if self.silent:
                    continue
                if self.streaming:
                    self.writer.write(data)
                    continue
                try:
                    messages = self.requests.feed(data)
                except ProtocolError as error:
                    self.proxy.errors.append(f"client of link {self.number}: {error}")
                    break
                for message in messages:
                    await self.request(message)
                await self.writer.drain()
        self.client_open = False
        if self.frozen is None:
            self.end()

    async def request(self, message: bytes) -> None:
        argv = parse_command(message)
        if not argv:
            self.writer.write(message)  # an empty line gets no reply
            return
        name = argv[0].upper()
        command = Command(argv, name.decode("ascii", "replace"), script_sha(argv), self.number)
        self.proxy.commands.append(command)
        if self.frozen is not None:
            if not self.frozen.released:
                self.held.append(message)
            return
        if self.silent or not self.client_open:
            return  # it stood behind a command that was lost, on a connection that is gone
        rule = self.proxy.take(command)
        if name in _STREAMING:
            self.streaming = True
        if rule is None:
            self.forward(message, None)
        else:
            await self.apply(rule, message)

    def forward(self, message: bytes, rule: Rule | None) -> None:
        self.awaited.append(_Awaited(rule))
        self.writer.write(message)

    async def apply(self, rule: Rule, message: bytes) -> None:
        rule.fired.set()
        if rule.action == "drop_request":
            self.lose(rule.then)
        elif rule.action == "cut_request":
            self.writer.write(message[: len(message) // 2])
            await self.writer.drain()
            self.end()
        elif rule.action == "late":
            self.frozen = rule
            self.held.append(message)
            self.lose(rule.then, keep_upstream=True)
            self.proxy._spawn(self.apply_late(rule))
        elif rule.action == "delay":
            await asyncio.sleep(rule.seconds)
            self.forward(message, rule)
        elif rule.action == "answer":
            self.awaited.append(_Awaited(rule, rule.change(b"")))
            self.give_canned()
        else:
            self.forward(message, rule)

    async def apply_late(self, rule: Rule) -> None:
        while not rule.released:
            if self.ended:
                return
            await asyncio.sleep(0.002)
        for message in self.held:
            self.forward(message, rule)
        if not self.held:
            rule.applied.set()

    # ---- Redis to client

    async def pass_replies(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self.reader.read(_CHUNK):
                if self.proxy.latency_s:
                    await asyncio.sleep(self.proxy.latency_s)
                if self.streaming:
                    if not self.silent:
                        await self.give(data)
                    continue
                try:
                    messages = self.replies.feed(data)
                except ProtocolError as error:
                    self.proxy.errors.append(f"server of link {self.number}: {error}")
                    break
                for message in messages:
                    await self.reply(message)
        self.end()

    async def reply(self, message: bytes) -> None:
        if message[:1] == b">":  # out of band, answers nothing
            await self.give(message)
            return
        awaited = self.awaited.popleft() if self.awaited else _Awaited()
        rule = awaited.rule
        if rule is None:
            await self.give(message)
        else:
            await self.reply_by(rule, message)
        self.give_canned()

    async def reply_by(self, rule: Rule, message: bytes) -> None:
        rule.replies.append(message)
        if rule.action == "late":
            if len(rule.replies) == len(self.held):
                rule.applied.set()
                self.end()
            return
        if rule.action == "drop_reply":
            rule.applied.set()
            self.lose(rule.then)
            return
        if rule.action == "corrupt":
            await self.give(rule.change(message))
        elif rule.action == "slice":
            await self.give_sliced(message)
        else:
            await self.give(message)
        rule.applied.set()

    async def give(self, data: bytes) -> None:
        if self.silent or not self.client_open or self.frozen is not None:
            return
        if self.proxy.slice_replies:
            await self.give_sliced(data)
            return
        self.client_writer.write(data)
        await self.client_writer.drain()

    async def give_sliced(self, data: bytes) -> None:
        if self.silent or not self.client_open:
            return
        for at in range(len(data)):
            self.client_writer.write(data[at : at + 1])
            await self.client_writer.drain()
            await asyncio.sleep(0)

    def give_canned(self) -> None:
        while self.awaited and self.awaited[0].canned is not None:
            canned = self.awaited.popleft()
            if self.client_open and not self.silent and canned.canned is not None:
                self.client_writer.write(canned.canned)
            if canned.rule is not None:
                canned.rule.applied.set()

    # ---- ends

    def lose(self, then: str, *, keep_upstream: bool = False) -> None:
        """The client's connection goes as `then` says; what it has sent already stays on its way."""
        if then == HANG:
            self.silent = self.silent or not keep_upstream
            return
        self.close_client(reset=then == RESET)
        if not keep_upstream:
            self.end()

    def close_client(self, *, reset: bool) -> None:
        self.client_open = False
        if reset:
            handle = self.client_writer.get_extra_info("socket")
            if handle is not None and handle.family != socket.AF_UNIX:
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.client_writer.transport.abort()
        else:
            self.client_writer.close()

    def end(self) -> None:
        """Both connections go; Redis still executes what was sent to it."""
        self.ended = True
        if self.client_open:
            self.close_client(reset=True)
        self.client_writer.close()  # also after its end of file: that closes only one direction
        self.writer.close()
        self.proxy._links.discard(self)
