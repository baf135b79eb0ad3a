"""Owns the routes of single jobs: submit, look, wait, cancel."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from tqe import clock
from tqe.api.bodies import answer, body_of, job_name_of, query_number, while_connected
from tqe.api.carrier import carry
from tqe.api.problems import Problem, not_found
from tqe.api.service import Service
from tqe.client import submission_from_json
from tqe.errors import ResultError
from tqe.job import JobStatus, lane_name
from tqe.store.forecast import Forecast, forecast

WAIT_S_MAX: Final = 60.0
WAIT_AGAIN_S: Final = 2
# Some of them (`link.EARS_MAX`) hear of the end at once, each on a connection of its own to Redis, the others
# ask each second. Who comes on top is answered at once, and told when to come again.
WAITS_MAX: Final = 500

_FIELDS: Final = {
    "submitted_at": "submittedAt",
    "started_at": "startedAt",
    "finished_at": "finishedAt",
    "predicted_ms": "predictedMs",
    "predicted_wait_ms": "predictedWaitMs",
}


async def submit(service: Service, request: Request) -> Response:
    """202 for a job that was created, 200 for one that holds the idempotency key already."""
    raw = await body_of(request)
    limit = service.settings.payload_max_bytes
    type_name, payload, options = submission_from_json(raw, payload_max_bytes=limit, what="body")
    if service.limits.active:
        refusal = service.limits.enter(lane_of(service, type_name, options))
        if refusal is not None:
            raise refusal
    given = [payload]
    # As objects a payload may take fifty times as much memory as its text: nobody keeps it while Redis is
    # waited for.
    del payload
    job = await service.client.submit(type_name, given.pop(), **{**carry(request), **options})
    if not job.created:
        status = (await service.client.job(job.id)).status
        return answer({"id": job.id, "status": status, "created": False, "predictedWaitMs": None})
    due_ms = _due_ms(options)
    wait_ms = service.pulse.predicted_wait_ms(lane_of(service, type_name, options))
    return answer(
        {
            "id": job.id,
            "status": "scheduled" if due_ms else "queued",
            "created": True,
            "predictedWaitMs": None if wait_ms is None else due_ms + wait_ms,
        },
        202,
    )


def lane_of(service: Service, type_name: str, options: dict[str, Any]) -> str:
    """The lane that a submission enters. Raises what refuses its options."""
    task = service.registry.get(type_name) if service.registry else None
    if task is not None and task.lane and not ("priority" in options or "lane" in options):
        return task.lane
    settings = service.settings
    return lane_name(options, lanes=settings.lanes, default_lane=settings.default_lane)


def _due_ms(options: dict[str, Any]) -> int:
    """How far away the due time is that the client asked for; checked by the submission already."""
    if options.get("delay"):
        return int(options["delay"] * 1000)
    run_at = options.get("run_at")
    if run_at is None:
        return 0
    at_s = run_at if isinstance(run_at, int | float) else run_at.timestamp()
    return max(0, round(at_s * 1000) - clock.wall_ms())


async def show(service: Service, request: Request) -> Response:
    """One job; `wait` makes it a long poll until the job has ended."""
    name = job_name_of(request)
    wait_s = query_number(request, "wait", 0, least=0, most=WAIT_S_MAX)
    job = await service.client.job(name)
    waits = wait_s > 0 and not job.ended and job.status != "unknown"
    full = waits and service.waits >= WAITS_MAX
    if waits and not full:
        service.waits += 1
        try:
            await _wait(service, request, name, wait_s)
        finally:
            service.waits -= 1
        job = await service.client.job(name)
    if job.status == "unknown":
        raise _no_job(name)
    expected = await service.client.run(forecast(service.client.core.keys, service.settings.lanes, job))
    found = answer(job_document(job, expected))
    if full:
        found.headers["Retry-After"] = str(WAIT_AGAIN_S)  # or clients that ask again at once would spin
    return found


async def _wait(service: Service, request: Request, name: str, wait_s: float) -> None:
    """Until the job has ended, the time is over, the client is gone or the server stops."""

    async def ended() -> None:
        with contextlib.suppress(ResultError):  # how it ended is told by its record
            await service.client.result(name, wait_s)

    await while_connected(request.receive, ended(), _closing(service))


async def _closing(service: Service) -> None:
    await service.closing.wait()


async def cancel(service: Service, request: Request) -> Response:
    """200 if it will not run, 202 if a worker was asked, 409 if it has ended."""
    name = job_name_of(request)
    outcome = await service.client.cancel(name)
    if outcome == "unknown":
        raise _no_job(name)
    if outcome == "too_late":
        status = (await service.client.job(name)).status
        detail = f"job {name} has ended: it is {status}"
        raise Problem(409, "too-late", "The job has ended", detail, id=name, jobStatus=status)
    return answer({"id": name, "outcome": outcome}, 200 if outcome == "cancelled" else 202)


def job_document(job: JobStatus, expected: Forecast) -> dict[str, Any]:
    """The fields of `tqe job --json`, as they are spelt on the wire."""
    found = job.as_dict() | expected.as_dict()
    return {_FIELDS.get(name, name): value for name, value in found.items()}


def _no_job(name: str) -> Problem:
    return not_found(
        f"nothing is known of job {name}: there is none, it was untracked, or its record has expired"
    )
