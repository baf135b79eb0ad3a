"""Owns the decision what may order jobs: a predictor is published only where a replay shows that it wins.

Everything is judged by replays of recent blocks that the model has not been trained on: which predictor gives
the least mean, and how far the bounded mode may go before it spoils the tail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tqe.ml import need
from tqe.ml.order import Bound, boost_s
from tqe.ml.predict import Ordered
from tqe.ml.simulate import Boosted, Fifo, Fixed, fifo_wait_s, replay, stretched

Choice = str  # model, hierarchical_mean, type_mean, fifo

GAIN_MIN: Final = 0.01  # of FIFO's mean: what is won by less is not worth a moving part
BLOCKS: Final = 2
BLOCK_JOBS_MIN: Final = 200
BLOCK_JOBS_MAX: Final = 20_000
TAIL_JOBS_MIN: Final = 1_000  # a percentile of fewer is mostly noise
LOAD: Final = 0.9

# What the bounded mode may cost the tail, as shares of FIFO's figures.
P95_MAX: Final = 0.03
P99_MAX: Final = 0.08
WORST_MAX: Final = 0.25
# The next days are not the last ones: on past blocks only these shares of the allowances may be used.
P95_MARGIN: Final = 0.4  # the smallest allowance is the one nearest to noise
P99_MARGIN: Final = 0.6
WORST_MARGIN: Final = 0.8  # the worst job's delay is bounded by T itself and moves less
# T in mean FIFO waits, from the boldest. Bolder ones than these pass on some blocks by luck and fail on the
# next.
BOUND_FACTORS: Final = (2.25, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.1)
# m in mean durations. Half the mean prefers the jobs that take little from those that they overtake: it wins
# as much as the whole mean at the same p99, and costs the worst job half as much.
SCALE: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundChoice:
    """T as a multiple of the mean FIFO wait; 0 is FIFO."""

    bound_factor: float
    gain: float = 0.0  # share of FIFO's mean, over the blocks
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is published, why, and the figures behind it."""

    chosen: Choice
    reason: str
    means_s: Mapping[str, float]  # policy -> mean sojourn over the blocks; fifo and oracle among them
    blocks: Sequence[Mapping[str, float]]

    def dump(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "reason": self.reason,
            "mean_s": {name: round(value, 6) for name, value in self.means_s.items()},
            "blocks": [{name: round(value, 6) for name, value in block.items()} for block in self.blocks],
        }


def choose(
    submit_s: Sequence[float],
    duration_s: Sequence[float],
    predicted_s: Mapping[str, Sequence[float]],
    *,
    servers: int,
    scale_s: float,
) -> Verdict:
    """Which predictor orders best. `predicted_s` holds one list per candidate; the first is the default,
    which has only to beat FIFO, and each further one must beat the best before it."""
    blocks = [
        _means(submit_s[a:b], duration_s[a:b], {n: p[a:b] for n, p in predicted_s.items()}, servers, scale_s)
        for a, b in blocks_of(len(submit_s))
    ]
    if not blocks:
        return Verdict(
            chosen="fifo",
            reason=f"{len(submit_s)} jobs are too few to judge by: it takes {BLOCK_JOBS_MIN}",
            means_s={},
            blocks=[],
        )
    means_s = {name: math.fsum(block[name] for block in blocks) / len(blocks) for name in blocks[0]}
    chosen, said = "fifo", []
    for name in predicted_s:
        # Each block counts the same, whatever its scale.
        gains = [(block[chosen] - block[name]) / block["fifo"] for block in blocks]
        gain = math.fsum(gains) / len(gains)
        wins = gain >= GAIN_MIN and min(gains) >= -GAIN_MIN
        figures = ", ".join(f"{g:+.1%}" for g in gains)
        said.append(f"{name} {'beats' if wins else 'does not beat'} {chosen} ({figures} of FIFO's mean)")
        if wins:
            chosen = name
    return Verdict(chosen=chosen, reason="; ".join(said), means_s=means_s, blocks=blocks)


