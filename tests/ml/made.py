"""Owns small traces that are made, not measured: the same seed gives the same jobs."""

import csv
import gzip
import json
import random
from pathlib import Path

from tqe.ml.dataset import Facts, Record, Trace, collect

SCHEMA = {
    "key": "type",
    "target": "duration_s",
    "categorical": ["type", "user"],
    "numeric": ["size"],
    "t0_utc": "2024-03-04T00:00:00+00:00",
}


def records(jobs: int = 2000, *, seed: int = 7, noise: float = 0.2, gap_s: float = 1.0) -> list[Record]:
    """Jobs whose duration is a rate of type and user times a size that never repeats: means help, a model
    helps more."""
    draw = random.Random(seed)
    rates = {(t, u): draw.lognormvariate(0, 1.0) for t in "ABCD" for u in ("ann", "bob", "cy")}
    found, now_s = [], 0.0
    for _ in range(jobs):
        # In bursts, as real jobs come: without backlogs there is nothing to order.
        now_s += draw.expovariate(1.0 / gap_s) * (20.0 if draw.random() < 0.045 else 0.1)
        kind, user, size = (
            draw.choice("AAABBCD"),
            draw.choice(("ann", "ann", "bob", "cy")),
            draw.lognormvariate(0, 1),
        )
        duration_s = rates[kind, user] * size * draw.lognormvariate(0, noise)
        facts = Facts(type=kind, at_s=1.7e9 + now_s, fields={"user": user, "size": round(size, 4)})
        found.append(Record(facts, now_s, duration_s))
    return found


def trace(jobs: int = 2000, **how: float) -> Trace:
    return collect("made", records(jobs, **how), numeric=("size",), categorical=("user",))  # type: ignore[arg-type]


def write(folder: Path, jobs: int = 2000) -> tuple[Path, Path]:
    """The same as a file with its schema."""
    path, schema = folder / "made.csv.gz", folder / "schema.json"
    with gzip.open(path, "wt", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("submit_s", "type", "user", "size", "duration_s"))
        for facts, submit_s, duration_s, _ in records(jobs):
            lines.writerow(
                (
                    f"{submit_s:.6f}",
                    facts.type,
                    facts.fields["user"],
                    facts.fields["size"],
                    f"{duration_s:.6f}",
                )
            )
    schema.write_text(json.dumps({"made": {"file": path.name, **SCHEMA}}))
    return path, schema
