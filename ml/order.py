"""Owns the order of jobs: score = time of entry into the lane minus a boost, lowest first, 0 <= boost <= T.

Because the boost lies between 0 and T, no job is ever overtaken by one that entered the lane more than T
later, whatever was predicted. A boost of 0 is FIFO, so that every failure has the same harmless outcome.
"""

from __future__ import annotations

import math
from typing import Final, Literal

Mode = Literal["fifo", "shadow", "bounded", "sjf"]
MODES: Final[tuple[Mode, ...]] = ("fifo", "shadow", "bounded", "sjf")

SJF_BOUND_S: Final = 30 * 86_400.0
DURATION_MIN_S: Final = 0.001
GREATEST_FACTOR: Final = 100.0


def checked(predicted_s: float, greatest_s: float) -> float | None:
    """A prediction that can be used, or None for one that is no duration at all."""
    if not 0.0 <= predicted_s < math.inf:  # false for NaN as well
        return None
    return min(max(predicted_s, DURATION_MIN_S), max(GREATEST_FACTOR * greatest_s, DURATION_MIN_S))


def boost_s(mode: Mode, predicted_s: float | None, *, scale_s: float, bound_s: float) -> float:
    """By how much a job of this predicted duration is preferred, in seconds: T * e^(-p/m), never outside of
    [0, T]. `scale_s` is m, `bound_s` is T; in mode `sjf` T is 30 days. Anything unusable gives 0."""
    if mode == "sjf":
        bound_s = SJF_BOUND_S
    elif mode != "bounded":
        return 0.0
    if predicted_s is None or not (0.0 <= predicted_s < math.inf and 0.0 < scale_s < math.inf):
        return 0.0
    if not 0.0 < bound_s < math.inf:
        return 0.0
    return bound_s * math.exp(-predicted_s / scale_s)


def boost_us(mode: Mode, predicted_s: float | None, *, scale_s: float, bound_s: float) -> int:
    """The same in whole microseconds, as the header of a frame carries it; rounded down, so never above T."""
    return int(boost_s(mode, predicted_s, scale_s=scale_s, bound_s=bound_s) * 1e6)


class Bound:
    """T for the bounded mode: a multiple of the mean wait under FIFO of the jobs that wait, kept up to date.

    A job that enters a lane would wait, under FIFO, for about the backlog's work divided by the servers. That
    holds in every order, so T does not chase its own effect, as it would if it followed the waits that the
    ordering itself has shortened.
    """

    __slots__ = ("_factor", "_jobs", "_mean_s", "_prior_jobs", "greatest_s")

    MEMORY_JOBS: Final = 10_000.0
    PRIOR_JOBS: Final = 1_000.0

    def __init__(self, *, factor: float, wait_s: float = 0.0, prior_jobs: float = PRIOR_JOBS) -> None:
        """`wait_s` is the mean FIFO wait of the recent log and counts for `prior_jobs` jobs; with infinitely
        many T stands still."""
        self._factor = factor
        self._mean_s = wait_s
        self._jobs = self._prior_jobs = prior_jobs
        self.greatest_s = 0.0  # the largest T ever handed out: what the promise is measured against

    def arrived(self, backlog_s: float) -> float:
        """A job that must wait enters behind this much predicted work for each server. Returns T."""
        self._jobs = min(self._jobs + 1.0, max(self.MEMORY_JOBS, self._prior_jobs))
        if 0.0 <= backlog_s < math.inf:
            self._mean_s += (backlog_s - self._mean_s) / self._jobs
        bound_s = self.bound_s
        self.greatest_s = max(self.greatest_s, bound_s)
        return bound_s

    @property
    def bound_s(self) -> float:
        return self._factor * self._mean_s
