"""The tables of the committed results about ordering, and their places in docs/ORDERING.md and README.md.

    python -m bench.ordering.tables          put them there
    python -m bench.ordering.tables --print  print them

Nobody types figures: what stands between the marks comes from the committed files, and a test compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.documents import put, three
from tqe.ml import evaluate

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "traces": "bench/ordering/results/traces.json",
    "made": "bench/ordering/results/made.json",
    "stdlib": "bench/ordering/results/stdlib.json",
    "replay": "bench/results/replay.json",
    "engine": "bench/results/ordering_engine.json",
}
README, DOCUMENT = "README.md", "docs/ORDERING.md"
CHANGES = ("mean", "p95", "p99", "max")
BOUNDED = ("bounded_chosen", "bounded_fixed")
# What is asked of the bounded mode, and of the order with the chosen predictor, as shares.
P95_MAX, P99_MAX, WORST_MAX, BOUNDED_SHARE_MIN = 0.03, 0.08, 0.25, 0.6
SJF_SHARE_MIN, BEHIND_BEST_MAX = 0.95, 0.03
# As the system that inspired this one reports itself: change of mean and p95 against FIFO.
ORIGINAL = (-0.0544, -0.0058)
LOAD = "0.9"
WORDS = {
    "ci_linkerd": ("builds of a CI system", "real"),
    "wf_tasks": ("tasks of scientific workflows", "real"),
    "azure_llm_2023": ("requests to language models", "real arrivals and tokens, durations made of these"),
}

Files = Mapping[str, Any]


def read() -> dict[str, Any]:
    """The committed results by name; None where there is none."""
    paths = {name: ROOT / path for name, path in FILES.items()}
    return {name: json.loads(path.read_text()) if path.exists() else None for name, path in paths.items()}


def _reports(files: Files) -> dict[str, Any]:
    """What was measured of each public and each made trace."""
    return {**files["traces"]["traces"], **files["made"]["traces"]}


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:+.{digits}f}"


def _marked(text: str, met: bool) -> str:
    return text if met else f"**{text}**"


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# --- evaluations


def policies(report: Mapping[str, Any]) -> str:
    """Change of mean / p95 / p99 / max against FIFO in per cent · share of the oracle's gain, by load."""
    rows = []
    for policy in evaluate.POLICIES[1:]:
        found = [by_policy.get(policy) for by_policy in report["loads"].values()]
        if None not in found:
            rows.append([policy, *(_change(one) for one in found)])
    return _grid(["policy", *(f"load {load}" for load in report["loads"])], rows)


def _change(found: Mapping[str, float]) -> str:
    changes = " / ".join(_percent(found[f"{what}_vs_fifo"]) for what in CHANGES)
    return f"{changes} · {100 * found['share_of_oracle']:.0f}"


def evaluations(results: Mapping[str, Any]) -> str:
    """The policies of each trace of a result file."""
    parts = []
    for name, found in results.items():
        report = found["evaluation"]
        parts += [f"**{name}** ({found['jobs']:,} jobs), chosen: {report['chosen']}", policies(report)]
    return "\n\n".join(parts)


def _stdlib(files: Files) -> str:
    report = files["stdlib"]
    return f"Chosen: {report['chosen']}.\n\n{policies(report)}"


def _beside(files: Files) -> str:
    theirs = [f"{100 * change:+.2f} %" for change in ORIGINAL]
    rows = [["the original system, as it reports itself", *theirs, "synthetic"]]
    for name, found in files["traces"]["traces"].items():
        ours = found["evaluation"]["loads"][LOAD][_bounded(found)]
        changes = [f"{100 * ours[f'{what}_vs_fifo']:+.2f} %" for what in ("mean", "p95")]
        rows.append([name, *changes, WORDS.get(name, ("", "real"))[1]])
    return _grid(("", "mean", "p95", "jobs"), rows)


def _bounded(found: Mapping[str, Any]) -> str:
    """The row that is what workers do; older files have only the one whose T follows the backlog."""
    return next(name for name in reversed(BOUNDED) if name in found["evaluation"]["loads"][LOAD])


def _readme(files: Files) -> str:
    rows = []
    for name, found in files["traces"]["traces"].items():
        ours = found["evaluation"]["loads"][LOAD][_bounded(found)]
        changes = [f"{_percent(ours[f'{what}_vs_fifo'])} %" for what in ("mean", "p95", "p99")]
        rows.append([WORDS.get(name, (name, ""))[0], *changes, f"{100 * ours['share_of_oracle']:.0f} %"])
    return _grid(("trace", "mean", "p95", "p99", "of what exact predictions and no bound win"), rows)


# --- marks


