"""Owns what past jobs say about the next: mean durations by key, from what is alike to what is exactly alike.

A key is a prefix of a job's fields (type; type and categories; everything): level 0 is the coarsest. The
hierarchical mean walks down and shrinks each level towards the one above, so that a key that was seen twice
speaks as softly as it should:  m = (n * mean + K * m_above) / (n + K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

SHRINK_JOBS: Final = 2.0  # K: how many jobs the level above counts for
# The mean of a key is over about its last so many jobs: what ran last year must not outvote this week.
MEMORY_JOBS: Final = 64.0
MEMORY_ALL_JOBS: Final = 4096.0  # the same for the mean over everything
EWMA_WEIGHT: Final = 0.3
KEYS_MAX: Final = 100_000  # of one level; the less recently touched half goes first

# An entry: effective count, mean, count, log of the last duration, EWMA, its log. Logs are taken once at
# completion, since rows are built far more often than jobs complete.
Entry = list[float]
N, MEAN, COUNT, LOG_LAST, EWMA, LOG_EWMA = range(6)


class Level:
    """The keys of one level, bounded: two generations, of which the older is dropped whole."""

    __slots__ = ("_half", "old", "young")

    def __init__(self, keys_max: int = KEYS_MAX) -> None:
        self._half = max(1, keys_max // 2)
        self.young: dict[Any, Entry] = {}
        self.old: dict[Any, Entry] = {}

    def get(self, key: Any) -> Entry | None:
        found = self.young.get(key)
        return found if found is not None or not self.old else self.old.get(key)

    def add(self, key: Any, duration_s: float, log_s: float) -> None:
        entry = self.young.get(key)
        if entry is None:
            entry = self.old.pop(key, None)
            if len(self.young) >= self._half:
                self.old, self.young = self.young, {}
            if entry is None:
                self.young[key] = [1.0, duration_s, 1.0, log_s, duration_s, log_s]
                return
            self.young[key] = entry
        if entry[N] < MEMORY_JOBS:
            entry[N] += 1.0
        entry[MEAN] += (duration_s - entry[MEAN]) / entry[N]
        entry[COUNT] += 1.0
        entry[LOG_LAST] = log_s
        entry[EWMA] += EWMA_WEIGHT * (duration_s - entry[EWMA])
        entry[LOG_EWMA] = math.log(entry[EWMA])

    def __len__(self) -> int:
        return len(self.young) + len(self.old)


class History:
    """Means of completed jobs. Fed only with completions, so nothing here can know the future."""

    __slots__ = ("greatest_s", "jobs", "levels", "mean_s")

    def __init__(self, levels: int, *, keys_max: int = KEYS_MAX) -> None:
        self.levels = [Level(keys_max) for _ in range(levels)]
        self.jobs = 0
        self.mean_s = 0.0
        self.greatest_s = 0.0

    def completed(self, keys: Sequence[Any], duration_s: float) -> None:
        """A job with these keys (one a level) ran for so long."""
        duration_s = max(duration_s, 1e-6)
        self.jobs += 1
        self.mean_s += (duration_s - self.mean_s) / min(self.jobs, MEMORY_ALL_JOBS)
        self.greatest_s = max(self.greatest_s, duration_s)
        log_s = math.log(duration_s)
        for level, key in zip(self.levels, keys, strict=True):
            level.add(key, duration_s, log_s)

    def hierarchical_mean(self, keys: Sequence[Any], chain: int) -> float | None:
        """The mean for these keys along the first `chain` levels; None before anything has completed."""
        if not self.jobs:
            return None
        mean = self.mean_s
        for index in range(chain):
            entry = self.levels[index].get(keys[index])
            if entry is not None:
                mean = (entry[N] * entry[MEAN] + SHRINK_JOBS * mean) / (entry[N] + SHRINK_JOBS)
        return mean

    def dump(self) -> dict[str, Any]:
        """For JSON; `load` is its inverse."""
        return {
            "jobs": self.jobs,
            "mean_s": self.mean_s,
            "greatest_s": self.greatest_s,
            "levels": [
                [[key if isinstance(key, str) else list(key), entry] for key, entry in both.items()]
                for both in ({**level.old, **level.young} for level in self.levels)
            ],
        }

    @classmethod
    def load(cls, dumped: dict[str, Any], *, keys_max: int = KEYS_MAX) -> History:
        """Raises KeyError, TypeError or ValueError on what `dump` did not make."""
        history = cls(len(dumped["levels"]), keys_max=keys_max)
        history.jobs = int(dumped["jobs"])
        history.mean_s = float(dumped["mean_s"])
        history.greatest_s = float(dumped["greatest_s"])
        for level, pairs in zip(history.levels, dumped["levels"], strict=True):
            for key, entry in pairs:
                if len(entry) != 6 or not all(map(math.isfinite, entry)) or entry[MEAN] <= 0 or entry[N] <= 0:
                    raise ValueError("an entry of the history is damaged")
                level.young[key if isinstance(key, str) else tuple(key)] = [float(v) for v in entry]
        return history

    def copy(self) -> History:
        """An independent twin, for a replay that must not touch the original."""
        made = History(len(self.levels))
        made.jobs, made.mean_s, made.greatest_s = self.jobs, self.mean_s, self.greatest_s
        for mine, theirs in zip(self.levels, made.levels, strict=True):
            theirs._half = mine._half
            theirs.young = {key: entry[:] for key, entry in mine.young.items()}
            theirs.old = {key: entry[:] for key, entry in mine.old.items()}
        return made
