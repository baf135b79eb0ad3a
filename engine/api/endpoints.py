"""Owns the table of routes: what is served where, who may ask, what goes in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from tqe.api import batch, cron, dead, events, health, jobs, metrics, queues, shapes
from tqe.api.service import Service
from tqe.store.tokens import Scope

Handle = Callable[[Service, Request], Awaitable[Response]]


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
        method="POST",
        path="/api/v1/jobs:batch",
        handle=batch.submit_batch,
        scope="submit",
        summary="Submit a job a line (NDJSON); answers with a line for each",
        takes=shapes.JobRequest,
        gives=shapes.BatchLine,
        takes_media_type="application/x-ndjson",
        media_type="application/x-ndjson",
        fails=(413, 415, 429, 503, 504),
    ),
    Endpoint(
        method="GET",
        path="/api/v1/queues",
        handle=queues.show,
        scope="read",
        summary="All lanes, and the totals",
        gives=shapes.Queues,
        fails=(503,),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/queues/{name}/pause",
        handle=queues.pause,
        scope="admin",
        summary="Let workers take nothing from a lane",
        gives=shapes.LanePaused,
        fails=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/queues/{name}/resume",
        handle=queues.resume,
        scope="admin",
        summary="Let workers take jobs from a lane again",
        gives=shapes.LanePaused,
        fails=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/queues/{name}/purge",
        handle=queues.purge,
        scope="admin",
        summary="Cancel what waits in a lane now; delayed jobs and retries stay",
        gives=shapes.LanePurged,
        fails=(404, 503),
    ),
    Endpoint(
        method="GET",
        path="/api/v1/workers",
        handle=queues.workers,
        scope="read",
        summary="All workers that live, and what they run",
        gives=shapes.Workers,
        fails=(503,),
    ),
    Endpoint(
        method="GET",
        path="/api/v1/dlq",
        handle=dead.show_all,
        scope="read",
        summary="Dead jobs, newest first, a page at a time",
        gives=shapes.DeadPage,
        query={
            "type": "Only of this type.",
            "reason": "Only those whose reason begins so: crash finds crash:SIGKILL.",
            "cursor": "Where the page before ended.",
        },
        fails=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/api/v1/dlq/groups",
        handle=dead.groups,
        scope="read",
        summary="Dead jobs by type, reason and error",
        gives=shapes.DeadGroups,
        fails=(503,),
    ),
    Endpoint(
        method="GET",
        path="/api/v1/dlq/{id}",
        handle=dead.show,
        scope="read",
        summary="One dead job with its payload",
        gives=shapes.DeadEntry,
        fails=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/dlq/{id}/replay",
        handle=dead.replay_one,
        scope="admin",
        summary="Run a dead job again, from its first attempt",
        gives=shapes.Replayed,
        fails=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/dlq:replay",
        handle=dead.replay_many,
        scope="admin",
        summary="Run selected dead jobs again",
        takes=shapes.Selection,
        gives=shapes.Replayed,
        fails=(400, 413, 415, 422, 503),
    ),
    Endpoint(
        method="DELETE",
        path="/api/v1/dlq/{id}",
        handle=dead.delete_one,
        scope="admin",
        summary="Drop a dead job for good",
        gives=shapes.Deleted,
        fails=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/dlq:delete",
        handle=dead.delete_many,
        scope="admin",
        summary="Drop selected dead jobs for good",
        takes=shapes.Selection,
        gives=shapes.Deleted,
        fails=(400, 413, 415, 422, 503),
    ),
    Endpoint(
        method="GET",
        path="/api/v1/cron",
        handle=cron.show,
        scope="read",
        summary="All schedules",
        gives=shapes.Schedules,
        fails=(503,),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/cron/{name}/pause",
        handle=cron.pause,
        scope="admin",
        summary="Let a schedule submit nothing; jobs that it has submitted go on",
        gives=shapes.SchedulePaused,
        fails=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/api/v1/cron/{name}/resume",
        handle=cron.resume,
        scope="admin",
        summary="Let a schedule submit again, from now on",
        gives=shapes.SchedulePaused,
        fails=(404, 503),
    ),
    Endpoint(
        method="GET",
        path="/metrics",
        handle=metrics.show,
        scope="read",
        summary="The queue's metrics for Prometheus",
        gives=str,
        media_type="text/plain",
    ),
    Endpoint(
        method="GET",
        path="/api/v1/events",
        handle=events.show,
        scope="read",
        summary="What the dashboard shows, once a second, as server-sent events",
        gives=str,
        media_type="text/event-stream",
        fails=(503,),
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
