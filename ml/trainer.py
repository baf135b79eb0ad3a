"""Owns the way from a trace to a published version: train, pass the gate, find T and m, write the folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from tqe.ml import ModelError, canary, model
from tqe.ml.dataset import Trace
from tqe.ml.gate import SCALE, BoundChoice, Verdict, choose, choose_bound
from tqe.ml.score import Booster
from tqe.ml.simulate import fifo_wait_s
from tqe.ml.train import Fitted, fit
from tqe.ml.watch import floor_of

BOUND_LOOKBACK: Final = 3  # T and m are judged on all but the first third
# A trainer may share its machine with busy workers: it can wait longer for its canary than they for theirs.
PUBLISH_LIMIT_S: Final = 20.0
BUSY_LOAD: Final = 0.9  # what a busier day than those of the log may bring


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What training and the gate made of the part of a trace that they may see."""

    trace: Trace
    fitted: Fitted
    booster: Booster | None
    predicted: Mapping[str, Sequence[float]]
    verdict: Verdict
    servers: int
    mean_s: float

    def bound(self, kind: str, loads: Sequence[float | None] = (None, BUSY_LOAD)) -> BoundChoice:
        """How far the bounded mode may go with this predictor at these loads; None: as the jobs came."""
        if kind not in self.predicted:
            return BoundChoice(bound_factor=0.0, reason="nothing is predicted")
        # The tail is a matter of bursts, of which the gate's own part holds too few.
        first = len(self.trace) // BOUND_LOOKBACK
        return choose_bound(
            self.trace.submit_s[first:],
            self.trace.duration_s[first:],
            self.predicted[kind][first:],
            self.fitted.walk.means[first:],
            servers=self.servers,
            scale_s=SCALE * self.mean_s,
            loads=loads,
        )


def judge(trace: Trace, *, servers: int) -> Judged:
    """Train on a trace and let the gate choose among the predictors."""
    fitted = fit(trace)
    booster = None if fitted.model is None else Booster(fitted.model, fitted.columns.width)
    predicted = predictions(fitted, booster)
    split, walk = fitted.split, fitted.walk
    mean_s = walk.history.mean_s or 1.0
    verdict = choose(
        trace.submit_s[split.gate :],
        trace.duration_s[split.gate :],
        {kind: values[split.gate :] for kind, values in predicted.items()},
        servers=servers,
        scale_s=mean_s,
    )
    return Judged(
        trace=trace,
        fitted=fitted,
        booster=booster,
        predicted=predicted,
        verdict=verdict,
        servers=servers,
        mean_s=mean_s,
    )


def predictions(fitted: Fitted, booster: Booster | None) -> dict[str, list[float]]:
    """What each kind of predictor said of each job at its submission, in the gate's order."""
    walk = fitted.walk
    found = {"hierarchical_mean": walk.means, "type_mean": walk.type_means}
    if booster is not None:
        ratios: list[float] = []
        for start in range(0, len(walk.rows), 4096):
            rows = walk.rows[start : start + 4096]
            ratios += booster.predict(walk.columns.flat(rows), len(rows))
        found["model"] = [mean * ratio for mean, ratio in zip(walk.means, ratios, strict=True)]
    return found


def publish(
    trace: Trace, folder: Path, *, servers: int, trained_at: datetime, bound_s: float | None = None
) -> tuple[Path, model.Manifest]:
    """Train on a trace and write what the gate chose as a new version below `folder`. The same
    trace gives the same model and history, byte for byte. `bound_s` is a T that somebody wants instead of the
    one that replays would find. Raises ModelError."""
    judged = judge(trace, servers=servers)
    fitted, chosen = judged.fitted, judged.verdict.chosen
    text = fitted.model if chosen == "model" else None
    history = model.encode_history(fitted.walk.whole_history())
    rows: list[list[float]] = []
    ratios: list[float] = []
    if text is not None and judged.booster is not None:
        rows, ratios = model.reference(fitted.walk.rows[fitted.split.gate :], judged.booster, fitted.columns)
    choice = BoundChoice(bound_factor=0.0, reason="T was given in seconds")
    if bound_s is None:
        choice = judged.bound(chosen)
        bound_s = choice.bound_factor * fifo_wait_s(trace.submit_s, trace.duration_s, servers)
    held = slice(fitted.split.gate, None)
    predicted = judged.predicted.get(chosen, fitted.walk.means)
    manifest = model.Manifest(
        version=model.version_of(trained_at, text or history),
        trained_at=trained_at.isoformat(),
        chosen=chosen,
        schema=fitted.columns.schema,
        columns=fitted.columns.schema.columns,
        sha256=hashlib.sha256(text).hexdigest() if text is not None else "",
        history_sha256=hashlib.sha256(history).hexdigest(),
        window={
            "trace": trace.name,
            "jobs": len(trace),
            "span_s": trace.submit_s[-1],
            "rounds": fitted.rounds,
        },
        gate=judged.verdict.dump() | {"bound_factor": choice.bound_factor, "bound": choice.reason},
        mean_s=judged.mean_s,
        scale_s=SCALE * judged.mean_s,
        bound_s=bound_s,
        bound_factor=choice.bound_factor,
        floor=floor_of(predicted[held], trace.duration_s[held]),
        reference_rows=rows,
        reference_ratios=ratios,
    )
    path = model.publish(folder, manifest, text, history)
    reason = canary.passes(path, limit_s=PUBLISH_LIMIT_S) if text is not None else ""
    if reason:
        shutil.rmtree(path, ignore_errors=True)
        raise ModelError(f"the new model does not survive being loaded: {reason}")
    return path, manifest
