"""What ordering gains and costs: evaluation, damage, the engine's mechanism and the price of scoring.

    python -m bench.ordering.run [--traces FOLDER] [--out FOLDER] [--servers N] [--loads LIST]

FOLDER holds traces (*.csv.gz) and their schema.json; without it, three made traces are used. Everything but
the times is deterministic. Times are the best of several rounds on one thread: the least disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.ordering import made, tables
from tqe import __version__
from tqe.bench import machine
from tqe.ml import dataset, evaluate, model, order, plots, simulate, trainer
from tqe.ml.dataset import Trace
from tqe.ml.gate import figures
from tqe.ml.score import BATCH_MAX, Booster, Scorer
from tqe.ml.trainer import Judged

MECHANISM_LOADS = (0.8, 0.9, 0.95)
MECHANISM_JOBS = 20_000
DAMAGE_LOAD = 0.9
ROUNDS = 200


def traces(folder: Path | None) -> list[Trace]:
    if folder is None:
        return made.traces()
    return [dataset.read(path, folder / "schema.json") for path in sorted(folder.glob("*.csv.gz"))]


def heading(tool: str) -> dict[str, Any]:
    """With what a result file begins: when and where it was measured."""
    return {
        "schema": 1,
        "tool": tool,
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "load_before": round(os.getloadavg()[0], 2),
        "machine": machine.machine(Path(tempfile.gettempdir())),
    }


def measure(trace: Trace, servers: int, loads: Sequence[float]) -> dict[str, Any]:
    """Everything about one trace."""
    began = time.perf_counter()
    report, judged = evaluate.evaluate(trace, servers=servers, loads=loads)
    took_s = time.perf_counter() - began
    held = trace.part(int(len(trace) * evaluate.TRAIN_SHARE), len(trace))
    return {
        "jobs": len(trace),
        "evaluation": report,
        "gate": judged.verdict.dump(),
        "mechanism": mechanism(held.part(0, MECHANISM_JOBS), servers),
        "damage": damage(held, servers, judged.mean_s),
        "cost": {"evaluation_s": round(took_s, 1)} | cost(trace, judged),
    }


def mechanism(trace: Trace, servers: int) -> dict[str, Any]:
    """The engine's own rules with exact predictions: share of the oracle's gain, and the longest overtake."""
    durations = trace.duration_s
    mean_s = sum(durations) / len(durations)
    found: dict[str, Any] = {}
    for load in MECHANISM_LOADS:
        arrive_s = simulate.stretched(trace.submit_s, durations, servers, load)

        def mean_of(start_s: Sequence[float], arrive_s: Sequence[float] = arrive_s) -> float:
            return figures(arrive_s, durations, start_s)[0]

        fifo = mean_of(simulate.replay(arrive_s, durations, servers, simulate.Fifo()))
        oracle = mean_of(simulate.replay(arrive_s, durations, servers, simulate.Fixed(durations)))
        wait_s = simulate.fifo_wait_s(arrive_s, durations, servers)
        row: dict[str, Any] = {}
        for name, mode, bound_s, merge in (
            ("sjf", "sjf", order.SJF_BOUND_S, True),
            ("bounded", "bounded", 2.0 * wait_s, True),
            ("sjf_naive_merge", "sjf", order.SJF_BOUND_S, False),
        ):
            outcome = simulate.mechanism(
                arrive_s,
                durations,
                simulate.Mechanics(servers=servers, bound_s=bound_s, merge_by_bound=merge),
                boost=lambda job, now_s, mode=mode, bound_s=bound_s: order.boost_s(  # type: ignore[misc]
                    mode, durations[job], scale_s=mean_s, bound_s=bound_s
                ),
                predicted_s=durations.__getitem__,
            )
            row[name] = {
                "share_of_oracle": round((fifo - mean_of(outcome.start_s)) / (fifo - oracle), 4),
                "longest_overtake_of_bound": round(outcome.longest_overtake_s / bound_s, 4),
                "overtakes": simulate.overtakes(arrive_s, outcome.start_s),
                "scored": outcome.scored,
                "returned": outcome.returned,
            }
        found[f"{load:g}"] = row
    return found


def damage(trace: Trace, servers: int, mean_s: float) -> dict[str, Any]:
    """The bounded mode with T of twice the mean FIFO wait and predictions that are wrong."""
    durations = trace.duration_s
    arrive_s = simulate.stretched(trace.submit_s, durations, servers, DAMAGE_LOAD)
    fifo = figures(arrive_s, durations, simulate.replay(arrive_s, durations, servers, simulate.Fifo()))
    bound_s = 2.0 * simulate.fifo_wait_s(arrive_s, durations, servers)
    shuffled = list(durations)
    random.Random(20).shuffle(shuffled)
    inverted = [mean_s * mean_s / duration_s for duration_s in durations]
    found = {}
    for name, predicted in (("exact", durations), ("shuffled", shuffled), ("inverted", inverted)):
        boosts = [order.boost_s("bounded", p, scale_s=0.5 * mean_s, bound_s=bound_s) for p in predicted]
        start_s = simulate.replay(arrive_s, durations, servers, simulate.Boosted(boosts))
        ours = figures(arrive_s, durations, start_s)
        found[name] = {
            label: round(a / b - 1.0, 4)
            for label, a, b in zip(("mean", "p95", "p99", "max"), ours, fifo, strict=True)
        } | {"longest_overtake_of_bound": round(simulate.longest_overtake_s(arrive_s, start_s) / bound_s, 4)}
    return found


def best_us(act: Callable[[], object], jobs: int) -> float:
    """Microseconds a job, of the least disturbed of many rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        act()
        best = min(best, time.perf_counter_ns() - began)
    return round(best / 1000 / jobs, 2)


