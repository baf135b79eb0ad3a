"""Owns the columns that the model sees: one definition, used when training and when serving.

A job's row is made of what is known at submission and of the history of completed jobs at that moment. All
that comes from durations is relative to the hierarchical mean, so that what the model learns on short jobs
holds for long ones.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tqe.ml.dataset import Facts, Trace, Value
from tqe.ml.history import COUNT, LOG_EWMA, LOG_LAST, MEAN, SHRINK_JOBS, History, N

FEATURES: Final = 1  # raised when columns of the same name change their meaning

NUMERIC_MAX: Final = 16
CATEGORICAL_MAX: Final = 8
SIDES_MAX: Final = 3
CODES_MAX: Final = 64  # values of a category that get a code of their own: the most frequent ones
TEXT_CHARS_MAX: Final = 64
LEVELS_OF_CATEGORIES_MAX: Final = 3
FEW_VALUES: Final = 64
# A field with more distinct values than this share of the jobs is an id or a measurement: it repeats too
# seldom to be a key, though a number among them is still a column.
DISTINCT_SHARE_MAX: Final = 0.5
# A calendar column needs repetitions, or it is only another name for "late in the trace".
DAYS_FOR_HOUR: Final = 2.0
DAYS_FOR_WEEKDAY: Final = 14.0

_NAN: Final = math.nan
_DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Which fields are keys and columns; fixed at training, stored with the model."""

    key_fields: tuple[str, ...]  # besides the type, in the order of the chain
    prefixes: tuple[int, ...]  # each level of the chain is so many of (type, *key_fields)
    sides: tuple[str, ...]  # categories whose value alone is a further level, off the chain
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    extras: tuple[str, ...]  # of lane, payload_bytes, attempt, hour, weekday: those that vary
    codes: Mapping[str, Mapping[str, int]]  # field -> value -> code; "type" and "lane" among them

    @property
    def levels(self) -> int:
        return len(self.prefixes) + len(self.sides)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in the order of a row. The last ones, `categorical_columns` many, are codes."""
        names = ["history.log_mean"]
        for index in range(len(self.prefixes)):
            names += [f"level{index}.ewma", f"level{index}.last", f"level{index}.count"]
        names += [f"side.{name}" for name in self.sides]
        names += [f"field.{name}" for name in self.numeric]
        names += [name for name in self.extras if name != "lane"]
        names += [f"code.{name}" for name in self._coded()]
        return tuple(names)

    def _coded(self) -> list[str]:
        return ["type", *self.categorical, *(["lane"] if "lane" in self.extras else [])]

    @property
    def categorical_columns(self) -> int:
        return len(self._coded())

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Schema:
        """Raises KeyError, TypeError or ValueError on what `dump` did not make."""
        lists = {name: tuple(dumped[name]) for name in cls.__slots__ if name != "codes"}
        codes = {
            str(field): {str(value): int(code) for value, code in known.items()}
            for field, known in dumped["codes"].items()
        }
        made = cls(**lists, codes=codes)
        if not all(p in range(1, 2 + len(made.key_fields)) for p in made.prefixes):
            raise ValueError("the levels of the schema do not fit its fields")
        return made


# --- finding the schema ---


def schema_of(trace: Trace) -> Schema:
    """The schema that the jobs of a trace call for."""
    jobs = len(trace)
    values: dict[str, list[Value]] = {
        name: [facts.fields.get(name) for facts in trace.facts]
        for name in (*trace.numeric, *trace.categorical)
    }
    distinct = {name: len(set(column)) for name, column in values.items()}
    repeats = {name for name, count in distinct.items() if 1 < count <= max(2.0, DISTINCT_SHARE_MAX * jobs)}
    by_count = sorted(distinct, key=lambda name: (distinct[name], name))
    categorical = tuple(n for n in by_count if n in trace.categorical and n in repeats)[:CATEGORICAL_MAX]
    numeric = tuple(name for name in trace.numeric if distinct[name] > 1)[:NUMERIC_MAX]
    few = tuple(n for n in by_count if n in numeric and n in repeats and distinct[n] <= FEW_VALUES)
    many = tuple(n for n in by_count if n in numeric and n in repeats and n not in few)
    key_fields = (*categorical, *few, *many)
    steps = [1, *(1 + n for n in range(1, len(categorical) + 1))]
    if len(steps) > 1 + LEVELS_OF_CATEGORIES_MAX:
        steps = [*steps[:LEVELS_OF_CATEGORIES_MAX], steps[-1]]
    steps += [1 + len(categorical) + len(few), 1 + len(key_fields)]
    types = [facts.type for facts in trace.facts]
    return Schema(
        key_fields=key_fields,
        prefixes=_useful(steps, types, [values[name] for name in key_fields]),
        sides=categorical[:SIDES_MAX],
        numeric=numeric,
        categorical=categorical,
        extras=_extras(trace),
        codes={
            "type": _codes(types),
            "lane": _codes([facts.lane for facts in trace.facts]),
            **{name: _codes([str(v) for v in values[name] if v is not None]) for name in categorical},
        },
    )


def _useful(
    steps: Sequence[int], types: Sequence[str], columns: Sequence[Sequence[Value]]
) -> tuple[int, ...]:
    """The prefixes that part the jobs further than the one before."""
    found, parts = [], 0
    for step in dict.fromkeys(steps):
        count = len(set(zip(types, *columns[: step - 1], strict=True)))
        if step == 1 or count > parts:
            found.append(step)
            parts = count
    return tuple(found)


def _extras(trace: Trace) -> tuple[str, ...]:
    found = []
    for name in ("lane", "payload_bytes", "attempt"):
        seen = {value for facts in trace.facts if (value := getattr(facts, name)) == value}
        if len(seen) > 1:
            found.append(name)
    days = (trace.submit_s[-1] - trace.submit_s[0]) / _DAY_S if len(trace) else 0.0
    if trace.facts[0].at_s == trace.facts[0].at_s:
        found += ["hour"] if days >= DAYS_FOR_HOUR else []
        found += ["weekday"] if days >= DAYS_FOR_WEEKDAY else []
    return tuple(found)


def _codes(values: Iterable[str]) -> dict[str, int]:
    ranked = sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))
    return {value: code for code, (value, _) in enumerate(ranked[:CODES_MAX])}


# --- payloads ---


def discover(payloads: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(numeric, categorical): the top-level fields of sample payloads that can be columns. A field belongs to
    the kind of most of its values; one that is mostly something else is left out."""
    kinds: dict[str, Counter[str]] = {}
    for payload in payloads:
        for name, value in payload.items():
            kinds.setdefault(name, Counter())[_kind(value)] += 1
    by_kind: dict[str, list[str]] = {"numeric": [], "categorical": [], "": []}
    for name in sorted(kinds):
        by_kind[kinds[name].most_common(1)[0][0]].append(name)
    return tuple(by_kind["numeric"][:NUMERIC_MAX]), tuple(by_kind["categorical"][:CATEGORICAL_MAX])