def _marks(files: Files) -> str:
    headings = ("trace", "policy", "p95", "p99", "the worst job", "share of the oracle's gain")
    rows = [["mark", "", *_marks_of(P95_MAX, P99_MAX, WORST_MAX), f"at least {BOUNDED_SHARE_MIN:.0%}"]]
    for name, found in _reports(files).items():
        loads = list(found["evaluation"]["loads"].values())
        for policy in BOUNDED:
            if policy not in loads[0]:
                continue
            cells = [name, policy]
            for what, most in (("p95", P95_MAX), ("p99", P99_MAX), ("max", WORST_MAX)):
                worst = max(by_policy[policy][f"{what}_vs_fifo"] for by_policy in loads)
                cells.append(_marked(f"{100 * worst:+.1f} %", worst <= most))
            shares = [by_policy[policy]["share_of_oracle"] for by_policy in loads]
            cells.append(_marked(f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %", min(shares) >= 0.6))
            rows.append(cells)
    return _grid(headings, rows)


def _marks_of(*most: float) -> list[str]:
    return [f"at most {100 * one:+.0f} %" for one in most]


def _sjf(files: Files) -> str:
    headings = ("trace", "chosen", "share of the oracle's gain", "behind the best predictor, points")
    rows = [["mark", "", f"at least {SJF_SHARE_MIN:.0%}", f"at most {100 * BEHIND_BEST_MAX:.0f}"]]
    for name, found in _reports(files).items():
        chosen = found["evaluation"]["chosen"]
        shares, behind = [], []
        for by_policy in found["evaluation"]["loads"].values():
            kinds = [by_policy[f"sjf_{kind}"] for kind in ("model", "hierarchical_mean", "type_mean")]
            ours = by_policy["fifo" if chosen == "fifo" else f"sjf_{chosen}"]["share_of_oracle"]
            shares.append(ours)
            behind.append(max(one["share_of_oracle"] for one in kinds) - ours)
        told = f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %"
        worst = _marked(f"{100 * max(behind):.1f}", max(behind) <= BEHIND_BEST_MAX)
        rows.append([name, chosen, _marked(told, min(shares) >= SJF_SHARE_MIN), worst])
    return _grid(headings, rows)


# --- the mechanism, damage, cost


def _damage(files: Files) -> str:
    rows = [
        [
            name,
            *(" / ".join(_percent(found["damage"][kind][what], 1) for what in CHANGES) for kind in kinds),
            f"{max(found['damage'][kind]['longest_overtake_of_bound'] for kind in kinds):.2f} T",
        ]
        for kinds in [("exact", "shuffled", "inverted")]
        for name, found in _reports(files).items()
    ]
    return _grid(("trace", "exact", "shuffled", "inverted", "longest overtake"), rows)


def _mechanism(files: Files) -> str:
    rows = []
    for name, found in _reports(files).items():
        by_load = found["mechanism"].values()
        cells = [name]
        for how in ("sjf", "sjf_naive_merge", "bounded"):
            shares = [100 * row[how]["share_of_oracle"] for row in by_load]
            cells.append(f"{min(shares):.1f} to {max(shares):.1f} %")
        longest = [row["bounded"]["longest_overtake_of_bound"] for row in by_load]
        cells.append(f"{min(longest):.2f} to {max(longest):.2f} T")
        cells.append(f"{sum(row['bounded']['overtakes'] for row in by_load):,}")
        rows.append(cells)
    headings = ("trace", "`sjf`", "`sjf`, naive merge", "`bounded`", "longest overtake", "overtakes")
    return _grid(headings, rows)


def _cost(files: Files) -> str:
    results = files["traces"]["traces"]
    costs = [found["cost"] for found in results.values()]

    def row(words: str, *names: str, unit: str = "") -> list[str]:
        return [words, *(", ".join(f"{cost[n]:,}" for n in names) + unit for cost in costs)]

    return _grid(
        ("", *results),
        [
            ["jobs", *(f"{found['jobs']:,}" for found in results.values())],
            row("columns, levels, rounds", "columns", "levels", "rounds"),
            row("scoring with columns, batch of 256", "score_us_at_256", unit=" µs a job"),
            row("of it the library", "predict_us", unit=" µs a job"),
            row("hierarchical mean alone", "mean_us", unit=" µs a job"),
            row("one job alone", "score_us_at_1", unit=" µs"),
            row("loading a model", "load_ms", unit=" ms"),
            row("training, gate and publishing", "train_gate_publish_s", unit=" s"),
            row("an evaluation", "evaluation_s", unit=" s"),
        ],
    )


# --- the real engine


def replayed(results: Mapping[str, Any]) -> str:
    """Change of mean / p50 / p95 / p99 / max against FIFO in per cent · share of what exact predictions
    win."""
    names = ("mean", "p50", "p95", "p99", "max")
    told, rows = results["replay"], []
    for name, run in told["runs"].items():
        cells = [name.replace("sjf_exact", "sjf, exact predictions")]
        for part in ("measured", "forecast"):
            ours = run[part]
            if name == "fifo":
                cells.append(" / ".join(f"{ours[f'{n}_s']:.3g}" for n in names) + " s")
            else:
                changes = " / ".join(_percent(ours[f"{n}_vs_fifo"]) for n in names)
                cells.append(f"{changes} · {100 * ours['share_of_exact_sjf']:.0f}")
        cells.append(f"{run['longest_overtake_s']:.2f} s")
        rows.append(cells)
    head = (
        f"{told['jobs']:,} jobs of {told['trace']}, {told['compressed_by']:,.0f} times shorter,"
        f" {told['servers']} workers, load {told['load']}, T = {told['bound_s']} s,"
        f" predictor: {told['predictor']}. Taken {results['taken'][:10]}, load average before:"
        f" {results['load_before']}."
    )
    return f"{head}\n\n" + _grid(("order", "measured", "forecast", "longest overtake, measured"), rows)


def prefetched(results: Mapping[str, Any]) -> str:
    """Completion times of short jobs beside long ones, by what a worker keeps."""
    words = {
        "predicted": "a quantum of predicted time, the rest goes back",
        "fixed_8": "8 jobs",
        "fixed_64": "64 jobs",
        "fixed_64_taken_back": "64 jobs, taken back from behind a long one",
        "one_queue_simulated": "simulated: one queue, no time lost",
    }
    rows = [
        [
            words.get(name, name),
            " / ".join(f"{1000 * run['short'][f'{n}_s']:,.0f}" for n in ("mean", "p50", "p95", "p99", "max")),
        ]
        for name, run in results["prefetch"]["runs"].items()
    ]
    return _grid(("a worker keeps", "mean / p50 / p95 / p99 / max, ms"), rows)


def engine(results: Mapping[str, Any] | None) -> str:
    """What having ordering on costs in running workers, each figure beside its mark."""
    if results is None:
        return "No result is committed yet: `make bench-ordering-engine` makes one."
    machine = results["machine"]
    head = (
        f"Taken {results['taken'][:10]} on {machine['cpu']}, {machine['cores']} cores,"
        f" load average before: {results['load_before']}."
    )
    if not results["quiet"]:
        head += " **Not a result:** the machine was busy."
    rows = [
        [
            figure["what"],
            f"{three(figure['value'])} {figure['unit']}",
            "" if figure["mark"] is None else f"at most {three(figure['mark'])}",
            {True: "met", False: "**missed**", None: ""}[figure["met"]],
        ]
        for figure in results["figures"].values()
    ]
    return f"{head}\n\n" + _grid(("what", "measured", "mark", ""), rows)


# --- documents


SECTIONS: Mapping[str, tuple[str, Callable[[Files], str]]] = {
    "ordering-readme": (README, _readme),
    "ordering-public": (DOCUMENT, lambda files: evaluations(files["traces"]["traces"])),
    "ordering-made": (DOCUMENT, lambda files: evaluations(files["made"]["traces"])),
    "ordering-beside": (DOCUMENT, _beside),
    "ordering-marks": (DOCUMENT, _marks),
    "ordering-sjf": (DOCUMENT, _sjf),
    "ordering-damage": (DOCUMENT, _damage),
    "ordering-mechanism": (DOCUMENT, _mechanism),
    "ordering-replay": (DOCUMENT, lambda files: replayed(files["replay"])),
    "ordering-prefetch": (DOCUMENT, lambda files: prefetched(files["replay"])),
    "ordering-stdlib": (DOCUMENT, _stdlib),
    "ordering-cost": (DOCUMENT, _cost),
    "ordering-engine": (DOCUMENT, lambda files: engine(files["engine"])),
}


def written(path: str, text: str, files: Files) -> str:
    """A document with its tables in their places."""
    for name, (document, made) in SECTIONS.items():
        if document == path:
            begin, end = f"<!-- {name}: begin (made by `make ordering-tables`) -->", f"<!-- {name}: end -->"
            text = put(made(files), text, begin, end)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--print", action="store_true", dest="only_print")
    files = read()
    if parser.parse_args().only_print:
        print("\n\n".join(made(files) for _, made in SECTIONS.values()))
        return 0
    for path in (README, DOCUMENT):
        text = (ROOT / path).read_text("utf-8")
        (ROOT / path).write_text(written(path, text, files), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
