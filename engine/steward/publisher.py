"""Publishes what each worker of this host runs, and how its tasks do, once a second.

Nobody then has to scan what is in flight: `running` means listed here, at most a second old.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.job import job_id
from tqe.steward.context import Context
from tqe.steward.sums import Sums
from tqe.store import housekeeping
from tqe.telemetry import logs
from tqe.telemetry.metrics import capped

_log = logs.get("steward")

TTL_MS: Final = 5_000
JOBS_MAX: Final = 1_000  # of one worker that are listed
MEAN_CHANGE: Final = 0.05  # a mean is written again when it has moved by this part


@dataclass(frozen=True)
class PublishReport:
    """What was written: incarnation → record, type → mean in µs. `full`: Redis had no room for it."""

    workers: dict[str, dict[str, Any]]
    means: dict[str, int]
    full: bool = False


class Publisher:
    """The publish duty."""

    name = "publish"
    period_s = 1.0

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None
        self._since: dict[tuple[int, str], int] = {}  # (slot, job) that runs beside others → first seen, ns
        self._means: dict[str, int] = {}
        self._full = False
        # A steward that follows ours takes another name, which its workers' records tell from then on: what
        # both have published is never added up.
        self._steward = context.new_id()
        self._sums = Sums(context.board)
        self._runs = 0

    def run_once(self) -> PublishReport:
        context = self._context
        now_ns = context.now_ns()
        workers: dict[str, dict[str, Any]] = {}
        since: dict[tuple[int, str], int] = {}
        for slot in context.live_slots():
            name = slot.text(layout.C_INCARNATION)
            if name:
                workers[name] = self._record(slot, now_ns, since)
        self._since = since
        means = self._changed_means()
        texts = {name: msgspec.json.encode(record) for name, record in workers.items()}
        written = housekeeping.publish(
            context.door, context.keys, texts, means, ttl_ms=TTL_MS, tasks=self._tasks() if texts else None
        )
        if written:
            self._means |= means
        elif not self._full:
            _log.warning("Redis is full: what the workers run cannot be published")
        self._full = not written
        return PublishReport(workers, means, not written)

    def _tasks(self) -> tuple[str, bytes] | None:
        """What this host's tasks did so far, in every second run: nobody looks more often."""
        self._runs += 1
        if not self._runs & 1:
            return None
        return self._steward, msgspec.json.encode(capped(self._sums.read()[1]))

    def _record(self, slot: SlotView, now_ns: int, since: dict[tuple[int, str], int]) -> dict[str, Any]:
        cpu, phase = slot.get(layout.C_CPU), slot.get(layout.C_PHASE)
        return {
            "worker": slot.get(layout.C_NUMBER),
            "pid": slot.get(layout.C_PID),
            "cpu": cpu - 1 if cpu else None,
            "state": layout.PHASES[phase] if phase < len(layout.PHASES) else "unknown",
            "host": self._context.host,
            "lanes": list(self._context.settings.lanes),
            "jobs": self._jobs(slot, now_ns, since),
            "counters": slot.counters(),
            "scaling": None if self._context.scaling is None else self._context.scaling._asdict(),
            "steward": self._steward,
        }

    def _jobs(self, slot: SlotView, now_ns: int, since: dict[tuple[int, str], int]) -> list[dict[str, Any]]:
        current = self._current(slot, now_ns)
        jobs = [current] if current else []
        if not slot.get(layout.C_ASYNC):
            return jobs
        # Coroutines and the helper thread: the rows say which have started, not of what type they are.
        for row in slot.rows(records=False):
            for k, state in enumerate(row.states):
                if state != layout.JOB_STARTED or len(jobs) >= JOBS_MAX:
                    continue
                name = job_id(row.frame_id, row.first + k)
                if current and current["id"] == name:
                    continue
                key = (slot.number, name)
                since[key] = self._since.get(key, now_ns)
                jobs.append({"id": name, "type": "", "since_ms": self._context.redis_ms(since[key])})
        return jobs

    def _current(self, slot: SlotView, now_ns: int) -> dict[str, Any] | None:
        """The job whose code runs at this moment."""
        step = slot.get(layout.C_IN_USER)
        if not step:
            return None
        row, index, task = slot.get(layout.C_ROW), slot.get(layout.C_INDEX), slot.get(layout.C_TASK)
        if row >= layout.ROWS or task >= layout.TASKS_MAX:
            return None
        frame_id = slot.row(row).frame_id
        if slot.get(layout.C_IN_USER) != step:
            return None  # it went on while we read
        since_ns = self._context.sightings.since_ns(slot, step)
        return {
            "id": job_id(frame_id, index),
            "type": slot.task_name(task),
            "since_ms": self._context.redis_ms(now_ns if since_ns is None else since_ns),
        }

    def _changed_means(self) -> dict[str, int]:
        """Means over this host's workers, weighted by the jobs behind them, that differ from what was
        written."""
        sums: dict[str, tuple[int, int]] = {}
        for slot in self._context.live_slots():
            for name, words in slot.tasks():
                timed = words[layout.T_TIMED // layout.WORD]
                if timed:
                    total, weight = sums.get(name, (0, 0))
                    mean_ns = words[layout.T_MEAN_NS // layout.WORD]
                    sums[name] = (total + mean_ns * timed, weight + timed)
        means = {name: max(1, total // weight // 1000) for name, (total, weight) in sums.items()}
        return {
            name: mean
            for name, mean in means.items()
            if abs(mean - self._means.get(name, 0)) > MEAN_CHANGE * self._means.get(name, 0)
        }
