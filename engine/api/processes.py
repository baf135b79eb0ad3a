"""Owns the server's processes: one socket, N children that serve it, a parent that replaces and drains."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import uvicorn
import uvloop

from tqe import clock
from tqe.api.application import build
from tqe.api.protocol import CONNECTIONS_MAX, GuardedProtocol
from tqe.api.service import ServeOptions, Service
from tqe.errors import SettingsError
from tqe.registry import Registry
from tqe.settings import Settings
from tqe.supervisor import process
from tqe.telemetry import logs

DRAIN_S: Final = 10.0
KEEP_ALIVE_S: Final = 30
_BACKLOG: Final = 1_024
_POLL_S: Final = 0.5
_OTHER_FILES: Final = 128  # connections to Redis, the log, what Python has open
_YOUNG_NS: Final = 1_000_000_000  # who dies younger than this waits before it is replaced
_YOUNG_DEATHS_MAX: Final = 5  # in a row: then something is wrong that trying again will not mend

# On every answer. What it says counts for the page too: nothing of another origin, no script but our files.
_HEADERS: Final = [
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
]

_log = logs.get("api")


def listen(options: ServeOptions) -> socket.socket:
    """The socket that all processes serve. Raises SettingsError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=_BACKLOG)
    except OSError as e:
        raise SettingsError(
            f"the server cannot listen on {options.host} port {options.port}: {e.strerror or e}"
        ) from e


@dataclass(slots=True)
class _Child:
    number: int
    started_ns: int


class Servers:
    """The parent. It serves nothing, talks to no Redis and starts no thread: it forks, and it waits."""

    def __init__(
        self, listener: socket.socket, settings: Settings, registry: Registry | None, options: ServeOptions
    ) -> None:
        self._listener = listener
        self._settings = settings
        self._registry = registry
        self._options = options
        self._children: dict[int, _Child] = {}
        self._missing: list[tuple[int, int]] = []  # (not before, number)
        self._young_deaths = 0

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code."""
        files = process.raise_file_limit()
        if files < CONNECTIONS_MAX + _OTHER_FILES:
            _log.warning(
                f"a server process may have {CONNECTIONS_MAX} connections, but fewer open files:"
                " raise the hard limit (ulimit -Hn, LimitNOFILE)",
                files=files,
            )
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with contextlib.closing(process.Signals()) as signals:

            def begin(number: int) -> None:
                def leave_parent() -> None:
                    signals.forget_in_child()
                    os.close(writer)

                name = f"api {number}"
                run = _Life(self._listener, self._settings, self._registry, self._options, reader).run
                pid = process.fork(run, name=name, before=leave_parent)
                self._children[pid] = _Child(number, clock.monotonic_ns())

            for number in range(self._options.procs):
                begin(number)
            while not signals.wait(_POLL_S):
                self._bury()
                if self._young_deaths > _YOUNG_DEATHS_MAX:
                    _log.error("the server processes end as soon as they start: giving up")
                    break
                for number in self._due():
                    begin(number)
            # The end of the pipe is the word to stop; the parent's death says the same.
            os.close(writer)
            self._drain(signals)
        os.close(reader)
        return int(self._young_deaths > _YOUNG_DEATHS_MAX)

    def _bury(self) -> None:
        for death in process.reap(self._children.keys()):
            child = self._children.pop(death.pid, None)
            if child is None:
                continue
            now_ns = clock.monotonic_ns()
            young = now_ns - child.started_ns < _YOUNG_NS
            self._young_deaths = self._young_deaths + 1 if young else 0
            _log.warning("a server process has ended and is replaced", number=child.number, how=death.how)
            self._missing.append((now_ns + (_YOUNG_NS if young else 0), child.number))

    def _due(self) -> Iterator[int]:
        now_ns = clock.monotonic_ns()
        for entry in [one for one in self._missing if one[0] <= now_ns]:
            self._missing.remove(entry)
            yield entry[1]

    def _drain(self, signals: process.Signals) -> None:
        deadline_ns = clock.monotonic_ns() + int((DRAIN_S + 2) * 1e9)
        while self._children:
            for death in process.reap(self._children.keys()):
                self._children.pop(death.pid, None)
            if self._children and (signals.wait(0.05) or clock.monotonic_ns() > deadline_ns):
                for pid in self._children:
                    process.kill_group(pid)


class _Server(uvicorn.Server):
    """uvicorn's server without its hands on signals: those are the parent's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Life:
    """One child's whole life."""

    def __init__(
        self,
        listener: socket.socket,
        settings: Settings,
        registry: Registry | None,
        options: ServeOptions,
        reader: int,
    ) -> None:
        self._listener = listener
        self._reader = reader
        self._service = Service(settings, registry, options)

    def run(self) -> int:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())
        return int(self._service.broken)

    async def _serve(self) -> None:
        config = uvicorn.Config(
            build(self._service),
            http=GuardedProtocol,
            ws="none",
            loop="none",
            lifespan="on",
            log_config=None,
            log_level="error",  # what clients do wrong is told to them; whoever wants could fill the log
            access_log=False,
            server_header=False,
            proxy_headers=False,
            headers=_HEADERS,
            backlog=_BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(DRAIN_S),
        )
        server = _Server(config)
        self._service.when_broken = lambda: self._stop(server)
        asyncio.get_running_loop().add_reader(self._reader, self._stop, server)
        await server.serve(sockets=[self._listener])

    def _stop(self, server: _Server) -> None:
        """The pipe has ended, or a background task has. Whatever waits is answered first, or it would hold up
        the end."""
        asyncio.get_running_loop().remove_reader(self._reader)
        self._service.closing.set()
        server.should_exit = True
