"""Owns the routes of the queue as a whole: lanes and workers, pausing, resuming and purging a lane."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from tqe.api.bodies import answer
from tqe.api.documents import queues_document, worker_document
from tqe.api.problems import not_found
from tqe.api.service import Service
from tqe.store import backlog, reading

JOBS_NAMED: Final = 100  # of each worker; the type of further coroutines is not looked up


async def show(service: Service, request: Request) -> Response:
    """All lanes, and the totals."""
    status = await service.client.status()
    lanes = list(status.lanes)
    oldest = await service.client.run(reading.oldest_waiting(service.client.core.keys, lanes))
    work = await service.client.run(backlog.look(service.client.core.keys, lanes))
    document = queues_document(service.pulse, status, oldest)
    for lane in document["queues"]:
        lane["predictedBacklogMs"] = round(work.lanes[lane["name"]].seconds * 1000)
    return answer(document | {"predictedBacklogMs": round(work.seconds * 1000)})


async def pause(service: Service, request: Request) -> Response:
    """Workers take nothing from the lane."""
    lane = _lane(service, request)
    await service.client.pause(lane)
    service.pulse.told(lane, paused=True)
    return answer({"name": lane, "paused": True})


async def resume(service: Service, request: Request) -> Response:
    """Workers take jobs from the lane again."""
    lane = _lane(service, request)
    await service.client.resume(lane)
    service.pulse.told(lane, paused=False)
    return answer({"name": lane, "paused": False})


async def purge(service: Service, request: Request) -> Response:
    """Cancel what waits in the lane."""
    lane = _lane(service, request)
    return answer({"name": lane, "purged": await service.client.purge_lane(lane)})


def _lane(service: Service, request: Request) -> str:
    name = str(request.path_params["name"]).lower()
    if name not in service.settings.lanes:
        there = ", ".join(service.settings.lanes)
        raise not_found(f"there is no lane {name[:40]!r}; there are: {there}")
    return name


async def workers(service: Service, request: Request) -> Response:
    """All workers that live, and what each runs."""
    found = await service.client.workers()
    named = await service.client.run(reading.name_jobs(service.client.core.keys, found, JOBS_NAMED))
    return answer({"workers": [worker_document(one) for one in named]})
