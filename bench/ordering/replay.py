"""Replays a compressed trace through real workers, order by order, beside the forecast of the simulator.

    python -m bench.ordering.replay [--traces FOLDER] [--trace NAME] [--out FILE] [--jobs N] [--seconds S]

Jobs sleep for their durations, made shorter by one factor, in the workers of `tqe run` on a Redis of their
own. Without FOLDER a made trace is used. A second part submits short and long jobs to workers that keep a
quantum of predicted time, and to such as keep a fixed number of jobs. Three and a half minutes in all.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.ordering import tables
from bench.ordering.run import heading, traces
from tqe import clock
from tqe.app import App
from tqe.bench.lab import Lab, Stage
from tqe.bench.ledger import Ledger
from tqe.ml import order, simulate
from tqe.ml.dataset import Trace
from tqe.ml.evaluate import TRAIN_SHARE, figures
from tqe.ml.gate import SCALE
from tqe.ml.predict import Learner
from tqe.ml.trainer import judge
from tqe.steward.takeback import TakeBack, TakeBackReport
from tqe.store import model, reading
from tqe.worker import admission, fetcher
from tqe.worker.ordering import Waiting

RESULT = Path(__file__).parents[1] / "results" / "replay.json"
SERVERS = 8
LOAD = 0.9
BOUND_FACTOR = 2.0
TYPES_MAX = 256
LEAD_S = 0.3  # the producer gets ready
FIXED = (8, 64)
PREFETCH_JOBS = 500
PREFETCH_SERVERS = 4
SHORT_S, LONG_S = 0.02, 1.0


# --- what is replayed


@dataclass(frozen=True)
class Work:
    """Jobs of one run: due at, lasting for, of type number, in seconds."""

    due_s: Sequence[float]
    run_s: Sequence[float]
    kinds: Sequence[int]

    def __len__(self) -> int:
        return len(self.due_s)


@dataclass
class Table:
    """A predictor that reads what was predicted before the run: it is the order that is measured here."""

    predicted_s: Sequence[float | None]
    fallbacks: Mapping[str, int] = field(default_factory=dict)

    def load(self, version: str) -> None:
        pass

    def use(self, rung: str) -> None:
        pass

    def score(self, jobs: Sequence[Waiting]) -> Sequence[float | None]:
        return [self.predicted_s[json.loads(job.payload)["n"]] for job in jobs]

    def rungs(self, job: Waiting) -> tuple[float | None, float | None]:
        return None, None

    def completed(self, job: Waiting, run_s: float) -> None:
        pass

    boost_us = staticmethod(order.boost_us)


def compressed(trace: Trace, jobs: int, seconds: float) -> tuple[Work, list[float], float, dict[str, Any]]:
    """The first jobs after those that the predictor learns from, squeezed into so many seconds at the load.

    Returns the work, its predictions, T, and what was done, in words and figures.
    """
    cut = int(len(trace) * TRAIN_SHARE)
    held, before = trace.part(cut, cut + jobs), trace.part(max(0, cut - jobs), cut)
    judged = judge(trace.part(0, cut), servers=SERVERS)
    chosen = judged.verdict.chosen if judged.verdict.chosen != "fifo" else "hierarchical_mean"
    keys = [judged.fitted.columns.keys(facts) for facts in held.facts]
    learner = Learner(held, keys, judged.fitted.walk, chosen, judged.booster)
    factor = LOAD * SERVERS * seconds / math.fsum(held.duration_s)
    arrive_s = simulate.stretched(held.submit_s, held.duration_s, SERVERS, LOAD)
    predicted = _as_submitted(learner, arrive_s, held.duration_s)
    kinds = {kind: at % TYPES_MAX for at, kind in enumerate(dict.fromkeys(f.type for f in held.facts))}
    work = Work(
        [at_s * factor for at_s in arrive_s],
        [took_s * factor for took_s in held.duration_s],
        [kinds[facts.type] for facts in held.facts],
    )
    recent_s = simulate.stretched(before.submit_s, before.duration_s, SERVERS, LOAD)
    bound_s = BOUND_FACTOR * factor * simulate.fifo_wait_s(recent_s, before.duration_s, SERVERS)
    told = {
        "trace": trace.name,
        "jobs": len(work),
        "types": len(kinds),
        "compressed_by": round(1 / factor, 2),
        "mean_run_s": round(math.fsum(work.run_s) / len(work), 5),
        "longest_run_s": round(max(work.run_s), 3),
        "predictor": chosen,
        "predictions": "made beforehand, from what had completed by each submission under FIFO",
        "bound_s": round(bound_s, 3),
        "mean_s": round(factor * judged.mean_s, 5),
    }
    return work, [None if p is None else p * factor for p in predicted], bound_s, told  # type: ignore[misc]


def _as_submitted(
    learner: Learner, arrive_s: Sequence[float], duration_s: Sequence[float]
) -> list[float | None]:
    """What was known of each job when it was submitted, if jobs run in the order of submission."""
    start_s = simulate.replay(arrive_s, duration_s, SERVERS, simulate.Fifo())
    ends = sorted(
        (start + took, job) for job, (start, took) in enumerate(zip(start_s, duration_s, strict=True))
    )
    found: list[float | None] = []
    done = 0
    for job, now_s in enumerate(arrive_s):
        while ends[done][0] <= now_s:
            learner.completed(ends[done][1])
            done += 1
        found.append(learner.predict(job, now_s))
    return found


# --- on the real engine


def make_app(ledger: Ledger, jobs: int) -> App:
    """A task a type. Each run leaves when it began and ended."""
    app = App("replay")

    def run(n: int, s: float) -> None:
        ledger.put(n, clock.monotonic_ns())
        time.sleep(s)
        ledger.put(jobs + n, clock.monotonic_ns())

    for number in range(TYPES_MAX):
        app.task(f"TYPE{number}")(run)
    return app


def produce(work: Work) -> Callable[[App], Mapping[str, Any]]:
    """Submit each job when it is due; those that are due together go together."""

    def submit(app: App) -> Mapping[str, Any]:
        begun_ns = clock.monotonic_ns() + int(LEAD_S * 1e9)
        latest_s = 0.0
        at = 0
        while at < len(work):
            now_s = (clock.monotonic_ns() - begun_ns) / 1e9
            if work.due_s[at] > now_s:
                time.sleep(work.due_s[at] - now_s)
                continue
            end = at + 1
            while end < len(work) and work.due_s[end] <= now_s and end - at < 1_000:
                end += 1
            app.client.submit_many(
                [(f"TYPE{work.kinds[n]}", {"n": n, "s": work.run_s[n]}) for n in range(at, end)]
            )
            latest_s = max(latest_s, now_s - work.due_s[at])
            at = end
        return {"begun_ns": begun_ns, "latest_s": latest_s}

    return submit


@dataclass
class Measured:
    """When each job started and ended, in seconds since the first was due, and what the workers counted."""

    start_s: list[float]
    end_s: list[float]
    submitted_late_s: float
    counters: dict[str, int]


def measure(
    lab: Lab,
    work: Work,
    *,
    servers: int,
    mode: str,
    table: Table | None = None,
    bound_s: float = 0.0,
    mean_s: float = 0.0,
) -> Measured:
    """One run. Jobs are submitted while workers run."""
    with lab.stage() as stage:
        keys = stage.observer.core.keys
        told = {
            model.VERSION: "20260101T000000-000000000001",
            model.SHA256: "00c0ffee" + "0" * 56,
            model.BOUND_US: int(bound_s * 1e6),
            model.MEAN_US: mean_s * 1e6,
            model.mode_field("normal"): mode,
        }
        flat = [part for pair in told.items() for part in pair]
        stage.observer.run(reading.ask(("HSET", keys.model, *flat)))  # type: ignore[arg-type]
        stage.start(servers, predictor=table)
        answer = stage.produce(produce(work))
        stage.wait_for(len(work))
        counters = _counters(stage)
        begun_ns = answer["begun_ns"]
        times = [(at_ns - begun_ns) / 1e9 for at_ns in lab.ledger.values(0, 2 * len(work))]
        if len(times) != 2 * len(work):
            raise SystemExit("some jobs have left no time")
        return Measured(times[: len(work)], times[len(work) :], round(answer["latest_s"], 4), counters)


def _counters(stage: Stage) -> dict[str, int]:
    keys = stage.observer.core.keys
    names = [worker.incarnation for worker in stage.observer.workers()]
    texts = stage.observer.run(reading.ask(("MGET", *(keys.worker(name) for name in names))))[0]
    told = [json.loads(text)["counters"] for text in texts if text]
    names = ["scored", "reordered", "returned", "fetches", "takeovers", "fenced"]
    return {name: sum(one[name] for one in told) for name in names}


def sojourn(work: Work, start_s: Sequence[float], end_s: Sequence[float]) -> dict[str, float]:
    """Completion times, from when a job was due."""
    took_s = [end - start for start, end in zip(start_s, end_s, strict=True)]
    found = figures(work.due_s, took_s, start_s)
    return {name: round(value, 4) for name, value in found.items()}


def compared(runs: dict[str, dict[str, Any]]) -> None:
    """Add changes against FIFO, and the share of what exact predictions win."""
    for part in ("measured", "forecast"):
        fifo, exact = runs["fifo"][part], runs["sjf_exact"][part]
        for run in runs.values():
            ours = run[part]
            for name in ("mean", "p50", "p95", "p99", "max"):
                ours[f"{name}_vs_fifo"] = round(ours[f"{name}_s"] / fifo[f"{name}_s"] - 1, 4)
            gain_s = fifo["mean_s"] - exact["mean_s"]
            ours["share_of_exact_sjf"] = (
                round((fifo["mean_s"] - ours["mean_s"]) / gain_s, 4) if gain_s else 0.0
            )


def replayed(folder: Path, trace: Trace, jobs: int, seconds: float) -> dict[str, Any]:
    """Each order on the real engine and in the simulator."""
    work, predicted, bound_s, told = compressed(trace, jobs, seconds)
    mean_s = told["mean_s"]
    runs: dict[str, dict[str, Any]] = {}
    plays: tuple[tuple[str, str, Sequence[float | None]], ...] = (
        ("fifo", "fifo", predicted),
        ("bounded", "bounded", predicted),
        ("sjf", "sjf", predicted),
        ("sjf_exact", "sjf", list(work.run_s)),
    )
    ledger = Ledger()
    lab = Lab(folder, app=make_app(ledger, len(work)), ledger=ledger, scale=1.0, pulse=lambda part: None)
    for name, mode, table in plays:
        print(f"{trace.name}: {name}", file=sys.stderr)
        scale = SCALE * mean_s if mode == "bounded" else mean_s
        found = measure(
            lab, work, servers=SERVERS, mode=mode, table=Table(table), bound_s=bound_s, mean_s=mean_s
        )
        boosts = [order.boost_s(mode, p, scale_s=scale, bound_s=bound_s) for p in table]  # type: ignore[arg-type]
        start_s = simulate.replay(work.due_s, work.run_s, SERVERS, simulate.Boosted(boosts))
        end_s = [start + took for start, took in zip(start_s, work.run_s, strict=True)]
        overhead_s = [
            end - start - took
            for start, end, took in zip(found.start_s, found.end_s, work.run_s, strict=True)
        ]
        runs[name] = {
            "measured": sojourn(work, found.start_s, found.end_s),
            "forecast": sojourn(work, start_s, end_s),
            "longest_overtake_s": round(simulate.longest_overtake_s(work.due_s, found.start_s), 4),
            "overtakes": simulate.overtakes(work.due_s, found.start_s),
            "slept_too_long_s": round(math.fsum(overhead_s) / len(work), 5),
            "submitted_late_s": found.submitted_late_s,
            "counters": found.counters,
        }
    compared(runs)
    return told | {"servers": SERVERS, "load": LOAD, "runs": runs}


# --- prefetch


@dataclass
class Counted:
    """A task whose jobs are held to be so long that a quantum is a fixed number of them."""

    mean_ns: float
    seen: int = 1 << 30
    is_async: bool = False


def fixed(jobs: int) -> Callable[..., admission.Admission]:
    """An admission that knows no time: a worker holds up to so many jobs."""

    def made(
        tasks: Mapping[bytes, admission.Measured], *, quantum_ns: int, slots: int = 1
    ) -> admission.Admission:
        counted: dict[bytes, admission.Measured] = {key: Counted(quantum_ns / jobs) for key in tasks}
        return admission.Admission(counted, quantum_ns=quantum_ns, slots=slots)

    return made


def mixed(jobs: int) -> Work:
    """95 % short, 5 % long, at 70 % of what the workers can do, in bursts of up to twenty."""
    draw = random.Random(4)
    run_s = [LONG_S if draw.random() < 0.05 else SHORT_S for _ in range(jobs)]
    due_s: list[float] = []
    now_s = 0.0
    while len(due_s) < jobs:
        burst = draw.randint(1, 20)
        due_s += [now_s] * burst
        now_s += draw.expovariate(0.7 * PREFETCH_SERVERS / (burst * math.fsum(run_s) / jobs))
    return Work(due_s[:jobs], run_s, [int(s == LONG_S) for s in run_s])


def shorter(work: Work, start_s: Sequence[float], end_s: Sequence[float]) -> dict[str, float]:
    """Completion times of the short jobs."""
    short = [n for n in range(len(work)) if work.run_s[n] == SHORT_S]
    part = Work([work.due_s[n] for n in short], [work.run_s[n] for n in short], [])
    return sojourn(part, [start_s[n] for n in short], [end_s[n] for n in short])


def prefetch(folder: Path) -> dict[str, Any]:
    """How long short jobs wait beside long ones, by what a worker keeps."""
    work = mixed(PREFETCH_JOBS)
    ledger = Ledger()
    lab = Lab(folder, app=make_app(ledger, len(work)), ledger=ledger, scale=1.0, pulse=lambda part: None)
    found: dict[str, Any] = {}
    idle = patch.object(TakeBack, "run_once", lambda duty: TakeBackReport())
    for name, made, taken_back in (
        ("predicted", admission.Admission, True),
        *((f"fixed_{jobs}", fixed(jobs), False) for jobs in FIXED),
        (f"fixed_{FIXED[-1]}_taken_back", fixed(FIXED[-1]), True),
    ):
        print(f"prefetch: {name}", file=sys.stderr)
        with patch.object(fetcher, "Admission", made), nullcontext() if taken_back else idle:
            run = measure(lab, work, servers=PREFETCH_SERVERS, mode="fifo")  # who is forked now has both
        found[name] = {
            "short": shorter(work, run.start_s, run.end_s),
            "all": sojourn(work, run.start_s, run.end_s),
            "counters": run.counters,
        }
    # What nobody can be better than in the order of entry: workers that hold nothing and fetch in no time.
    start_s = simulate.replay(work.due_s, work.run_s, PREFETCH_SERVERS, simulate.Fifo())
    end_s = [start + took for start, took in zip(start_s, work.run_s, strict=True)]
    found["one_queue_simulated"] = {
        "short": shorter(work, start_s, end_s),
        "all": sojourn(work, start_s, end_s),
    }
    told = {"jobs": len(work), "short_s": SHORT_S, "long_s": LONG_S, "servers": PREFETCH_SERVERS}
    return told | {"runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--trace", help="which one (the first)")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--jobs", type=int, default=1_200)
    parser.add_argument("--seconds", type=float, default=26.0, help="span of the submissions")
    options = parser.parse_args()
    offered = traces(options.traces)
    trace = next((one for one in offered if one.name == options.trace), offered[0])
    results = heading("bench.ordering.replay")
    with tempfile.TemporaryDirectory(prefix="tqe-replay-") as folder:
        results["replay"] = replayed(Path(folder) / "replay", trace, options.jobs, options.seconds)
        results["prefetch"] = prefetch(Path(folder) / "prefetch")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(tables.replayed(results), tables.prefetched(results), sep="\n\n")


if __name__ == "__main__":
    main()