def _kind(value: Any) -> str:
    if isinstance(value, int | float):
        return "numeric"
    return "categorical" if isinstance(value, str) and len(value) <= TEXT_CHARS_MAX else ""


def pick(payload: Mapping[str, Any], numeric: Sequence[str], categorical: Sequence[str]) -> dict[str, Value]:
    """The fields of a payload as `Facts` wants them; what does not fit its kind is None."""
    picked: dict[str, Value] = {}
    for name in numeric:
        value = payload.get(name)
        usable = isinstance(value, int | float) and math.isfinite(value)
        picked[name] = float(value) if usable else None  # type: ignore[arg-type]
    for name in categorical:
        value = payload.get(name)
        picked[name] = value if isinstance(value, str) and len(value) <= TEXT_CHARS_MAX else None
    return picked


# --- rows ---


class Columns:
    """Builds keys and rows for one schema. Holds no state of jobs: the history is handed in."""

    __slots__ = (
        "_categorical",
        "_cuts",
        "_extras",
        "_key_fields",
        "_lane_codes",
        "_numeric",
        "_sides",
        "_type_codes",
        "chain",
        "schema",
        "width",
    )

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.chain = len(schema.prefixes)
        self.width = len(schema.columns)
        self._key_fields = schema.key_fields
        self._cuts = schema.prefixes[1:]
        self._sides = schema.sides
        self._numeric = schema.numeric
        self._categorical = [(name, dict(schema.codes.get(name, {}))) for name in schema.categorical]
        self._type_codes = dict(schema.codes.get("type", {}))
        self._lane_codes = dict(schema.codes.get("lane", {})) if "lane" in schema.extras else None
        self._extras: list[Callable[[Facts], float]] = [
            _EXTRAS[name] for name in schema.extras if name != "lane"
        ]

    def keys(self, facts: Facts) -> list[Any]:
        """The keys of a job, one for each level of the history."""
        get = facts.fields.get
        kind = facts.type
        values = (kind, *[get(name) for name in self._key_fields])
        found: list[Any] = [kind]
        for cut in self._cuts:
            found.append(values[:cut])
        for name in self._sides:
            found.append(get(name) or "")
        return found

    def row(self, facts: Facts, keys: Sequence[Any], history: History) -> tuple[float, list[float]]:
        """(hierarchical mean, row) at this state of the history, which must not be empty."""
        levels = history.levels
        mean = history.mean_s
        found = []
        for index in range(self.chain):
            entry = levels[index].get(keys[index])
            found.append(entry)
            if entry is not None:
                n = entry[N]
                mean = (n * entry[MEAN] + SHRINK_JOBS * mean) / (n + SHRINK_JOBS)
        log_mean = math.log(mean)
        row = [log_mean]
        for entry in found:
            if entry is None:
                row += (_NAN, _NAN, 0.0)
            else:
                row += (entry[LOG_EWMA] - log_mean, entry[LOG_LAST] - log_mean, entry[COUNT])
        for index in range(self.chain, len(keys)):
            entry = levels[index].get(keys[index])
            row.append(_NAN if entry is None else entry[LOG_EWMA] - log_mean)
        get = facts.fields.get
        for name in self._numeric:
            value = get(name)
            row.append(_NAN if value is None else value)  # type: ignore[arg-type]
        for extra in self._extras:
            row.append(extra(facts))
        row.append(self._type_codes.get(facts.type, _NAN))
        for name, codes in self._categorical:
            row.append(codes.get(get(name), _NAN))  # type: ignore[arg-type]
        if self._lane_codes is not None:
            row.append(self._lane_codes.get(facts.lane, _NAN))
        return mean, row

    def flat(self, rows: Sequence[Sequence[float]]) -> array[float]:
        """Rows as the library takes them: doubles, row by row."""
        made = array("d")
        for row in rows:
            made.extend(row)
        return made


def _hour(facts: Facts) -> float:
    return facts.at_s % _DAY_S // 3600.0


def _weekday(facts: Facts) -> float:
    return (facts.at_s // _DAY_S + 3.0) % 7.0  # 1970 began on a Thursday; Monday is 0


_EXTRAS: Final[Mapping[str, Callable[[Facts], float]]] = {
    "payload_bytes": lambda facts: facts.payload_bytes,
    "attempt": lambda facts: float(facts.attempt),
    "hour": _hour,
    "weekday": _weekday,
}
