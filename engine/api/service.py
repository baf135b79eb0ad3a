"""Owns what the routes of one server process share: client, guard, limits, pulse, the word to stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from starlette.applications import Starlette

from tqe.api.carrier import CarryingCore
from tqe.api.groups import Groups
from tqe.api.guard import Guard
from tqe.api.limits import Limits
from tqe.api.live import Live
from tqe.api.pulse import Pulse
from tqe.api.views import Views
from tqe.client import AsyncClient
from tqe.registry import Registry
from tqe.settings import Settings
from tqe.telemetry import logs

# Groups of lines at the same moment: as objects they may take fifty times as much memory as their text.
PARSED_MAX: Final = 4
_CANCEL_S: Final = 0.2

_log = logs.get("api")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `tqe serve` was told."""

    host: str = "127.0.0.1"
    port: int = 8080
    procs: int = 1

    @property
    def loopback(self) -> bool:
        """Whether only this machine can come in."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class Service:
    """One server process; its client lives inside of `running`."""

    def __init__(self, settings: Settings, registry: Registry | None, options: ServeOptions) -> None:
        self.settings = settings
        self.options = options
        self.client: AsyncClient
        self.guard: Guard
        self.limits: Limits
        self.pulse: Pulse
        self.live: Live
        self.closing: asyncio.Event
        self.registry = registry
        self.waits = 0  # long polls that go on
        self.parsed: asyncio.Semaphore  # groups of lines that are objects and wait for Redis
        self.groups: Groups
        self._stopping = False
        self.broken = False  # a background task has ended, and so must the process
        self.when_broken: Callable[[], None] = lambda: None

    @contextlib.asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        """From the start of the server's loop to its end."""
        self.closing = asyncio.Event()
        self.parsed = asyncio.Semaphore(PARSED_MAX)
        self.client = AsyncClient(self.settings, registry=self.registry)
        self.client.core = CarryingCore(self.settings, self.registry, self.client.core.handles)
        self.pulse = Pulse(self.client)
        self.guard = Guard(
            self.client,
            loopback=self.options.loopback,
            host=self.options.host,
            origins=self.settings.http_origins,
        )
        self.limits = Limits(self.settings, self.client, self.pulse)
        self.groups = Groups(self.client)
        views = Views(self.client, self.pulse, self.groups)
        self.live = Live(self.pulse, views.parts(), views.opening)
        looks = {"pulse": self.pulse.run, "guard": self.guard.run, "live": self.live.run}
        if self.limits.capped:
            looks["limits"] = self.limits.run
        looking = [asyncio.create_task(run(), name=name) for name, run in looks.items()]
        for task in looking:
            task.add_done_callback(self._ended)
        try:
            yield
        finally:
            self._stopping = True
            left = set(looking)
            while left:  # a cancel gets lost in an answer that comes at the same moment
                for task in left:
                    task.cancel()
                _, left = await asyncio.wait(left, timeout=_CANCEL_S)
            await self.client.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A background task is over. A server without one of them would show for ever what was, or go by
        tokens that are revoked, and answer all the same: it has to end, and another takes its place."""
        if self._stopping:
            return
        try:
            task.result()
            _log.error("a background task has returned: this server process ends", task=task.get_name())
        except BaseException:
            _log.exception("a background task has failed: this server process ends", task=task.get_name())
        self.broken = True
        self.when_broken()
