"""Owns the routes of the queue as a whole: lanes and workers, pausing, resuming and purging a lane."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tqe import clock
from tqe.api.bodies import answer
from tqe.api.problems import not_found
from tqe.api.service import Service
from tqe.store import reading
from tqe.store.reading import QueueStatus, WorkerStatus


async def show(service: Service, request: Request) -> Response:
    """All lanes, and the totals."""
    status = await service.client.status()
    lanes = list(status.lanes)
    oldest = await service.client.run(reading.oldest_waiting(service.client.core.keys, lanes))
    return answer(queues_document(service, status, oldest))


def queues_document(service: Service, status: QueueStatus, oldest: dict[str, int]) -> dict[str, Any]:
    """The queue at a glance; `oldest` is since when a lane's oldest frame waits, in ms since 1970."""
    now_ms = clock.wall_ms()
    return {
        "queues": [
            {
                "name": name,
                "queued": lane.queued,
                "sorted": lane.sorted,
                "paused": lane.paused,
                "oldestAgeMs": max(0, now_ms - oldest[name]) if name in oldest else None,
                "predictedWaitMs": service.pulse.predicted_wait_ms(name),
            }
            for name, lane in status.lanes.items()
        ],
        "running": status.running,
        "scheduled": status.scheduled,
        "dead": status.dead,
        "quarantinedFrames": status.quarantined_frames,
        "parkedFrames": status.parked_frames,
        "submittedPerS": round(service.pulse.submitted_per_s, 1),
        "endedPerS": round(service.pulse.rate_per_s, 1),
        "totals": dict(status.totals),
    }


async def pause(service: Service, request: Request) -> Response:
    """Workers take nothing from the lane."""
    lane = _lane(service, request)
    await service.client.pause(lane)
    return answer({"name": lane, "paused": True})


async def resume(service: Service, request: Request) -> Response:
    """Workers take jobs from the lane again."""
    lane = _lane(service, request)
    await service.client.resume(lane)
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
    return answer({"workers": [worker_document(one) for one in await service.client.workers()]})


def worker_document(worker: WorkerStatus) -> dict[str, Any]:
    """One worker as its steward published it."""
    return {
        "incarnation": worker.incarnation,
        "host": worker.host,
        "worker": worker.worker,
        "pid": worker.pid,
        "cpu": worker.cpu,
        "state": worker.state,
        "lanes": list(worker.lanes),
        "jobs": [{"id": job.id, "type": job.type, "sinceMs": job.since_ms} for job in worker.jobs],
    }
