"""Owns what the live view is made of: each of its parts, as it is read for the dashboard."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tqe import clock
from tqe.api.documents import cron_document, queues_document, worker_document
from tqe.api.groups import Groups
from tqe.api.live import Part
from tqe.api.pulse import HISTORY, Pulse
from tqe.board import layout
from tqe.client import AsyncClient
from tqe.store import backlog, reading, scheduling
from tqe.store.reading import Prediction
from tqe.telemetry.metrics import TaskSample

WORKERS_MAX: Final = 256
GROUPS_MAX: Final = 100
SCHEDULES_MAX: Final = 200
TRACES_MAX: Final = 400  # captured runs that predictions are judged by, the newest
TASKS_EVERY_S: Final = 2  # stewards publish no more often
_LATELY: Final = 6  # looks at the tasks that "lately" means
_LATELY_MS: Final = 30_000  # and how old the oldest of them may be
JOBS_MAX: Final = 4  # of one worker; a page shows no more, and coroutines may be thousands


class Views:
    """The parts of one server process; it remembers what it needs to tell what happened lately."""

    def __init__(self, client: AsyncClient, pulse: Pulse, groups: Groups) -> None:
        self._client = client
        self._pulse = pulse
        self._groups = groups
        self._dead_mark: object = None
        self._keys = client.core.keys
        self._looks: deque[tuple[int, dict[str, TaskSample]]] = deque(maxlen=_LATELY)
        self._waits: deque[dict[str, Any]] = deque(maxlen=HISTORY // TASKS_EVERY_S)

    def parts(self) -> dict[str, Part]:
        """All parts by name."""
        return {
            "queue": Part(self.queue),
            "backlog": Part(self.backlog, every_s=3),
            "workers": Part(self.workers),
            "tasks": Part(self.tasks, every_s=TASKS_EVERY_S),
            "predictions": Part(self.predictions, every_s=3),
            "dead": Part(self.dead, every_s=2, mark=self.dead_mark),
            "cron": Part(self.cron, every_s=2),
        }

    def opening(self) -> dict[str, Any]:
        """What was before a viewer came: the queue at all times, waits as far as somebody looked."""
        return {"history": list(self._pulse.history), "waits": list(self._waits)}

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

    async def backlog(self) -> dict[str, Any] | None:
        """How long one worker would be busy with what waits, by lane."""
        status = self._pulse.fresh
        if status is None:
            return None
        found = await self._client.run(backlog.look(self._keys, list(status.lanes)))
        return {"lanes": {name: round(work.seconds * 1000) for name, work in found.lanes.items()}}

    async def workers(self) -> dict[str, Any] | None:
        """The workers as the pulse saw them; only coroutines' types are asked for."""
        status = self._pulse.fresh
        if status is None:
            return None
        shown = []
        workers = await self._client.run(
            reading.name_jobs(self._keys, status.workers[:WORKERS_MAX], JOBS_MAX)
        )
        for worker in workers:
            found = worker_document(worker)
            shown.append({**found, "jobs": found["jobs"][:JOBS_MAX], "running": len(worker.jobs)})
        return {"workers": shown, "more": max(0, len(status.workers) - WORKERS_MAX)}

    async def tasks(self) -> dict[str, Any] | None:
        """What each task did since its workers' supervisors began, and what of it lately."""
        status = self._pulse.fresh
        if status is None:
            return None
        found = await self._client.run(reading.tasks(self._keys, status.workers))
        now_ms = clock.wall_ms()
        while self._looks and now_ms - self._looks[0][0] > _LATELY_MS:
            self._looks.popleft()
        self._looks.append((now_ms, found))
        before_ms, before = self._looks[0]
        passed_s = (now_ms - before_ms) / 1000
        lately = _waits_since(found, before)
        if any(lately):
            self._waits.append({"atMs": now_ms, "bins": lately})
        return {
            "tasks": [_task(name, one, before.get(name), passed_s) for name, one in sorted(found.items())],
            "waits": self._waits[-1] if any(lately) else None,
        }

    async def predictions(self) -> dict[str, Any]:
        """Predicted against real durations of runs that were captured, and how good that is."""
        found = await self._client.run(reading.predictions(self._keys, TRACES_MAX))
        return {
            "model": {
                "version": found.version or None,
                "chosen": found.chosen or None,
                "rung": found.rung or None,
                "trainedAt": found.trained_at or None,
            },
            "runs": found.runs,
            "pairs": [_pair(one) for one in found.predicted],
            "byModel": _errors([(one.model_s, one.real_s) for one in found.predicted]),
            "byMean": _errors([(one.mean_s, one.real_s) for one in found.predicted]),
        }

    async def cron(self) -> dict[str, Any]:
        """Schedules, those that come next first."""
        view = await self._client.run(scheduling.look(self._keys))
        found = [cron_document(row, view.now_ms) for row in view.rows.values()]
        found.sort(key=lambda one: (one["next"] or "~", one["name"]))
        return {
            "schedules": found[:SCHEDULES_MAX],
            "more": max(0, len(found) - SCHEDULES_MAX),
            "damaged": list(view.damaged),
        }

    async def dead(self) -> dict[str, Any] | None:
        """Groups of dead jobs without the ids, which who acts on a group asks for."""
        found = await self._groups.document()
        groups = [
            {name: value for name, value in group.items() if name != "ids"} for group in found["groups"]
        ]
        return {**found, "groups": groups[:GROUPS_MAX], "moreGroups": max(0, len(groups) - GROUPS_MAX)}

    def dead_mark(self) -> object:
        """What changes whenever a job enters or leaves the dead-letter queue; while the groups of many are
        kept it stays as it was."""
        status = self._pulse.status
        if status is not None and not self._groups.kept:
            self._dead_mark = (
                status.dead,
                *(status.totals.get(name) for name in ("dead", "replayed", "purged", "dlq_dropped")),
            )
        return self._dead_mark


