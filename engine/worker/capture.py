"""Captures a few of a worker's runs, with all that a model may learn from them, and hands them to Redis.

A lease is picked when it is fetched, at most so many a second, and its next job then takes the slow path
once: no job of the hot path costs a clock or a branch more. Each run is kept with the columns and the
predictions of the moment at which it started, so that nothing that was known later can leak into training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tqe import clock
from tqe.codec import hot
from tqe.registry import Task
from tqe.worker.fields import Fields, Marks, Value
from tqe.worker.ordering import Ordering, Waiting

RATE_PER_S: Final = 50.0
BURST: Final = 50.0
PENDING_MAX: Final = 256  # traces that wait for a Redis that does not answer
FLUSH_NS: Final = 250_000_000

# What `Lease.cancels` holds of a picked lease: the walk hands its next job to Python, as it does where
# somebody has asked for a cancel; nobody has.
PICKED: Final[set[int]] = set()

# A run that its limit ended had at least so long; how long one took until it failed says nothing.
_TEACHES: Final = ("done", "timeout")


class Trace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run, as it stands in the stream of traces. Times in µs, predictions in seconds."""

    type: str
    lane: str
    payload_bytes: int
    attempt: int
    entered_us: int  # into its lane, by Redis' clock
    start_us: int  # by the same
    run_us: float
    # done | failed | timeout; a run that somebody else ended (cancel, stop) says nothing and is not kept
    outcome: str
    fields: Mapping[str, Value] = {}
    model_s: float | None = None
    mean_s: float | None = None
    version: str = ""  # of the model that predicted


@dataclass(slots=True, eq=False)
class Run:
    """A run under way that is being captured."""

    lease: hot.Lease
    index: int
    job: Waiting
    start_us: int
    predicted: tuple[float | None, float | None]
    begun_ns: int = 0
    outcome: str = "done"


class Capture:
    """One worker's capture. `ordering` is asked at the start of each captured run, and told of its end."""

    def __init__(
        self, tasks: Mapping[bytes, Task[..., Any]], *, on: bool = True, marks: Marks | None = None
    ) -> None:
        self.fields = {
            key: Fields(task.features, name=task.name, number=number, marks=marks)
            for number, (key, task) in enumerate(tasks.items())
        }
        self.ordering: Ordering | None = None
        self.on = on
        self._allowance = 1.0
        self._refilled_ns = 0
        self._runs: list[Run] = []
        self._pending: list[bytes] = []
        self._flushed_ns = 0
        self.dropped = 0

    # -- picking

    def pick(self, leases: list[hot.Lease], now_ns: int) -> None:
        """Mark some of the leases that were just taken in."""
        if not self.on or not leases:
            return
        gained = (now_ns - self._refilled_ns) * (RATE_PER_S / 1e9)
        self._allowance = min(BURST, self._allowance + gained)
        self._refilled_ns = now_ns
        if self._allowance < 1.0:
            return
        count = min(len(leases), int(self._allowance))
        for lease in leases if count == len(leases) else random.sample(leases, count):
            if lease.cancels is None and lease.next < lease.stop:
                lease.cancels = PICKED
                self._allowance -= 1.0

    # -- runs

    def begin(
        self, lease: hot.Lease, index: int, task: Task[..., Any], payload: bytes, redis_offset_ms: int
    ) -> Run:
        """A captured run starts now."""
        read = self.fields[task.key]
        fields = read(payload)
        read.end_batch()
        job = Waiting(task.name, lease.lane, payload, lease.attempts, lease.enqueued_us, fields)
        predicted = (None, None) if self.ordering is None else self.ordering.rungs(job)
        begun_ns = clock.boottime_ns()
        run = Run(lease, index, job, begun_ns // 1000 + redis_offset_ms * 1000, predicted, begun_ns)
        self._runs.append(run)
        return run

    def failed(self, lease: hot.Lease, index: int, outcome: str) -> None:
        """A run ended so; '' if it says nothing about durations."""
        for run in self._runs:
            if run.lease is lease and run.index == index:
                run.outcome = outcome

    def end(self, run: Run) -> None:
        """A captured run has ended now."""
        run_ns = clock.boottime_ns() - run.begun_ns
        self._runs.remove(run)
        if not run.outcome:
            return
        if self.ordering is not None and run.outcome == "done":
            self.ordering.tally.ran(self.ordering.in_use(run.predicted), run_ns / 1e9)
        if len(self._pending) >= PENDING_MAX:
            self.dropped += 1
            return
        job, (model_s, mean_s) = run.job, run.predicted
        predicted = model_s is not None or mean_s is not None
        self._pending.append(
            msgspec.json.encode(
                Trace(
                    type=job.type,
                    lane=job.lane,
                    payload_bytes=len(job.payload),
                    attempt=job.attempt + 1,
                    entered_us=job.enqueued_us,
                    start_us=run.start_us,
                    run_us=max(run_ns, 1) / 1000,
                    outcome=run.outcome,
                    fields=job.fields or {},
                    model_s=model_s,
                    mean_s=mean_s,
                    version=self.ordering.version if self.ordering is not None and predicted else "",
                )
            )
        )
        if self.ordering is not None and run.outcome in _TEACHES:
            self.ordering.completed(job, run_ns / 1e9)

    # -- telling

    def take(self, now_ns: int, *, force: bool = False) -> list[bytes]:
        """What there is to write to the stream, a few times a second."""
        if not self._pending or (not force and now_ns - self._flushed_ns < FLUSH_NS):
            return []
        self._flushed_ns = now_ns
        found, self._pending = self._pending, []
        return found
