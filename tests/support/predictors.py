"""Predictors for tests: one that knows what a job's payload says, and broken ones."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.worker import Rig
from tqe.board import layout
from tqe.ml import order
from tqe.store.model import Mode, mode_field
from tqe.worker.ordering import Waiting


@dataclass
class Told:
    """Predicts what stands in the payload as `ms`, by way of `change`, which may raise or answer nonsense."""

    change: Callable[[float], Any] = float
    fails_to_load: bool = False
    fallbacks: Counter[str] = field(default_factory=Counter)
    loaded: list[str] = field(default_factory=list)
    asked: list[Waiting] = field(default_factory=list)

    def load(self, version: str) -> None:
        if self.fails_to_load:
            raise OSError("no such version")
        self.loaded.append(version)

    def use(self, rung: str) -> None: ...

    def rungs(self, job: Waiting) -> tuple[float | None, float | None]:
        return None, None

    def completed(self, job: Waiting, run_s: float) -> None: ...

    def score(self, jobs: Sequence[Waiting]) -> Sequence[float | None]:
        self.asked += jobs
        return [self.change(json.loads(job.payload)["ms"] / 1000) for job in jobs]

    def boost_us(self, mode: Mode, predicted_s: float | None, *, scale_s: float, bound_s: float) -> int:
        return order.boost_us(mode, predicted_s, scale_s=scale_s, bound_s=bound_s)


class Slow(Told):
    """Takes its time."""

    def score(self, jobs: Sequence[Waiting]) -> Sequence[float | None]:
        time.sleep(0.06)
        return super().score(jobs)


def set_order(
    rig: Rig,
    modes: Mapping[str, Mode],
    *,
    bound_s: float = 0.0,
    mean_s: float = 0.02,
    version: str = "20260101T000000-000000000001",
    sha256: str = "00c0ffee" + "0" * 56,
    rung: str = "",
) -> None:
    """What a steward does: write how the lanes are ordered, then tell the workers."""
    told: dict[Any, Any] = {mode_field(lane): mode for lane, mode in modes.items()}
    told |= {
        "bound_us": int(bound_s * 1e6),
        "mean_us": int(mean_s * 1e6),
        "version": version,
        "sha256": sha256,
        "rung": rung,
    }
    rig.redis.hset(rig.keys.model, mapping=told)
    rig.board.set(layout.H_MODEL, rig.board.get(layout.H_MODEL) + 1)