def _task(name: str, task: TaskSample, before: TaskSample | None, passed_s: float) -> dict[str, Any]:
    runs = _runs(task.outcomes)
    lately = max(0, runs - _runs(before.outcomes)) if before is not None else 0
    return {
        "type": name,
        "runs": runs,
        "completed": task.outcomes.get("completed", 0),
        "failed": task.outcomes.get("failed", 0),
        "dead": task.outcomes.get("dead", 0),
        "perS": round(lately / passed_s, 2) if passed_s > 0 else None,
        "runBins": list(task.run_bins),
        "waitBins": list(task.wait_bins),
    }


def _waits_since(found: Mapping[str, TaskSample], before: Mapping[str, TaskSample]) -> list[int]:
    """The histogram of the waits of all jobs that began in between; of tasks that are new, of none."""
    total = [0] * layout.BINS
    for name, task in found.items():
        if name in before:
            pairs = zip(total, task.wait_bins, before[name].wait_bins, strict=True)
            total = [all_ + max(0, now - then) for all_, now, then in pairs]
    return total


def _runs(outcomes: Mapping[str, int]) -> int:
    return outcomes.get("completed", 0) + outcomes.get("failed", 0)


def _pair(one: Prediction) -> list[Any]:
    predicted_s = one.model_s if one.model_s is not None else one.mean_s
    return [float(f"{predicted_s:.3g}"), float(f"{one.real_s:.3g}"), one.type]


def _errors(pairs: Sequence[tuple[float | None, float]]) -> dict[str, float] | None:
    """By which factor predictions are off, in the median, and which share is within a factor of two."""
    factors = [
        max(predicted / real, real / predicted)
        for predicted, real in pairs
        if predicted is not None and predicted > 0 and real > 0
    ]
    if not factors:
        return None
    return {
        "median": round(statistics.median(factors), 3),
        "withinTwo": round(sum(one <= 2 for one in factors) / len(factors), 3),
        "runs": len(factors),
    }
