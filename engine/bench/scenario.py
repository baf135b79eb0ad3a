"""What a scenario is: a name, the figures that it gives with their marks, and how one run of it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tqe.bench.lab import Lab

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure. `more` says which direction is better; marks are None where nothing was promised."""

    name: str
    unit: str
    label: str
    more: bool = False
    mark: float | None = None
    stretch: float | None = None
    steady: bool = True  # whether its spread counts for the verdict on noise, if it has a mark


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One scenario. `play` carries out one run; the first figure is what people quote."""

    name: str
    what: str
    figures: tuple[Figure, ...]
    play: Callable[[Lab], Figures]
    core: bool = True  # whether a bare `tqe bench` includes it


def rate(label: str, mark: float | None = None, stretch: float | None = None, name: str = "rate") -> Figure:
    return Figure(name=name, unit="jobs/s", label=label, more=True, mark=mark, stretch=stretch)


def cpu(who: str, mark: float | None = None, stretch: float | None = None) -> Figure:
    return Figure(name=f"{who}_cpu", unit="µs/job", label=f"CPU of {who}", mark=mark, stretch=stretch)


def time_ms(name: str, label: str, mark: float | None = None, stretch: float | None = None) -> Figure:
    # Tails swing from run to run on every machine, so the median of runs is told and nothing concluded.
    return Figure(name=name, unit="ms", label=label, mark=mark, stretch=stretch, steady=False)
