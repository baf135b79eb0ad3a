"""Owns traces that are made, for whoever has no trace at hand: the same seed gives the same jobs."""

from __future__ import annotations

import random

from tqe.ml.dataset import Facts, Record, Trace, collect

JOBS = 10_000


def trace(name: str, *, seed: int, spread: float, bursts: bool) -> Trace:
    """Twelve types whose rates differ by e^spread, a size that never repeats, arrivals one by one or in
    bursts of heavy-tailed size."""
    draw = random.Random(seed)
    rates = {f"type{i}": draw.lognormvariate(0.0, spread) for i in range(12)}
    records: list[Record] = []
    now_s = 0.0
    while len(records) < JOBS:
        now_s += draw.expovariate(1.0)
        size = min(2_000, int(10 * draw.paretovariate(1.2))) if bursts and draw.random() < 0.02 else 1
        for _ in range(size):
            kind, weight = draw.choice(list(rates)), draw.lognormvariate(0.0, 1.0)
            facts = Facts(kind, at_s=1.7e9 + now_s, fields={"size": weight, "user": draw.choice("abcdef")})
            records.append(Record(facts, now_s, rates[kind] * weight * draw.lognormvariate(0.0, 0.3)))
    return collect(name, records[:JOBS], numeric=("size",), categorical=("user",))


def traces() -> list[Trace]:
    """Even and wild durations, steady and bursty arrivals."""
    return [
        trace("made_even_steady", seed=5, spread=0.5, bursts=False),
        trace("made_even_bursty", seed=6, spread=0.5, bursts=True),
        trace("made_wild_bursty", seed=25, spread=2.5, bursts=True),
    ]
