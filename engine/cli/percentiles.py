"""Percentiles of values, and of the histograms of a `/metrics` page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Bucket = tuple[float, float]  # upper bound in seconds, how many are not above it


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one histogram, in seconds."""

    count: int
    p50: float
    p95: float
    p99: float


def task_times(page: str) -> dict[str, Percentiles]:
    """Run times by task; ValueError if the page is none."""
    found: dict[str, list[Bucket]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples if family.name == "taskqueue_job_execution_duration_seconds" else ():
            if sample.name.endswith("_bucket"):
                found.setdefault(sample.labels["type"], []).append((float(sample.labels["le"]), sample.value))
    return {name: percentiles(buckets) for name, buckets in found.items()}


def of_values(ordered: Sequence[float]) -> Percentiles:
    """Of the values themselves, in ascending order."""

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0

    return Percentiles(len(ordered), at(0.5), at(0.95), at(0.99))


def percentiles(buckets: Sequence[Bucket]) -> Percentiles:
    """Of cumulative buckets in any order."""
    ordered = sorted(buckets)
    return Percentiles(
        int(ordered[-1][1]) if ordered else 0,
        quantile(ordered, 0.5),
        quantile(ordered, 0.95),
        quantile(ordered, 0.99),
    )


def quantile(buckets: Sequence[Bucket], q: float) -> float:
    """Inside of its bucket by the logarithm, as the buckets grow by factors; 0 of nothing."""
    if not buckets or not buckets[-1][1]:
        return 0.0
    rank, low, below = q * buckets[-1][1], 0.0, 0.0
    for high, upto in buckets:
        if upto >= rank and upto > below:
            if math.isinf(high):
                return low
            low = low or high / 2
            return float(low * (high / low) ** ((rank - below) / (upto - below)))
        low, below = high, upto
    return low
