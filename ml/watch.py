"""Owns the watch over a published predictor: does its order still pay? Falls to the mean and to FIFO, and
comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tqe.ml.score import Rung

WINDOW_JOBS: Final = 200
BAD_WINDOWS: Final = 2
GOOD_WINDOWS: Final = 2
RUNGS: Final[tuple[Rung, ...]] = ("model", "mean", "fifo")


def ranks(values: Sequence[float]) -> list[float]:
    """Positions from 1 in ascending order; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            found[index] = (start + 1 + stop) / 2
        start = stop
    return found


def rank_correlation(predicted_s: Sequence[float], duration_s: Sequence[float]) -> float:
    """Spearman's; 0 where one side is constant, since a constant orders nothing."""
    a, b = ranks(predicted_s), ranks(duration_s)
    mean = (len(a) + 1) / 2
    product = math.fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    sizes = math.fsum((x - mean) ** 2 for x in a) * math.fsum((y - mean) ** 2 for y in b)
    return product / math.sqrt(sizes) if sizes > 0 else 0.0


def order_share(predicted_s: Sequence[float], duration_s: Sequence[float]) -> float:
    """What the predicted order wins of what the true one would: 1 is the oracle's, 0 a random one's, below 0
    worse than random. The regret is 1 minus it.

    Were these jobs one backlog before one server, the sum of their completion times would be
    sum((n - rank + 1) * duration); a random order gives (n + 1) / 2 * sum(duration). Where all durations are
    alike there is nothing to win, and nothing to lose: 1.
    """
    jobs = len(duration_s)
    whole = (jobs + 1) / 2 * math.fsum(duration_s)

    def cost(by: Sequence[float]) -> float:
        return math.fsum((jobs + 1 - rank) * s for rank, s in zip(ranks(by), duration_s, strict=True))

    possible = whole - cost(duration_s)
    return (whole - cost(predicted_s)) / possible if possible > 1e-9 * whole else 1.0


def floor_of(predicted_s: Sequence[float], duration_s: Sequence[float]) -> float:
    """The share that a healthy predictor hardly ever undercuts, from the gate's jobs: the lowest of their
    windows, halved, since the coming days are not the last ones; and never below 0, worse than random."""
    shares = [
        order_share(predicted_s[at : at + WINDOW_JOBS], duration_s[at : at + WINDOW_JOBS])
        for at in range(0, len(duration_s) - WINDOW_JOBS + 1, WINDOW_JOBS)
    ]
    return max(0.0, min(shares, default=0.0) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One window of completions."""

    rung: Rung  # what orders from now on
    changed: bool
    rank_correlation: float  # of the model, or of the mean where there is no model
    regret: float
    shares: dict[Rung, float]


class Watch:
    """Judges every 200 completions. Both rungs are always judged, in use or not: that is how a predictor
    comes back.

    Two bad windows in a row take a rung out; two good ones bring it back. `floor` is what the gate saw;
    `rung` is what orders now, where another watch has judged before.
    """

    def __init__(self, *, floor: float, has_model: bool = True, rung: Rung = "model") -> None:
        self._floor = floor
        self._rungs: tuple[Rung, ...] = RUNGS if has_model else RUNGS[1:]
        self._good: dict[Rung, bool] = {
            "model": has_model and rung == "model",
            "mean": rung != "fifo",
            "fifo": True,
        }
        self._streak: dict[Rung, int] = {"model": 0, "mean": 0}
        self._model_s: list[float] = []
        self._mean_s: list[float] = []
        self._duration_s: list[float] = []

    @property
    def rung(self) -> Rung:
        return next(rung for rung in self._rungs if self._good[rung])

    def completed(self, *, model_s: float | None, mean_s: float | None, duration_s: float) -> Report | None:
        """A job ended whose duration had been predicted so. Answers at the end of each window. Jobs that no
        rung predicted say nothing and do not count; a prediction that one rung lacks counts as its worst."""
        if model_s is None and mean_s is None:
            return None
        self._model_s.append(_or_nothing(model_s, mean_s))
        self._mean_s.append(_or_nothing(mean_s, model_s))
        self._duration_s.append(duration_s)
        return self._judge() if len(self._duration_s) >= WINDOW_JOBS else None

    def _judge(self) -> Report:
        before = self.rung
        shares: dict[Rung, float] = {
            "model": order_share(self._model_s, self._duration_s),
            "mean": order_share(self._mean_s, self._duration_s),
        }
        for rung in ("model", "mean"):
            self._step(rung, shares[rung] >= self._floor)
        first = self._model_s if "model" in self._rungs else self._mean_s
        report = Report(
            rung=self.rung,
            changed=self.rung != before,
            rank_correlation=rank_correlation(first, self._duration_s),
            regret=1.0 - shares[self._rungs[0]],
            shares=shares,
        )
        self._model_s, self._mean_s, self._duration_s = [], [], []
        return report

    def _step(self, rung: Rung, good: bool) -> None:
        if rung not in self._rungs:
            return
        if good == self._good[rung]:
            self._streak[rung] = 0
            return
        self._streak[rung] += 1
        if self._streak[rung] >= (GOOD_WINDOWS if good else BAD_WINDOWS):
            self._good[rung] = good
            self._streak[rung] = 0


def _or_nothing(own: float | None, other: float | None) -> float:
    if own is not None:
        return own
    return other if other is not None else 0.0
