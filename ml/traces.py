"""Owns what captured runs are to training: which of them count, and how they are written to a file.

A run that was ended by its time limit counts with the time that it had: the next one will be ended there too.
One that failed is left out: an exception says little about how long the job takes when it goes well, and jobs
that fail at once would look short and go first.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tqe.ml import ModelError
from tqe.ml.dataset import Facts, Record, Trace, collect
from tqe.ml.features import discover, pick

COUNTED: Final = ("done", "timeout")
FACTS: Final = ("lane", "payload_bytes", "attempt")  # columns that are no fields of the payload
PREFIX: Final = "payload."  # a field of the payload may be named like one of our columns
SAMPLE: Final = 2_000  # runs whose fields decide which columns there are

Run = Mapping[str, Any]


def parse(lines: Iterable[bytes], *, counted: bool = True) -> list[Run]:
    """Captured runs as they stand in the stream; what is none is left out, and by default what does not
    count."""
    found = []
    for line in lines:
        try:
            run = json.loads(line)
            usable = isinstance(run, dict) and isinstance(run["type"], str) and float(run["run_us"]) >= 0
            float(run["entered_us"])
        except (KeyError, TypeError, ValueError):
            continue
        if usable and (not counted or run.get("outcome") in COUNTED):
            found.append(run)
    return found


def columns_of(runs: Sequence[Run]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(numeric, categorical): the fields that can be columns, found in the newest runs."""
    return discover(_fields(run) for run in runs[-SAMPLE:])


def _fields(run: Run) -> Mapping[str, Any]:
    fields = run.get("fields")
    return fields if isinstance(fields, dict) else {}


def trace_of(name: str, runs: Sequence[Run]) -> Trace:
    """Runs as a trace to learn from. Raises ModelError where there are none."""
    numeric, categorical = columns_of(runs)
    return collect(name, _records(runs, numeric, categorical), numeric=numeric, categorical=categorical)


def facts_of(run: Run, numeric: Sequence[str], categorical: Sequence[str]) -> Facts:
    """What was known of a run when it was submitted."""
    return Facts(
        type=run["type"],
        lane=str(run.get("lane", "")),
        payload_bytes=float(run.get("payload_bytes", 0)),
        attempt=int(run.get("attempt", 1)),
        at_s=float(run["entered_us"]) / 1e6,
        fields=pick(_fields(run), numeric, categorical),
    )


def _records(runs: Iterable[Run], numeric: Sequence[str], categorical: Sequence[str]) -> Iterator[Record]:
    for run in runs:
        facts = facts_of(run, numeric, categorical)
        yield Record(facts, facts.at_s, float(run["run_us"]) / 1e6, _wait_s(run))


def write(path: Path, schema_path: Path, runs: Sequence[Run]) -> None:
    """A trace file and its schema, which `dataset.read` reads. Raises ModelError."""
    if not runs:
        raise ModelError("no run was captured yet: let workers run for a while")
    numeric, categorical = columns_of(runs)
    ordered = sorted(runs, key=lambda run: float(run["entered_us"]))
    origin_s = float(ordered[0]["entered_us"]) / 1e6
    schema = {
        "file": path.name,
        "key": "type",
        "target": "duration_s",
        "facts": list(FACTS),
        "prefix": PREFIX,
        "categorical": ["type", *(PREFIX + name for name in categorical)],
        "numeric": [PREFIX + name for name in numeric],
        "t0_utc": datetime.fromtimestamp(origin_s, UTC).isoformat(),
    }
    columns = [*schema["categorical"], *FACTS, *schema["numeric"]]
    names = ["submit_s", *columns, "wait_s", "outcome", "duration_s"]
    try:
        with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(names)
            for run in ordered:
                lines.writerow(_line(run, origin_s, numeric, categorical))
        name = path.name.removesuffix(".gz").removesuffix(".csv")
        schema_path.write_text(json.dumps({name: schema}, indent=1) + "\n", "utf-8")
    except OSError as e:
        raise ModelError(f"the trace cannot be written: {e}") from e


def _line(run: Run, origin_s: float, numeric: Sequence[str], categorical: Sequence[str]) -> list[Any]:
    facts = facts_of(run, numeric, categorical)
    return [
        f"{facts.at_s - origin_s:.6f}",
        facts.type,
        *(_cell(facts.fields[name]) for name in categorical),
        facts.lane,
        int(facts.payload_bytes),
        facts.attempt,
        *(_cell(facts.fields[name]) for name in numeric),
        f"{_wait_s(run):.6f}",
        run.get("outcome", "done"),
        f"{float(run['run_us']) / 1e6:.6f}",
    ]


def _wait_s(run: Run) -> float:
    """Seconds from entry to start; 0 where the start is not told."""
    return max(0.0, (float(run.get("start_us", run["entered_us"])) - float(run["entered_us"])) / 1e6)


def _cell(value: Any) -> Any:
    return "" if value is None else value
