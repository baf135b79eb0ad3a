"""Owns what the routes of one server process share: client, guard, limits, pulse, the word to stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.applications import Starlette

from tqe.api.carrier import CarryingCore
from tqe.api.guard import Guard
from tqe.api.limits import Limits
from tqe.api.live import Live
from tqe.api.pulse import Pulse
from tqe.api.views import Views
from tqe.client import AsyncClient
from tqe.registry import Registry
from tqe.settings import Settings


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

    @contextlib.asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        """From the start of the server's loop to its end."""
        self.closing = asyncio.Event()
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
        views = Views(self.client, self.pulse)
        self.live = Live(self.pulse, views.parts(), views.opening)
        looking = [asyncio.create_task(one.run()) for one in (self.pulse, self.guard, self.limits, self.live)]
        try:
            yield
        finally:
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)
            await self.client.close()
