"""The tables of a result file in Markdown, and their place in README.md.

    python -m bench.peers.table FILE                    print them
    python -m bench.peers.table FILE --write README.md  put them between the marks there

Nobody types figures: what stands between the marks comes from the committed file, and a test compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.documents import put, three
from tqe.bench import suite

BEGIN = "<!-- peers: begin (made by `make peers-table`) -->"
END = "<!-- peers: end -->"
OURS = "tqe"
ROUNDS_MIN = 2

Row = dict[str, Any]


def tables(result: dict[str, Any]) -> str:
    """Everything, below a line that says when and where."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"Measured on {result['taken'][:10]} on {machine['cpu']}, {machine['cores']} cores,"
        f" {versions['kernel']}, Redis {versions['redis_server'].removeprefix('Redis ')},"
        f" persistence {result['persistence']},"
        f" median of {result['rounds']} alternating rounds (range), no-op jobs of about 50 bytes.",
    ]
    lines += [line for doubt in _doubts(result) for line in ("", f"**Not a result:** {doubt}.")]
    for procs in sorted({row["procs"] for row in result["rows"]}):
        lines += ["", _throughput(result, procs)]
    lines += ["", _submission(result), "", _notes(result)]
    return "\n".join(lines)


def _doubts(result: dict[str, Any]) -> list[str]:
    """Why this is no result, or that of some queues is none. Older files do not say what others used in a
    run."""
    found = []
    if not result["quiet"]:
        found.append("the machine was busy before the first run")
    if result["scale"] < 1:
        found.append("the runs were shortened")
    if result["rounds"] < ROUNDS_MIN:
        found.append("one round says nothing of the spread")
    shared = {
        row["peer"]: row["foreign"] for row in result["rows"] if row.get("foreign", 0.0) > suite.FOREIGN_MAX
    }
    if shared:
        found.append(
            f"others used up to {max(shared.values()):.0%} of the machine during runs of {', '.join(shared)}"
        )
    return found


def _throughput(result: dict[str, Any], procs: int) -> str:
    rows = [row for row in result["rows"] if row["procs"] == procs and "failed" not in row]
    names = sorted(
        {row["peer"] for row in rows}, key=lambda name: -(_median(rows, name, "drain_rate") or 0.0)
    )
    head = f"**{procs} worker process{'es' if procs > 1 else ''}**"
    table = [
        "| queue | drained, jobs/s | tqe / this | worker CPU, µs/job | Redis CPU, µs/job | through, jobs/s |"
        + (" submit to start, p50 / p99 ms |" if procs == 1 else ""),
        "|---|--:|--:|--:|--:|--:|" + ("--:|" if procs == 1 else ""),
    ]
    for name in names:
        cells = [
            f"{name} {_version(result, name)}",
            _range(rows, name, "drain_rate", _whole),
            _ratio(rows, name),
            _one(rows, name, "drain_worker_us", three),
            _one(rows, name, "drain_redis_us", three),
            _range(rows, name, "through_rate", _whole),
        ]
        if procs == 1:
            p50, p99 = (_one(rows, name, key, three) for key in ("p50_ms", "p99_ms"))
            cells.append(f"{p50} / {p99}")
        table.append("| " + " | ".join(cells) + " |")
    return head + "\n\n" + "\n".join(table)


def _submission(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if "failed" not in row]
    names = sorted(
        {row["peer"] for row in rows}, key=lambda name: -(_median(rows, name, "submit_rate") or 0.0)
    )
    table = [
        "| queue | submitted, jobs/s | by | producer CPU, µs/job | memory in Redis, bytes/job |",
        "|---|--:|---|--:|--:|",
    ]
    for name in names:
        cells = [
            name,
            _range(rows, name, "submit_rate", _whole),
            result["peers"][name]["bulk"],
            _one(rows, name, "submit_producer_us", three),
            _one(rows, name, "bytes_per_job", _whole),
        ]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)


def _notes(result: dict[str, Any]) -> str:
    table = ["| queue | delivery | results | configuration |", "|---|---|---|---|"]
    for name, peer in result["peers"].items():
        table.append(f"| {name} | {peer['guarantee']} | {peer['results']} | {peer['config']} |")
    failed = sorted({row["peer"] for row in result["rows"] if "failed" in row})
    return "\n".join(table) + (f"\n\nRuns of {', '.join(failed)} failed." if failed else "")


def _version(result: dict[str, Any], name: str) -> str:
    """Of the queue itself, which is the first of its packages."""
    return next(iter(result["peers"][name]["versions"].values()), "")


def _values(rows: list[Row], name: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["peer"] == name and row.get(key) is not None]


def _median(rows: list[Row], name: str, key: str) -> float | None:
    values = _values(rows, name, key)
    return median(values) if values else None


def _one(rows: list[Row], name: str, key: str, shown: Callable[[float], str]) -> str:
    value = _median(rows, name, key)
    return "" if value is None else shown(value)


def _range(rows: list[Row], name: str, key: str, shown: Callable[[float], str]) -> str:
    values = _values(rows, name, key)
    if not values:
        return ""
    text = shown(median(values))
    return text if len(values) == 1 else f"{text} ({shown(min(values))} to {shown(max(values))})"


def _ratio(rows: list[Row], name: str) -> str:
    """Ours over theirs within each round, since both then met the same machine."""
    ours = {row["round"]: row["drain_rate"] for row in rows if row["peer"] == OURS}
    found = [
        ours[row["round"]] / row["drain_rate"] for row in rows if row["peer"] == name and row["round"] in ours
    ]
    if name == OURS or not found:
        return ""
    text = three(median(found))
    return text if len(found) == 1 else f"{text} ({three(min(found))} to {three(max(found))})"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the tables there")
    options = parser.parse_args()
    text = tables(json.loads(options.result.read_text("utf-8")))
    if options.write is None:
        print(text)
    else:
        options.write.write_text(put(text, options.write.read_text("utf-8"), BEGIN, END), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
