"""Owns what the live view is made of: each of its parts, as it is read for the dashboard."""

from __future__ import annotations

from typing import Any, Final

from tqe.api.documents import groups_document, queues_document, worker_document
from tqe.api.live import Part
from tqe.api.pulse import Pulse
from tqe.client import AsyncClient
from tqe.store import reading

WORKERS_MAX: Final = 256
GROUPS_MAX: Final = 100
JOBS_MAX: Final = 4  # of one worker; a page shows no more, and coroutines may be thousands


def parts(client: AsyncClient, pulse: Pulse) -> dict[str, Part]:
    """All parts by name."""
    made = _Views(client, pulse)
    return {
        "queue": Part(made.queue),
        "workers": Part(made.workers),
        "dead": Part(made.dead, every_s=2, mark=made.dead_mark),
    }


class _Views:
    def __init__(self, client: AsyncClient, pulse: Pulse) -> None:
        self._client = client
        self._pulse = pulse
        self._keys = client.core.keys

    async def queue(self) -> dict[str, Any] | None:
        """Lanes, totals, and the point of the history that belongs to them."""
        status = self._pulse.fresh
        if status is None:
            return None
        oldest = await self._client.run(reading.oldest_waiting(self._keys, list(status.lanes)))
        history = self._pulse.history
        return {
            **queues_document(self._pulse, status, oldest),
            "point": history[-1] if history else None,
        }

    async def workers(self) -> dict[str, Any] | None:
        """The workers as the pulse saw them: nobody is asked again."""
        status = self._pulse.fresh
        if status is None:
            return None
        shown = []
        for worker in status.workers[:WORKERS_MAX]:
            found = worker_document(worker)
            shown.append({**found, "jobs": found["jobs"][:JOBS_MAX], "running": len(worker.jobs)})
        return {"workers": shown, "more": max(0, len(status.workers) - WORKERS_MAX)}

    async def dead(self) -> dict[str, Any] | None:
        """Groups of dead jobs without the ids, which who acts on a group asks for."""
        found = await groups_document(self._client)
        groups = [
            {name: value for name, value in group.items() if name != "ids"} for group in found["groups"]
        ]
        return {**found, "groups": groups[:GROUPS_MAX], "moreGroups": max(0, len(groups) - GROUPS_MAX)}

    def dead_mark(self) -> object:
        """What changes whenever a job enters or leaves the dead-letter queue."""
        status = self._pulse.status
        if status is None:
            return None
        return status.dead, *(
            status.totals.get(name) for name in ("dead", "replayed", "purged", "dlq_dropped")
        )
