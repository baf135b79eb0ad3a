"""The table of marks of a result file of `tqe bench`, and its place in docs/PERFORMANCE.md.

    python -m bench.marks FILE                              print it
    python -m bench.marks FILE --write docs/PERFORMANCE.md  put it between the marks there

Nobody types figures: what stands between the marks comes from the committed file, and a test compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.documents import put, three
from tqe.bench.suite import SCHEMA, judged

BEGIN = "<!-- marks: begin (made by `make marks-table`) -->"
END = "<!-- marks: end -->"

# What is asked for, and where it is found: words, scenario, figure.
MARKS = (
    ("drain in bulk, one worker", "drain", "rate"),
    ("— worker CPU", "drain", "worker_cpu"),
    ("— redis CPU", "drain", "redis_cpu"),
    ("— share of the floor", "drain", "floor_share"),
    ("— AOF, submission to end", "drain", "aof_bytes"),
    ("drain, frames of one, one worker", "singles", "rate"),
    ("— worker CPU", "singles", "worker_cpu"),
    ("— redis CPU", "singles", "redis_cpu"),
    ("`submit_many`", "submit", "rate"),
    ("producing and draining at the same time", "together", "rate"),
    ("concurrent `await submit()`, one process", "async-submit", "rate"),
    ("small results, kept", "results", "rate"),
    ("`async def` no-op, concurrency 100", "coroutines", "rate"),
    ("8 workers on 2 cores against 1", "eight", "ratio"),
    ("submit → start, idle, p50", "latency", "p50"),
    ("submit → start, idle, p99", "latency", "p99"),
    ("submit → start, half of the load, p99", "latency-half", "p99"),
    ("submit → start in the high lane, the low one full of 5 ms jobs, p99", "priority", "p99"),
    ("loop lag beside sync jobs, p99", "lag", "p99"),
    ("board, clock and metrics", "board", "watching"),
    ("memory in Redis over the payload", "submit", "memory_over"),
    ("private memory of each worker", "memory", "worker"),
    ("CPU a job, 10 M queued against 10 k", "growth", "ratio"),
)


def table(result: dict[str, Any]) -> str:
    """The marks, below a line that says when, where, and whether it is a result at all.

    Files of schema 1 said `met` of the median alone; so marks are judged here, by the runs that each file
    holds, and by the rule of `tqe bench`. Raises SystemExit on a file of a schema that is not known.
    """
    if not 1 <= result["schema"] <= SCHEMA:
        raise SystemExit(f"the result file has schema {result['schema']}; this reads 1 to {SCHEMA}")
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"Measured on {result['taken'][:10]} on {machine['cpu']}, {machine['cores']} cores,"
        f" kernel {versions['kernel']}, Redis {versions['redis_server']}, {versions['python']};"
        f" median of {result['runs']} alternating runs (range). Verdict: **{result['verdict']}**.",
    ]
    lines += [f"Noise: {reason}." for reason in result["noise"]]
    lines += ["", "| what | scenario | measured | unit | mark | stretch | |", "|---|---|--:|---|--:|--:|---|"]
    for words, scenario, name in MARKS:
        played = result["scenarios"].get(scenario, {"figures": {}})
        figure = played["figures"].get(name)
        cells = [words, f"`{scenario}`", "not measured", "", "", "", ""]
        if figure is not None:
            cells[2] = f"{_shown(figure['median'])} ({_shown(figure['min'])} to {_shown(figure['max'])})"
            cells[3:6] = [figure["unit"], _shown(figure["mark"]), _shown(figure["stretch"])]
            said = judged(figure, played["foreign"], quick=result["quick"])
            cells[6] = "**missed**" if said == "missed" else said or ""
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "" if value is None else three(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table there")
    options = parser.parse_args()
    text = table(json.loads(options.result.read_text("utf-8")))
    if options.write is None:
        print(text)
    else:
        document = options.write.read_text("utf-8")
        options.write.write_text(put(text, document, BEGIN, END), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
