"""Owns what a server knows of the queue without asking for each request: a look at it each second."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from tqe import clock
from tqe.api.faults import Faults
from tqe.client import AsyncClient
from tqe.errors import TQEError
from tqe.store.reading import QueueStatus

PERIOD_S: Final = 1.0
ANSWER_S: Final = 5.0  # a look that takes longer has failed
STALE_S: Final = 8.0  # what is older is not the state of the queue any more
HISTORY: Final = 600  # looks that are kept: ten minutes, for who opens a chart
_SHARE: Final = 0.3  # what the newest second counts in the mean rate


class Bell:
    """Wakes all who wait for the next ring."""

    def __init__(self) -> None:
        self._ring = asyncio.Event()

    def ring(self) -> None:
        """Now."""
        rung, self._ring = self._ring, asyncio.Event()
        rung.set()

    async def heard(self) -> None:
        """Wait for the next ring; one that is over does not count."""
        await self._ring.wait()


class Pulse:
    """The last look: `status`, its age, how many jobs a second end; and the `history` of it.

    A point of the history has `atMs`, what happened a second since the point before, and what waits by lane.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._faults = Faults()
        self._read_ns = 0
        self._asked_ns = 0
        self._told: dict[str, tuple[bool, int]] = {}
        self._ended = 0
        self.status: QueueStatus | None = None
        self.error = "Redis has not been asked yet"
        self.rate_per_s = 0.0
        self.submitted_per_s = 0.0
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.looked = Bell()

    @property
    def age_s(self) -> float | None:
        """Seconds since the last look that succeeded; None before the first."""
        return None if self.status is None else (clock.monotonic_ns() - self._read_ns) / 1e9

    @property
    def fresh(self) -> QueueStatus | None:
        """The status, if it is young enough to go by."""
        age_s = self.age_s
        return self.status if age_s is not None and age_s < STALE_S else None

    async def run(self) -> None:
        """Look once a second until cancelled."""
        while True:
            await self.look()
            self.looked.ring()
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Ask Redis once; a failure is remembered and never raised."""
        asked_ns = clock.monotonic_ns()
        try:
            status = await asyncio.wait_for(self._client.status(), ANSWER_S)
            now_ns = clock.monotonic_ns()
            self._measure(status, (now_ns - self._read_ns) / 1e9)
        except Exception as e:
            if isinstance(e, TQEError):
                self.error = str(e)
            elif isinstance(e, TimeoutError):
                self.error = f"Redis has not answered within {ANSWER_S:g} seconds"
            else:
                self.error = f"the state of the queue cannot be read: {type(e).__name__}"
            self._faults.note("the state of the queue", e, self.error)
            return
        self.error = ""
        self.status, self._read_ns, self._asked_ns = status, now_ns, asked_ns

    def told(self, lane: str, *, paused: bool) -> None:
        """The lane was paused or resumed here: true at once, whatever the last look has seen."""
        self._told[lane] = paused, clock.monotonic_ns()

    def _paused(self, lane: str, seen: bool) -> bool:
        paused, at_ns = self._told.get(lane, (seen, 0))
        return paused if at_ns > self._asked_ns else seen

    def _measure(self, status: QueueStatus, passed_s: float) -> None:
        before = self.status
        if before is None or passed_s <= 0:
            return

        def per_s(*names: str) -> float:
            return max(0, sum(status.totals[name] - before.totals[name] for name in names)) / passed_s

        self.rate_per_s += _SHARE * (per_s("completed", "dead", "cancelled") - self.rate_per_s)
        self.submitted_per_s += _SHARE * (per_s("submitted") - self.submitted_per_s)
        self.history.append(
            {
                "atMs": clock.wall_ms(),
                "submittedPerS": round(per_s("submitted"), 2),
                "completedPerS": round(per_s("completed"), 2),
                "failedPerS": round(per_s("failed"), 2),
                "running": status.running,
                "queued": {name: lane.queued for name, lane in status.lanes.items()},
            }
        )

    def predicted_wait_ms(self, lane: str) -> int | None:
        """How long a job that enters the lane now will wait, by what waits before it and how fast jobs end.
        None where nobody can say: no worker lives, or nothing has ended lately."""
        status = self.fresh
        if status is None or not status.workers:
            return None
        ahead = 0
        for name, found in status.lanes.items():
            ahead += found.queued
            if name == lane:
                if self._paused(name, found.paused):
                    return None
                break
        if ahead == 0:
            return 0
        return round(ahead / self.rate_per_s * 1000) if self.rate_per_s > 0.01 else None
