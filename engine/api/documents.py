"""Owns how lanes, workers, dead jobs and schedules are spelt on the wire."""

from __future__ import annotations

from typing import Any, Final

from tqe import clock
from tqe.api.pulse import Pulse
from tqe.client import AsyncClient
from tqe.job import OUTWARD_NAMES
from tqe.store.reading import DeadJob, QueueStatus, WorkerStatus
from tqe.store.scheduling import Row

GROUPED_MAX: Final = 10_000  # of the newest dead jobs that are grouped
_TEXT_MAX: Final = 160
_OUTWARD: Final = {snake: camel for camel, snake in OUTWARD_NAMES.items()}


def queues_document(pulse: Pulse, status: QueueStatus, oldest: dict[str, int]) -> dict[str, Any]:
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
                "predictedWaitMs": pulse.predicted_wait_ms(name),
            }
            for name, lane in status.lanes.items()
        ],
        "running": status.running,
        "scheduled": status.scheduled,
        "dead": status.dead,
        "quarantinedFrames": status.quarantined_frames,
        "parkedFrames": status.parked_frames,
        "submittedPerS": round(pulse.submitted_per_s, 1),
        "endedPerS": round(pulse.rate_per_s, 1),
        "totals": {_camel(name): count for name, count in status.totals.items()},
    }


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


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


def dead_document(job: DeadJob) -> dict[str, Any]:
    """An entry of the dead-letter queue."""
    found = job.as_dict()
    found["diedAt"] = found.pop("died_at")
    return found


async def groups_document(client: AsyncClient) -> dict[str, Any]:
    """The newest dead jobs by type, reason and error, the largest group first."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    seen, more = 0, False
    async for job in client.dead_jobs():
        if seen == GROUPED_MAX:
            more = True
            break
        seen += 1
        error = (job.error or "").strip().rpartition("\n")[2][:_TEXT_MAX]
        key = job.type or "", job.reason or "", error
        group = found.get(key)
        if group is None:
            newest = dead_document(job)
            found[key] = {
                "type": job.type,
                "reason": job.reason,
                "error": error,
                "count": 1,
                "newest": newest["diedAt"],
                "sample": job.id,
                "ids": [job.id],
            }
        else:
            group["count"] += 1
            group["ids"].append(job.id)
    ordered = sorted(found.values(), key=lambda group: -int(group["count"]))
    return {"groups": ordered, "jobs": seen, "more": more}


def cron_document(row: Row, now_ms: int) -> dict[str, Any]:
    """The fields of `tqe cron list --json`, as they are spelt on the wire."""
    found = row.as_dict(now_ms)
    found["slotAs"] = found.pop("slot_as")
    found["lastJob"] = found.pop("last_job")
    found["options"] = {_OUTWARD.get(name, name): value for name, value in found["options"].items()}
    return found
