"""Owns how much a caller may ask for: requests a second of each token, and jobs that may wait in a lane."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import Final

from starlette.requests import Request

from tqe import clock
from tqe.api.faults import Faults
from tqe.api.problems import Problem
from tqe.api.pulse import ANSWER_S, PERIOD_S, STALE_S, Pulse
from tqe.client import AsyncClient
from tqe.errors import TQEError
from tqe.settings import Settings
from tqe.store import backlog
from tqe.store.backlog import Backlog
from tqe.store.tokens import Token

CALLER: Final = "tqe.caller"  # in a request's scope: the token's name, None where nobody needs one
RETRY_S_MAX: Final = 60


class Limits:
    """What one server process has let in; each process counts for itself. `active`: there is any limit;
    `capped`: one of what waits."""

    def __init__(self, settings: Settings, client: AsyncClient, pulse: Pulse) -> None:
        self._rate_per_s = settings.http_rate_per_s
        self._jobs_max = settings.http_backlog_jobs_max
        self._backlog_s_max = settings.http_backlog_s_max
        self._lanes = settings.lanes
        self._client = client
        self._pulse = pulse
        self._left: dict[str | None, tuple[float, int]] = {}  # caller → requests that are left, as of when
        self._backlog: Backlog | None = None
        self._read_ns = 0
        self._entered: Counter[str] = Counter()  # by lane, since the backlog was read
        self._faults = Faults()
        self.capped = self._jobs_max is not None or self._backlog_s_max is not None
        self.active = self.capped or self._rate_per_s is not None

    async def run(self) -> None:
        """Read what waits once a second until cancelled. Of use only where that is limited: `capped`."""
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Read it once; where that fails the last one counts for a while."""
        question = self._client.run(backlog.look(self._client.core.keys, self._lanes))
        before = self._entered.copy()
        try:
            self._backlog = await asyncio.wait_for(question, ANSWER_S)
        except (TQEError, TimeoutError):
            return  # the pulse logs that Redis is away
        except Exception as e:
            self._faults.note("what waits", e)
            return
        self._read_ns = clock.monotonic_ns()
        self._entered -= before  # what went in meanwhile may count twice, rather than not at all

    def ask(self, request: Request, token: Token | None) -> None:
        """Let a request in. Raises Problem if the caller has asked too often."""
        caller = request.scope[CALLER] = None if token is None else token.name
        problem = self.turn(caller)
        if problem is not None:
            raise problem

    def turn(self, caller: str | None) -> Problem | None:
        """Take one of the caller's turns; what to answer when there is none. They come back evenly, and those
        of one second can be saved up."""
        rate = self._rate_per_s
        if rate is None:
            return None
        now_ns = clock.monotonic_ns()
        left, at_ns = self._left.get(caller, (float(rate), now_ns))
        left = min(float(rate), left + (now_ns - at_ns) / 1e9 * rate)
        if left >= 1:
            self._left[caller] = (left - 1, now_ns)
            return None
        self._left[caller] = (left, now_ns)
        return _too_many(
            "too-many-requests",
            "Too many requests",
            f"{'callers' if caller is None else f'the token {caller!r}'} may ask {rate} times a second"
            " (http_rate_per_s): wait",
            (1 - left) / rate,
        )

    def enter(self, lane: str) -> Problem | None:
        """Let a job enter the lane; what to answer when too much waits there. What this process has let in
        since Redis was asked last counts too."""
        found = self._backlog.lanes.get(lane) if self._backlog is not None else None
        if found is None or clock.monotonic_ns() - self._read_ns > STALE_S * 1e9:
            return None
        waiting = found.jobs + self._entered[lane]
        mean_s = found.seconds / found.jobs if found.jobs else 0.0
        room = math.inf if self._jobs_max is None else self._jobs_max
        if self._backlog_s_max is not None and mean_s:
            room = min(room, self._backlog_s_max / mean_s)
        if waiting < room:
            self._entered[lane] += 1
            return None
        per_s = self._pulse.rate_per_s
        return _too_many(
            "backlog-full",
            "Too much waits",
            f"{waiting} jobs wait in the lane {lane}, about {waiting * mean_s:.0f} seconds of work on one"
            " worker; the settings http_backlog_jobs_max and http_backlog_s_max say how much may: wait, or"
            " run more workers",
            (waiting - room + 1) / per_s if per_s > 0.01 else RETRY_S_MAX,
            lane=lane,
        )


def _too_many(name: str, title: str, detail: str, seconds: float, **facts: str) -> Problem:
    after_s = max(1, min(RETRY_S_MAX, math.ceil(seconds)))
    return Problem(429, name, title, detail, retry_after_s=after_s, retryAfterS=after_s, **facts)
