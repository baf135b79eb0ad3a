"""Owns the way from a trace to a published version: train, pass the gate, find T and m, write the folder."""

from __future__ import annotations

import hashlib
import math
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
from tqe.ml.simulate import fifo_wait_s, stretched
from tqe.ml.train import Fitted, fit
from tqe.ml.watch import floor_of

BOUND_LOOKBACK: Final = 3  # T and m are judged on all but the first third
# A trainer may share its machine with busy workers: it can wait longer for its canary than they for theirs.
PUBLISH_LIMIT_S: Final = 20.0
BUSY_LOAD: Final = 0.9  # what a busier day than those of the log may bring
WAITED_S: Final = 0.002  # who waits for less has found a worker with nothing else to do
WAITS_MIN: Final = 100
# A log that keeps the servers less busy than this is a part of the traffic, or theirs is another number.
LOAD_MIN: Final = 0.5


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
    wait_s, wait = fifo_wait(trace, servers)
    if bound_s is None:
        choice = judged.bound(chosen)
        bound_s = choice.bound_factor * wait_s
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
        gate=judged.verdict.dump()
        | {
            "bound_factor": choice.bound_factor,
            "bound": choice.reason,
            "wait_s": round(wait_s, 6),
            "wait": wait,
        },
        mean_s=judged.mean_s,
        scale_s=SCALE * judged.mean_s,
        bound_s=bound_s,
        bound_factor=choice.bound_factor,
        floor=floor_of(predicted[held], trace.duration_s[held]),
        reference_rows=rows,
        reference_ratios=ratios,
    )
    path = model.publish(folder, manifest, text, history)
    try:
        reason = canary.passes(path, limit_s=PUBLISH_LIMIT_S) if text is not None else ""
        if reason:
            raise ModelError(f"the new model does not survive being loaded: {reason}")
    except ModelError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path, manifest


def fifo_wait(trace: Trace, servers: int) -> tuple[float, str]:
    """What T is a multiple of: the mean wait under FIFO of the jobs that wait, in seconds; and how it was
    found.

    A replay of captured runs would not do: workers capture 50 a second each, so a log of short jobs holds
    a few of them, and a replay of these finds hardly anybody waiting: T would be near 0, and the bounded
    mode FIFO.
    """
    mean_s = math.fsum(trace.duration_s) / len(trace)
    waited = [
        (wait_s, run_s)
        for wait_s, run_s in zip(trace.wait_s, trace.duration_s, strict=False)
        if wait_s > WAITED_S
    ]
    if len(waited) >= WAITS_MIN:
        # Weighted by work, the mean is the same in every order (Kleinrock's conservation law). The plain one
        # is that of FIFO only as long as FIFO orders: T would shrink by what it wins, from version to
        # version.
        work_s = math.fsum(run_s for _, run_s in waited)
        weighted_s = math.fsum(wait_s * run_s for wait_s, run_s in waited) / work_s
        found_s = max(weighted_s, math.fsum(wait_s for wait_s, _ in waited) / len(waited))
        said = f"as measured in {len(waited)} runs that waited"
    else:
        load = math.fsum(trace.duration_s) / (servers * trace.submit_s[-1]) if trace.submit_s[-1] > 0 else 1.0
        if load >= LOAD_MIN:
            found_s = fifo_wait_s(trace.submit_s, trace.duration_s, servers)
            said = "from a replay of the log"
        else:
            arrive_s = stretched(trace.submit_s, trace.duration_s, servers, BUSY_LOAD)
            found_s = fifo_wait_s(arrive_s, trace.duration_s, servers)
            said = (
                f"from a replay at a load of {BUSY_LOAD:g}, since the log keeps {servers} servers busy"
                f" for only {load:.0%} of the time"
            )
    least_s = mean_s / servers
    if found_s < least_s:
        # Who finds all servers busy waits about so long even if nobody else does: a T below it orders
        # nothing.
        return least_s, f"the mean duration for each server, more than what was found {said}"
    return found_s, said
