"""Owns the replay of a trace on some servers under an order, by the rule and by the engine's mechanism.

`replay` is the rule itself: whoever has the lowest score runs next. `mechanism` is what the engine does to
reach it without ever looking at a whole lane: a list and a sorted set merged by key, windows of unscored
jobs, giving back.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final, Protocol

SCORE_JOB_S: Final = 8e-6
ROUND_TRIP_S: Final = 0.001
QUANTUM_S: Final = 0.005
WINDOW_JOBS: Final = 1_000


class Policy(Protocol):
    """Gives each job that must wait its score, and hears of completions in the order of the replay."""

    def score(self, job: int, now_s: float) -> float: ...
    def started(self, job: int, now_s: float) -> None: ...
    def completed(self, job: int, now_s: float) -> None: ...


class Fifo:
    """The baseline."""

    def score(self, job: int, now_s: float) -> float:
        return now_s

    def started(self, job: int, now_s: float) -> None:
        pass

    def completed(self, job: int, now_s: float) -> None:
        pass


class Fixed(Fifo):
    """Scores known beforehand, such as the true durations of an oracle."""

    def __init__(self, scores: Sequence[float]) -> None:
        self._scores = scores

    def score(self, job: int, now_s: float) -> float:
        return self._scores[job]


class Boosted(Fifo):
    """Fixed boosts: score = now - boost."""

    def __init__(self, boosts_s: Sequence[float]) -> None:
        self._boosts_s = boosts_s

    def score(self, job: int, now_s: float) -> float:
        return now_s - self._boosts_s[job]


def replay(
    arrive_s: Sequence[float], duration_s: Sequence[float], servers: int, policy: Policy
) -> list[float]:
    """Start times. Work-conserving, no preemption; a job that finds an idle server is not scored."""
    start_s = [0.0] * len(arrive_s)
    waiting: list[tuple[float, int]] = []
    running: list[tuple[float, int]] = []
    free = servers
    score, started, completed = policy.score, policy.started, policy.completed

    def until(now_s: float) -> None:
        nonlocal free
        while running and running[0][0] <= now_s:
            end_s, job = heappop(running)
            completed(job, end_s)
            if waiting:
                taken = heappop(waiting)[1]
                start_s[taken] = end_s
                started(taken, end_s)
                heappush(running, (end_s + duration_s[taken], taken))
            else:
                free += 1

    for job, now_s in enumerate(arrive_s):
        until(now_s)
        if free:
            free -= 1
            start_s[job] = now_s
            started(job, now_s)
            heappush(running, (now_s + duration_s[job], job))
        else:
            heappush(waiting, (score(job, now_s), job))
    until(math.inf)
    return start_s


def stretched(
    submit_s: Sequence[float], duration_s: Sequence[float], servers: int, load: float
) -> list[float]:
    """Arrival times scaled so that the servers are busy for this share of the span. Everything at once stays
    at once: there is nothing to scale."""
    first_s, span_s = submit_s[0], submit_s[-1] - submit_s[0]
    factor = math.fsum(duration_s) / (servers * load * span_s) if span_s > 0 else 1.0
    return [(at_s - first_s) * factor for at_s in submit_s]


def fifo_wait_s(arrive_s: Sequence[float], duration_s: Sequence[float], servers: int) -> float:
    """Mean wait under FIFO of the jobs that wait at all: those that find an idle server are not ordered."""
    start_s = replay(arrive_s, duration_s, servers, Fifo())
    waits_s = [start - arrive for start, arrive in zip(start_s, arrive_s, strict=True) if start > arrive]
    return math.fsum(waits_s) / len(waits_s) if waits_s else 0.0


# --- overtaking ---


def longest_overtake_s(arrive_s: Sequence[float], start_s: Sequence[float]) -> float:
    """By how much the most patient job was overtaken: the largest difference of arrival between a job and one
    that came later and started earlier. By the bound it is at most T."""
    order = sorted(range(len(arrive_s)), key=lambda job: (start_s[job], job))
    longest_s, waiting, begun = 0.0, 0, bytearray(len(arrive_s))
    for job in order:
        while waiting < len(arrive_s) and begun[waiting]:
            waiting += 1
        # Those that start at the very same moment were taken together: nobody overtook anybody.
        if waiting < job and start_s[waiting] > start_s[job]:
            longest_s = max(longest_s, arrive_s[job] - arrive_s[waiting])
        begun[job] = 1
    return longest_s


def overtakes(arrive_s: Sequence[float], start_s: Sequence[float]) -> int:
    """Pairs of jobs of which the later one started earlier: inversions, counted by merging."""
    seen: list[list[float]] = []
    found = 0
    # Blocks of sorted starts: counting what is greater is a bisection in each.
    for start in start_s:
        for block in seen:
            found += len(block) - bisect_left(block, math.nextafter(start, math.inf))
        if not seen or len(seen[-1]) >= 2048:
            seen.append([])
        block = seen[-1]
        block.insert(bisect_left(block, start), start)
    return found


# --- the engine's mechanism ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanics:
    """What the engine is set to. `bound_s` is T: the list's head counts as its entry minus T."""

    servers: int
    bound_s: float
    window_jobs: int = WINDOW_JOBS
    quantum_s: float = QUANTUM_S
    round_trip_s: float = ROUND_TRIP_S
    score_job_s: float = SCORE_JOB_S
    merge_by_bound: bool = True  # False: the head counts as its entry, to show why it must not

    @property
    def tolerance_s(self) -> float:
        """For how long a job may be out of the lane in somebody's window: one batch and its settle."""
        return 2 * self.round_trip_s + self.score_job_s * self.window_jobs + self.quantum_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the mechanism did."""

    start_s: list[float]
    fetches: int
    scored: int
    returned: int
    longest_overtake_s: float  # of a job that waited in the lane; one in a window is out for the tolerance


class _Lane:
    """The list of unscored jobs and the sorted set of scored ones."""

    def __init__(self, arrive_s: Sequence[float], bound_s: float) -> None:
        self._arrive_s = arrive_s
        self._bound_s = bound_s
        self.queue: list[int] = []
        self._head = 0
        self.sorted: list[tuple[float, int]] = []
        self._oldest: list[int] = []  # those of the sorted part by arrival, with stale entries
        self._inside = bytearray(len(arrive_s))

    def head_key(self) -> float:
        return (
            self._arrive_s[self.queue[self._head]] - self._bound_s
            if self._head < len(self.queue)
            else math.inf
        )

    def lowest_key(self) -> float:
        return min(self.head_key(), self.sorted[0][0] if self.sorted else math.inf)

    def __bool__(self) -> bool:
        return self._head < len(self.queue) or bool(self.sorted)

    def take_unscored(self) -> int:
        job = self.queue[self._head]
        self._head += 1
        return job

    def take_scored(self) -> int:
        job = heappop(self.sorted)[1]
        self._inside[job] = 0
        return job

    def put_scored(self, job: int, score: float) -> None:
        heappush(self.sorted, (score, job))
        heappush(self._oldest, job)
        self._inside[job] = 1

    def oldest_s(self) -> float:
        """Arrival of the job that has waited longest."""
        while self._oldest and not self._inside[self._oldest[0]]:
            heappop(self._oldest)
        # Jobs are numbered by arrival, so the lower number is the older job.
        oldest = self._oldest[0] if self._oldest else len(self._arrive_s)
        if self._head < len(self.queue):
            oldest = min(oldest, self.queue[self._head])
        return self._arrive_s[oldest] if oldest < len(self._arrive_s) else math.inf


class _Engine:
    """Workers that fetch, score, run and give back, as events in time."""

    def __init__(
        self,
        arrive_s: Sequence[float],
        duration_s: Sequence[float],
        mechanics: Mechanics,
        boost: Callable[[int, float], float],
        predicted_s: Callable[[int], float],
    ) -> None:
        self._arrive_s, self._duration_s = arrive_s, duration_s
        self._set = mechanics
        self._boost, self._predicted_s = boost, predicted_s
        self._lane = _Lane(arrive_s, mechanics.bound_s if mechanics.merge_by_bound else 0.0)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._ticket = 0
        self._idle = mechanics.servers
        self._scores: dict[int, float] = {}
        self.start_s = [math.nan] * len(arrive_s)
        self.fetches = self.scored = self.returned = 0
        self.longest_s = 0.0

    def run(self) -> None:
        for job, now_s in enumerate(self._arrive_s):
            self._until(now_s)
            self._lane.queue.append(job)
            self._wake(now_s)
        self._until(math.inf)

    def _at(self, when_s: float, act: Callable[[float], None]) -> None:
        self._ticket += 1
        heappush(self._events, (when_s, self._ticket, act))

    def _until(self, now_s: float) -> None:
        while self._events and self._events[0][0] <= now_s:
            when_s, _, act = heappop(self._events)
            act(when_s)

    def _wake(self, now_s: float) -> None:
        if self._idle and self._lane:
            self._idle -= 1
            self._fetch(now_s)

    def _fetch(self, now_s: float) -> None:
        """One atomic script: pops the lower of both sides until the budget, answers the lowest key left."""
        lane, limit = self._lane, self._set
        if not lane:
            self._idle += 1
            return
        self.fetches += 1
        window: list[int] = []
        ready: list[int] = []
        work_s = 0.0
        while lane and len(window) < limit.window_jobs:
            if lane.sorted and lane.sorted[0][0] <= lane.head_key():
                if window or (ready and work_s >= limit.quantum_s):
                    break
                job = lane.take_scored()
                ready.append(job)
                work_s += self._predicted_s(job)
            elif ready:
                break
            else:
                window.append(lane.take_unscored())
        left = lane.lowest_key()
        # The bound counts leases to run against whoever waits in the lane when the lease is taken. A job that
        # is in somebody's window at that moment is out of the lane for at most the tolerance.
        oldest_s = lane.oldest_s()
        if ready or (len(window) == 1 and left == math.inf):
            self._start(ready or window, oldest_s, now_s)
            return
        self._at(
            now_s + limit.round_trip_s + limit.score_job_s * len(window),
            lambda then_s: self._settle(window, left, oldest_s, then_s),
        )

    def _settle(self, window: list[int], left: float, oldest_s: float, now_s: float) -> None:
        """Score the window, keep what may run now, give the rest back."""
        self.scored += len(window)
        scored = sorted((self._arrive_s[job] - self._boost(job, now_s), job) for job in window)
        kept: list[int] = []
        work_s = 0.0
        for score, job in scored:
            if score <= left and (not kept or work_s < self._set.quantum_s):
                kept.append(job)
                work_s += self._predicted_s(job)
            else:
                self._lane.put_scored(job, score)
                self.returned += 1
        if kept:
            self._start(kept, oldest_s, now_s)
        else:
            self._at(now_s + self._set.round_trip_s, self._fetch)
        self._wake(now_s)

    def _start(self, jobs: Sequence[int], oldest_s: float, now_s: float) -> None:
        for job in jobs:
            self.longest_s = max(self.longest_s, self._arrive_s[job] - oldest_s)
            self.start_s[job] = now_s
            now_s += self._duration_s[job]
        self._at(now_s, self._fetch)


def mechanism(
    arrive_s: Sequence[float],
    duration_s: Sequence[float],
    mechanics: Mechanics,
    *,
    boost: Callable[[int, float], float],
    predicted_s: Callable[[int], float],
) -> Outcome:
    """Replay through the engine's own rules. `boost(job, now)` in seconds, `predicted_s(job)` sizes the
    quantum."""
    engine = _Engine(arrive_s, duration_s, mechanics, boost, predicted_s)
    engine.run()
    return Outcome(
        start_s=engine.start_s,
        fetches=engine.fetches,
        scored=engine.scored,
        returned=engine.returned,
        longest_overtake_s=engine.longest_s,
    )
