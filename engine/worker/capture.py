"""Captures a few of a worker's runs, with all that a model may learn from them, and hands them to Redis.

A lease is picked when it is fetched, at most so many a second, and its next job then takes the slow path
once: no job of the hot path costs a clock or a branch more. Each run is kept with the columns and the
predictions of the moment at which it started, so that nothing that was known later can leak into training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tqe import clock
from tqe.codec import hot
from tqe.registry import Task
from tqe.worker.fields import Fields, Value

RATE_PER_S: Final = 20.0
BURST: Final = 20.0
PENDING_MAX: Final = 256  # traces that wait for a Redis that does not answer
FLUSH_NS: Final = 250_000_000

# What `Lease.cancels` holds of a picked lease: the walk hands its next job to Python, as it does where
# somebody has asked for a cancel; nobody has.
PICKED: Final[set[int]] = set()

# (type, lane, payload bytes, attempt, submitted at in s since 1970, fields) -> what each rung predicts, in s.
Predict = Callable[[str, str, int, int, float, Mapping[str, Value]], tuple[float | None, float | None]]


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
    fields: dict[str, Value] = {}
    model_s: float | None = None
    mean_s: float | None = None
    version: str = ""  # of the model that predicted


@dataclass(slots=True, eq=False)
class Run:
    """A run under way that is being captured."""

    lease: hot.Lease
    index: int
    type: str
    payload_bytes: int
    fields: dict[str, Value]
    start_us: int
    predicted: tuple[float | None, float | None]
    begun_ns: int = 0
    outcome: str = "done"


class Capture:
    """One worker's capture. `predict` is asked at the start of each captured run; None: nothing predicts."""

    def __init__(self, tasks: Mapping[bytes, Task[..., Any]], *, on: bool = True) -> None:
        self.fields = {key: Fields(task.features) for key, task in tasks.items()}
        self.predict: Predict | None = None
        self.version = ""
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
        fields = self.fields[task.key](payload) or {}
        predicted: tuple[float | None, float | None] = (None, None)
        if self.predict is not None:
            predicted = self.predict(
                task.name, lease.lane, len(payload), lease.attempts + 1, lease.enqueued_us / 1e6, fields
            )
        begun_ns = clock.boottime_ns()
        start_us = begun_ns // 1000 + redis_offset_ms * 1000
        run = Run(lease, index, task.name, len(payload), fields, start_us, predicted, begun_ns)
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
        if len(self._pending) >= PENDING_MAX:
            self.dropped += 1
            return
        lease = run.lease
        model_s, mean_s = run.predicted
        self._pending.append(
            msgspec.json.encode(
                Trace(
                    type=run.type,
                    lane=lease.lane,
                    payload_bytes=run.payload_bytes,
                    attempt=lease.attempts + 1,
                    entered_us=lease.enqueued_us,
                    start_us=run.start_us,
                    run_us=max(run_ns, 1) / 1000,
                    outcome=run.outcome,
                    fields=run.fields,
                    model_s=model_s,
                    mean_s=mean_s,
                    version=self.version if model_s is not None or mean_s is not None else "",
                )
            )
        )

    # -- telling

    def take(self, now_ns: int, *, force: bool = False) -> list[bytes]:
        """What there is to write to the stream, a few times a second."""
        if not self._pending or (not force and now_ns - self._flushed_ns < FLUSH_NS):
            return []
        self._flushed_ns = now_ns
        found, self._pending = self._pending, []
        return found
