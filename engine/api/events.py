"""Owns the route of server-sent events: the live view, for as long as somebody looks."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tqe.api.bodies import while_connected
from tqe.api.live import VIEWERS_MAX
from tqe.api.problems import Problem
from tqe.api.service import Service

SEND_S: Final = 20.0  # a viewer that takes nothing for so long is gone, whatever its connection says


async def show(service: Service, request: Request) -> Response:
    """The stream; 503 when too many look already."""
    if service.live.viewers >= VIEWERS_MAX:
        detail = f"{VIEWERS_MAX} viewers look at this server process, which is the most: close some"
        raise Problem(503, "too-many-viewers", "Too many viewers", detail, retry_after_s=10)
    if request.method == "HEAD":
        return Response(media_type=_Stream.media_type)  # its answer must end
    return _Stream(service, request)


class _Stream(Response):
    """Ends when the viewer leaves, takes nothing any more or may not look any more, or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, request: Request) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})  # a proxy must pass each event on at once
        del self.headers["content-length"]
        self._service = service
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.live.watching():
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events = self._service.live.events(self._service.closing)
        try:
            async for text in events:
                if not await self._admitted():
                    break
                async with asyncio.timeout(SEND_S):
                    await send({"type": "http.response.body", "body": text, "more_body": True})
        except TimeoutError:
            return
        finally:
            await events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _admitted(self) -> bool:
        """Whether who looks still may: a token that is revoked ends what it has opened."""
        try:
            await self._service.guard.admit(self._request, "read", changes=False)
        except Problem as problem:
            return problem.status == 503  # nobody can tell at the moment: the view says why
        return True
