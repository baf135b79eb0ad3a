"""Owns how much a caller may ask for: requests a second of each token, and jobs that may wait in a lane."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from starlette.requests import Request

from tqe import clock
from tqe.api.problems import Problem
from tqe.api.pulse import Pulse
from tqe.settings import Settings
from tqe.store.reading import QueueStatus
from tqe.store.tokens import Token

CALLER: Final = "tqe.caller"  # in a request's scope: the token's name, None where nobody needs one
RETRY_S_MAX: Final = 60


class Limits:
    """What one server process has let in; each process counts for itself. `active`: there is any limit."""

    def __init__(self, settings: Settings, pulse: Pulse) -> None:
        self._rate_per_s = settings.http_rate_per_s
        self._jobs_max = settings.http_backlog_jobs_max
        self._backlog_s_max = settings.http_backlog_s_max
        self._pulse = pulse
        self._left: dict[str | None, tuple[float, int]] = {}  # caller → requests that are left, as of when
        self._entered: Counter[str] = Counter()  # by lane, since that look of the pulse
        self._status: QueueStatus | None = None
        self.active = bool(self._rate_per_s or self._jobs_max is not None or self._backlog_s_max is not None)

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
        status = self._pulse.fresh
        if status is None or lane not in status.lanes:
            return None
        if status is not self._status:
            self._status = status
            self._entered.clear()
        waiting = status.lanes[lane].queued + self._entered[lane]
        mean_s, per_s = self._pulse.mean_s, self._pulse.rate_per_s
        room = math.inf if self._jobs_max is None else self._jobs_max
        if self._backlog_s_max is not None and mean_s:
            room = min(room, self._backlog_s_max / mean_s)
        if waiting < room:
            self._entered[lane] += 1
            return None
        work = "" if mean_s is None else f", about {waiting * mean_s:.0f} seconds of work on one worker"
        return _too_many(
            "backlog-full",
            "Too much waits",
            f"{waiting} jobs wait in the lane {lane}{work}; the settings http_backlog_jobs_max and"
            " http_backlog_s_max say how many may: wait, or run more workers",
            (waiting - room + 1) / per_s if per_s > 0.01 else RETRY_S_MAX,
            lane=lane,
        )


def _too_many(name: str, title: str, detail: str, seconds: float, **facts: str) -> Problem:
    after_s = max(1, min(RETRY_S_MAX, math.ceil(seconds)))
    return Problem(429, name, title, detail, retry_after_s=after_s, retryAfterS=after_s, **facts)