def blocks_of(jobs: int, jobs_min: int = BLOCK_JOBS_MIN) -> list[tuple[int, int]]:
    """Equal spans of the most recent jobs."""
    count = min(BLOCKS, jobs // jobs_min)
    if not count:
        return []
    size = min(jobs // count, BLOCK_JOBS_MAX)
    return [(jobs - size * (count - index), jobs - size * (count - index - 1)) for index in range(count)]


def _means(
    submit_s: Sequence[float],
    duration_s: Sequence[float],
    predicted_s: Mapping[str, Sequence[float]],
    servers: int,
    scale_s: float,
) -> dict[str, float]:
    arrive_s = stretched(submit_s, duration_s, servers, LOAD)
    policies: dict[str, Any] = {"fifo": Fifo(), "oracle": Fixed(duration_s)}
    for name, values in predicted_s.items():
        policies[name] = Boosted([boost_s("sjf", p, scale_s=scale_s, bound_s=0.0) for p in values])
    return {
        name: mean_sojourn_s(arrive_s, duration_s, replay(arrive_s, duration_s, servers, policy))
        for name, policy in policies.items()
    }


def mean_sojourn_s(arrive_s: Sequence[float], duration_s: Sequence[float], start_s: Sequence[float]) -> float:
    """Mean time from arrival to end."""
    return (math.fsum(start_s) + math.fsum(duration_s) - math.fsum(arrive_s)) / len(start_s)


# --- how far the bounded mode may go ---


def choose_bound(
    submit_s: Sequence[float],
    duration_s: Sequence[float],
    predicted_s: Sequence[float],
    work_s: Sequence[float],
    *,
    servers: int,
    scale_s: float,
    loads: Sequence[float | None] = (LOAD,),
) -> BoundChoice:
    """The greatest T that kept the tail, with a margin, on every block and load; 0, which is FIFO, if none
    did. `work_s` are observed means, which size the backlog."""
    blocks = blocks_of(len(submit_s), TAIL_JOBS_MIN) or blocks_of(len(submit_s))[-1:]
    if len(blocks) > 1:
        blocks.append((blocks[0][0], blocks[-1][1]))
    spans = [
        _Span((submit_s, duration_s, predicted_s, work_s), span, servers, load)
        for span in blocks
        for load in loads
    ]
    kept: tuple[float, float] | None = None
    for factor in BOUND_FACTORS:
        gain = _gain(spans, factor, scale_s)
        if gain is None or gain <= 0:
            kept = None
        elif kept is None and factor > BOUND_FACTORS[-1]:
            kept = factor, gain
        else:
            # The next smaller T keeps the tail as well: that was no luck.
            factor, gain = kept or (factor, gain)
            reason = f"the tail kept to its allowance, with a margin, on {len(spans)} replays"
            return BoundChoice(bound_factor=factor, gain=gain, reason=reason)
    return BoundChoice(bound_factor=0.0, reason="no bound kept the tail on every block")


def _gain(spans: Sequence[_Span], factor: float, scale_s: float) -> float | None:
    """Mean gain over the spans; None if the tail paid too much on one of them."""
    gains: list[float] = []
    for span in spans:
        gain = span.gain(factor, scale_s)
        if gain is None:
            return None
        gains.append(gain)
    return math.fsum(gains) / len(gains) if gains else None


class _Span:
    """One block at one load: FIFO's figures, and whether a setting keeps to them."""

    def __init__(
        self,
        columns: tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]],
        span: tuple[int, int],
        servers: int,
        load: float | None,
    ) -> None:
        first, last = span
        self._arrive_s, self._duration_s, self._predicted_s, self._work_s = (
            column[first:last] for column in columns
        )
        self._servers = servers
        if load is not None:
            self._arrive_s = stretched(self._arrive_s, self._duration_s, servers, load)
        self._fifo = self._figures(Fifo())
        self._wait_s = fifo_wait_s(self._arrive_s, self._duration_s, servers)

    def _figures(self, policy: Any) -> tuple[float, float, float, float]:
        start_s = replay(self._arrive_s, self._duration_s, self._servers, policy)
        return figures(self._arrive_s, self._duration_s, start_s)

    def gain(self, bound_factor: float, scale_s: float) -> float | None:
        """Share of FIFO's mean that is won; None when the tail pays more than it should."""
        bound = Bound(factor=bound_factor, wait_s=self._wait_s)
        found = self._figures(
            Ordered(
                lambda job, now_s: self._predicted_s[job],
                mode="bounded",
                scale_s=scale_s,
                servers=self._servers,
                bound=bound,
                work=self._work_s.__getitem__,
            )
        )
        mean, p95, p99, worst = (ours / fifo - 1.0 for ours, fifo in zip(found, self._fifo, strict=True))
        kept = (
            p95 <= P95_MARGIN * P95_MAX and p99 <= P99_MARGIN * P99_MAX and worst <= WORST_MARGIN * WORST_MAX
        )
        return -mean if kept else None


def figures(
    arrive_s: Sequence[float], duration_s: Sequence[float], start_s: Sequence[float]
) -> tuple[float, float, float, float]:
    """Mean, p95, p99 and maximum of the sojourn times."""
    numpy = need("numpy")
    sojourn_s = numpy.asarray(start_s) + numpy.asarray(duration_s) - numpy.asarray(arrive_s)
    p95, p99 = numpy.percentile(sojourn_s, (95, 99))
    return float(sojourn_s.mean()), float(p95), float(p99), float(sojourn_s.max())
