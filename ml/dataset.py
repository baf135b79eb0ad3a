"""Owns traces: what is known of past jobs, in the order in which they were submitted.

A trace is a csv.gz with one line a job (seconds since the first, columns known at submission, duration, the
wait where it is known) and a schema.json that names its columns. Anything else that can yield `Record`s
becomes a `Trace` by `collect`.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from tqe.ml import ModelError

Value = float | str | None

ROWS_MAX: Final = 5_000_000
DURATION_MIN_S: Final = 1e-6  # a duration of 0 has no logarithm and no ratio
_SUBMIT: Final = "submit_s"
_WAIT: Final = "wait_s"  # from submission to start; not every trace tells it
_SCHEMA_DEFAULTS: Final[Mapping[str, Any]] = {
    "numeric": [],
    "categorical": [],
    "key": None,
    "t0_utc": None,
    "target": "duration_s",
    "facts": [],  # of lane, payload_bytes, attempt: columns that are no fields of the payload
    "prefix": "",  # of the columns that are fields of the payload: their names are without it
}


class Facts(NamedTuple):
    """What is known of a job when it is submitted."""

    type: str
    lane: str = ""
    payload_bytes: float = math.nan
    attempt: int = 1
    at_s: float = math.nan  # seconds since 1970, UTC; NaN: unknown
    fields: Mapping[str, Value] = {}


class Record(NamedTuple):
    """One completed job."""

    facts: Facts
    submit_s: float  # from any origin
    duration_s: float
    wait_s: float = 0.0  # from submission to start


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Completed jobs by time of submission. The lists are parallel; times count from the first job."""

    name: str
    facts: Sequence[Facts]
    submit_s: Sequence[float]
    duration_s: Sequence[float]
    end_s: Sequence[float]  # when a job's duration was known
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]  # besides the type
    wait_s: Sequence[float] = ()  # as it was; 0 where it is unknown

    def __len__(self) -> int:
        return len(self.facts)

    def part(self, start: int, stop: int) -> Trace:
        """The jobs from `start` to before `stop`; times keep their origin."""
        return Trace(
            name=self.name,
            facts=self.facts[start:stop],
            submit_s=self.submit_s[start:stop],
            duration_s=self.duration_s[start:stop],
            end_s=self.end_s[start:stop],
            numeric=self.numeric,
            categorical=self.categorical,
            wait_s=self.wait_s[start:stop],
        )


def collect(
    name: str, records: Iterable[Record], *, numeric: Sequence[str] = (), categorical: Sequence[str] = ()
) -> Trace:
    """Sort by submission (ties keep their order) and check. Jobs without a usable time or duration are left
    out: a trace is a log, and one bad line must not cost the rest."""
    good = [
        record
        for record in records
        if math.isfinite(record.submit_s) and math.isfinite(record.duration_s) and record.duration_s >= 0
    ]
    good.sort(key=lambda record: record.submit_s)
    if len(good) > ROWS_MAX:
        raise ModelError(f"{name} has more than {ROWS_MAX:,} jobs: export a shorter span")
    if not good:
        raise ModelError(f"{name} has no usable job")
    origin_s = good[0].submit_s
    submit_s = [record.submit_s - origin_s for record in good]
    duration_s = [max(record.duration_s, DURATION_MIN_S) for record in good]
    waits_s = [record.wait_s if 0 < record.wait_s < math.inf else 0.0 for record in good]
    return Trace(
        name=name,
        facts=[record.facts for record in good],
        submit_s=submit_s,
        duration_s=duration_s,
        end_s=[sum(times) for times in zip(submit_s, waits_s, duration_s, strict=True)],
        numeric=tuple(numeric),
        categorical=tuple(categorical),
        wait_s=waits_s,
    )


# --- the csv.gz form ---


def read(path: Path, schema_path: Path) -> Trace:
    """A trace file with its schema. Raises ModelError."""
    schema = _schema(path, schema_path)
    key = schema["key"]
    numeric = tuple(schema["numeric"])
    categorical = tuple(name for name in schema["categorical"] if name != key)
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    prefix = schema["prefix"]
    return collect(
        name,
        _rows(path, schema, numeric, categorical),
        numeric=[column.removeprefix(prefix) for column in numeric],
        categorical=[column.removeprefix(prefix) for column in categorical],
    )


def _schema(path: Path, schema_path: Path) -> Mapping[str, Any]:
    """The entry of this file: by file name, by name, the only one, or the whole document."""
    try:
        document = json.loads(schema_path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"the schema {schema_path} cannot be read: {e}") from e
    found: Any = None
    if isinstance(document, dict):
        entries = {name: entry for name, entry in document.items() if isinstance(entry, dict)}
        stem = path.name.removesuffix(".gz").removesuffix(".csv")
        if "target" in document or "columns" in document:
            found = document
        else:
            found = next((e for e in entries.values() if e.get("file") == path.name), entries.get(stem))
            if found is None and len(entries) == 1:
                found = next(iter(entries.values()))
    if found is None:
        raise ModelError(f"the schema {schema_path} has no entry for {path.name}")
    filled: dict[str, Any] = {**_SCHEMA_DEFAULTS, **found}
    if not all(isinstance(filled[name], list) for name in ("numeric", "categorical", "facts")):
        raise ModelError(f"the schema {schema_path}: numeric and categorical must be lists of columns")
    if not isinstance(filled["prefix"], str):
        raise ModelError(f"the schema {schema_path}: prefix must be a text")
    return filled


def _rows(
    path: Path, schema: Mapping[str, Any], numeric: Sequence[str], categorical: Sequence[str]
) -> Iterator[Record]:
    t0_s = _utc_s(schema["t0_utc"])
    key, target, prefix = schema["key"], schema["target"], schema["prefix"]
    told = [name for name in schema["facts"] if name in _FACTS]
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            wanted = {_SUBMIT, target, *numeric, *categorical, *told} | ({key} if key else set())
            missing = wanted - set(lines.fieldnames or ())
            if missing:
                raise ModelError(f"{path} has no column {', '.join(sorted(missing))}")
            for line in lines:
                submit_s = number(line[_SUBMIT])
                fields: dict[str, Value] = {
                    name.removeprefix(prefix): line[name] or None for name in categorical
                }
                for name in numeric:
                    value = number(line[name])
                    fields[name.removeprefix(prefix)] = value if math.isfinite(value) else None
                facts = Facts(
                    type=line[key] if key else "",
                    at_s=t0_s + submit_s,
                    fields=fields,
                    **{name: _FACTS[name](line[name]) for name in told},
                )
                yield Record(facts, submit_s, number(line[target]), number(line.get(_WAIT)))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as e:
        raise ModelError(f"the trace {path} cannot be read: {e}") from e


def _attempt(text: str | None) -> int:
    value = number(text)
    return int(value) if math.isfinite(value) else 1


def number(text: str | None) -> float:
    """A number, or NaN for what is none."""
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


_FACTS: Final[Mapping[str, Callable[[str | None], Any]]] = {
    "lane": lambda text: text or "",
    "payload_bytes": number,
    "attempt": _attempt,
}


def _utc_s(text: str | None) -> float:
    if not text:
        return math.nan
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return math.nan