def cost(trace: Trace, judged: Judged) -> dict[str, Any]:
    """Seconds of training, microseconds of scoring."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer.publish(trace, Path(folder), servers=8, trained_at=model.now())
    found: dict[str, Any] = {"train_gate_publish_s": round(time.perf_counter() - began, 1)}
    fitted = judged.fitted
    found |= {
        "columns": fitted.columns.width,
        "levels": fitted.columns.schema.levels,
        "rounds": fitted.rounds,
    }
    jobs = list(trace.facts[-BATCH_MAX:])
    history = fitted.walk.history
    mean = Scorer(fitted.columns, history)
    found["mean_us"] = best_us(lambda: mean.score(jobs), len(jobs))
    if fitted.model is None:
        return found
    text, width = fitted.model, fitted.columns.width
    found["model_bytes"] = len(text)
    booster = Booster(text, width)
    scorer = Scorer(fitted.columns, history, booster)
    rows = [fitted.columns.row(facts, fitted.columns.keys(facts), history)[1] for facts in jobs]
    flat = fitted.columns.flat(rows)
    found["load_ms"] = round(best_us(lambda: Booster(text, width).close(), 1) / 1000, 2)
    found["predict_us"] = best_us(lambda: booster.predict(flat, len(jobs)), len(jobs))
    for batch in (1, 64, BATCH_MAX):
        part = jobs[:batch]
        found[f"score_us_at_{batch}"] = best_us(lambda part=part: scorer.score(part), batch)  # type: ignore[misc]
    found["fallbacks"] = dict(scorer.fallbacks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--loads", default=",".join(f"{load:g}" for load in evaluate.LOADS))
    options = parser.parse_args()
    loads = tuple(float(load) for load in options.loads.split(","))
    results: dict[str, Any] = heading("bench.ordering") | {"servers": options.servers, "traces": {}}
    for trace in traces(options.traces):
        print(f"{trace.name}: {len(trace):,} jobs", file=sys.stderr)
        results["traces"][trace.name] = measure(trace, options.servers, loads)
    name = "made" if options.traces is None else "traces"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    plots.draw([found["evaluation"] for found in results["traces"].values()], options.out / f"{name}.svg")
    print(tables.evaluations(results["traces"]))


if __name__ == "__main__":
    main()
