"""Owns the table of routes: what is served where, who may ask, what goes in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from starlette.requests import Request
from starlette.responses import Response

from tqe.api import health, jobs, shapes
from tqe.api.service import Service

Handle = Callable[[Service, Request], Awaitable[Response]]
Scope = Literal["submit", "read", "admin"]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One route. `scope` None: open to all. `gives` and `takes` are the shapes of answer and body."""

    method: str
    path: str
    handle: Handle
    scope: Scope | None
    summary: str
    status: int = 200
    takes: Any = None
    gives: Any = None
    query: dict[str, str] = field(default_factory=dict)
    more: dict[int, str] = field(default_factory=dict)  # further answers that are no problems
    fails: tuple[int, ...] = ()
    media_type: str = "application/json"
    takes_media_type: str = "application/json"
    body_required: bool = True


ENDPOINTS: Final = (
    Endpoint(
        method="POST",
        path="/api/v1/jobs",
        handle=jobs.submit,
        scope="submit",
        summary="Submit a job",
        status=202,
        takes=shapes.JobRequest,
        gives=shapes.Submitted,
        more={200: "The idempotency key belongs to a job that was there already"},
        fails=(400, 409, 413, 415, 422, 429, 503, 504),
    ),
    Endpoint(
        method="GET",
        path="/api/v1/jobs/{id}",
        handle=jobs.show,
        scope="read",
        summary="One job; with wait, as soon as it has ended",
        gives=shapes.JobDocument,
        query={"wait": "Seconds to wait for its end, at most 60. The answer may come earlier."},
        fails=(400, 404, 503),
    ),
    Endpoint(
        method="DELETE",
        path="/api/v1/jobs/{id}",
        handle=jobs.cancel,
        scope="submit",
        summary="Cancel a job",
        gives=shapes.Cancelled,
        more={202: "A worker has it and was asked to drop it"},
        fails=(404, 409, 503),
    ),
    Endpoint(
        method="GET",
        path="/healthz",
        handle=health.alive,
        scope=None,
        summary="Whether this process serves",
        gives=shapes.Health,
    ),
    Endpoint(
        method="GET",
        path="/readyz",
        handle=health.ready,
        scope=None,
        summary="Whether Redis answers it",
        gives=shapes.Health,
        fails=(503,),
    ),
)
