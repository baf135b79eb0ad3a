"""Owns the probes: alive, and ready."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tqe.api.bodies import answer
from tqe.api.problems import Problem
from tqe.api.service import Service


async def alive(service: Service, request: Request) -> Response:
    """This process answers."""
    return answer({"status": "ok"})


async def ready(service: Service, request: Request) -> Response:
    """Redis answers too, as of the last second: probes cost it nothing."""
    if service.pulse.fresh is None:
        detail = service.pulse.error or "Redis has not answered for some seconds"
        raise Problem(503, "not-ready", "Not ready", detail, retry_after_s=1)
    return answer({"status": "ready"})
