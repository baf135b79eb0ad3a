"""Owns the evaluation of a trace: trains on the first 60 %, replays the last 40 % under every policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from tqe.ml import ModelError, need
from tqe.ml.dataset import Trace
from tqe.ml.gate import SCALE
from tqe.ml.order import Bound
from tqe.ml.predict import Learner, Ordered
from tqe.ml.simulate import Fifo, Fixed, Policy, fifo_wait_s, replay, stretched
from tqe.ml.trainer import BUSY_LOAD, Judged, fifo_wait, judge

TRAIN_SHARE: Final = 0.6
LOADS: Final = (0.7, 0.8, 0.9, 0.95)
POLICIES: Final = (
    "fifo",
    "sjf_oracle",
    "sjf_model",
    "sjf_hierarchical_mean",
    "sjf_type_mean",
    "bounded",
    "bounded_chosen",
    "bounded_fixed",
)


def evaluate(
    trace: Trace,
    *,
    servers: int = 8,
    loads: Sequence[float] = LOADS,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], Judged]:
    """The report, in the form that `tqe ml evaluate --json` prints, and what it rests on. Raises
    ModelError."""
    cut = int(len(trace) * TRAIN_SHARE)
    if cut < 1 or len(trace) - cut < 2:
        raise ModelError(f"{trace.name} has only {len(trace)} jobs: too few to train and replay")
    progress("training and gate")
    judged = judge(trace.part(0, cut), servers=servers)
    replays = _Replays(trace, cut, judged, servers)
    report: dict[str, Any] = {
        "trace": trace.name,
        "servers": servers,
        "chosen": judged.verdict.chosen,
        "loads": {},
    }
    for load in loads:
        progress(f"load {load:g}")
        report["loads"][f"{load:g}"] = replays.at(load)
    return report, judged


class _Replays:
    """The held-out part of a trace under each policy."""

    def __init__(self, trace: Trace, cut: int, judged: Judged, servers: int) -> None:
        self._judged = judged
        self._servers = servers
        self._before = trace.part(0, cut)
        self._test = trace.part(cut, len(trace))
        columns = judged.fitted.columns
        self._keys = [columns.keys(facts) for facts in self._test.facts]

    def at(self, load: float) -> dict[str, dict[str, float]]:
        test, servers = self._test, self._servers
        arrive_s = stretched(test.submit_s, test.duration_s, servers, load)
        wait_s = self._recent_wait_s(load)
        found: dict[str, dict[str, float]] = {}
        for name in POLICIES:
            same = self._same_as(name)
            if same in found:
                found[name] = dict(found[same])
                continue
            policy = self._policy(name, wait_s, load)
            start_s = replay(arrive_s, test.duration_s, servers, policy)
            found[name] = figures(arrive_s, test.duration_s, start_s)
        return {name: _compared(found[name], found["fifo"], found["sjf_oracle"]) for name in POLICIES}

    def as_it_came(self, modes: Sequence[str], bound_s: float | None) -> dict[str, Any]:
        """Each mode with the chosen predictor and the real arrivals."""
        test, servers, judged = self._test, self._servers, self._judged
        chosen = judged.verdict.chosen
        origin_s = test.submit_s[0]
        arrive_s = [at_s - origin_s for at_s in test.submit_s]
        work_s = math.fsum(test.duration_s)
        found: dict[str, dict[str, float]] = {}
        for mode in modes:
            policy: Policy = Fifo()
            if mode == "sjf" and chosen != "fifo":
                policy = self._ordered(chosen, None, judged.mean_s)
            elif mode == "bounded" and chosen != "fifo":
                fixed_s = self._published_s(chosen, None) if bound_s is None else bound_s
                policy = self._ordered(chosen, _fixed(fixed_s), SCALE * judged.mean_s)
            start_s = replay(arrive_s, test.duration_s, servers, policy)
            wait_s = (math.fsum(start_s) - math.fsum(arrive_s)) / len(test)
            found[mode] = figures(arrive_s, test.duration_s, start_s) | {"mean_wait_s": wait_s}
            found[mode] = {name: round(value, 6) for name, value in found[mode].items()}
        span_s = arrive_s[-1]
        return {
            "servers": servers,
            "load": round(work_s / (servers * span_s), 6) if span_s > 0 else 1.0,
            "predictor": chosen,
            "modes": found,
        }

    def _recent_wait_s(self, load: float | None) -> float:
        """Mean FIFO wait of the recent log at this load (None: as it came): where T starts from."""
        before = self._before
        arrive_s = before.submit_s
        if load is not None:
            arrive_s = stretched(before.submit_s, before.duration_s, self._servers, load)
        return fifo_wait_s(arrive_s, before.duration_s, self._servers)

    def _published_s(self, kind: str, load: float | None) -> float:
        """T that `tqe ml train` would publish from the log before, had its jobs come at this load."""
        wait_s = fifo_wait(self._before, self._servers)[0] if load is None else self._recent_wait_s(load)
        return self._judged.bound(kind, (load, BUSY_LOAD)).bound_factor * wait_s

    def _same_as(self, name: str) -> str:
        """The policy of which this one would be a repetition."""
        chosen = self._judged.verdict.chosen
        if name == "bounded_chosen" and chosen == self._model:
            return "bounded"
        if name in ("bounded_chosen", "bounded_fixed") and chosen == "fifo":
            return "fifo"
        return ""

    @property
    def _model(self) -> str:
        """Where no model could be trained, the rung below stands in for it, as it does in the engine."""
        return "model" if self._judged.booster is not None else "hierarchical_mean"

    def _policy(self, name: str, wait_s: float, load: float) -> Policy:
        if name == "fifo":
            return Fifo()
        if name == "sjf_oracle":
            return Fixed(self._test.duration_s)
        if name.startswith("sjf_"):
            kind = name.removeprefix("sjf_")
            return self._ordered(self._model if kind == "model" else kind, None, self._judged.mean_s)
        kind = self._model if name == "bounded" else self._judged.verdict.chosen
        if name == "bounded_fixed":
            bound = _fixed(self._published_s(kind, load))
        else:
            choice = self._judged.bound(kind, (load, _busier(load)))
            bound = Bound(factor=choice.bound_factor, wait_s=wait_s)
        return self._ordered(kind, bound, SCALE * self._judged.mean_s)

    def _ordered(self, kind: str, bound: Bound | None, scale_s: float) -> Policy:
        learner = Learner(self._test, self._keys, self._judged.fitted.walk, kind, self._judged.booster)
        return Ordered(
            learner.predict,
            mode="sjf" if bound is None else "bounded",
            scale_s=scale_s,
            servers=self._servers,
            bound=bound,
            work=learner.work,
            on_completed=learner.completed,
        )


def _fixed(bound_s: float) -> Bound:
    """A T that stands still, as in the engine: a prior that nothing outweighs."""
    return Bound(factor=1.0, wait_s=bound_s, prior_jobs=math.inf)


def _busier(load: float) -> float:
    """The load of a somewhat busier day: what keeps the tail only at exactly this load keeps it by luck."""
    return load + (1.0 - load) / 3 if load < 1.0 else load


def figures(
    arrive_s: Sequence[float], duration_s: Sequence[float], start_s: Sequence[float]
) -> dict[str, float]:
    """Sojourn times: arrival to end. Slowdown: how many times longer than the job itself."""
    numpy = need("numpy")
    durations = numpy.asarray(duration_s)
    sojourn_s = numpy.asarray(start_s) + durations - numpy.asarray(arrive_s)
    p50, p95, p99 = numpy.percentile(sojourn_s, (50, 95, 99))
    return {
        "mean_s": float(sojourn_s.mean()),
        "p50_s": float(p50),
        "p95_s": float(p95),
        "p99_s": float(p99),
        "max_s": float(sojourn_s.max()),
        "mean_slowdown": float((sojourn_s / durations).mean()),
    }


def _compared(ours: dict[str, float], fifo: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    found = dict(ours)
    for name in ("mean", "p95", "p99", "max"):
        found[f"{name}_vs_fifo"] = ours[f"{name}_s"] / fifo[f"{name}_s"] - 1.0
    gain_s = fifo["mean_s"] - oracle["mean_s"]
    won_s = fifo["mean_s"] - ours["mean_s"]
    found["share_of_oracle"] = won_s / gain_s if gain_s > 0 else 0.0
    return {name: round(value, 6) for name, value in found.items()}


# --- what if ---


def what_if(
    trace: Trace, *, servers: Sequence[int], modes: Sequence[str], bound_s: float | None = None
) -> dict[str, Any]:
    """The last 40 % of a trace at the times at which its jobs came, for each number of servers and mode.
    Without `bound_s` T is the one that `tqe ml train` would have published before. Raises ModelError."""
    cut = int(len(trace) * TRAIN_SHARE)
    if cut < 1 or len(trace) - cut < 2:
        raise ModelError(f"{trace.name} has only {len(trace)} jobs: too few to learn and replay")
    answers = []
    for count in servers:
        replays = _Replays(trace, cut, judge(trace.part(0, cut), servers=count), count)
        answers.append(replays.as_it_came(modes, bound_s))
    return {"trace": trace.name, "servers": answers}
