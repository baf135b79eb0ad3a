"""Owns what a schedule is: when its slots are, which job each of them submits, what becomes of missed ones.

Pure: it knows no clock and no Redis. All times are ms since 1970; a slot is known by its own.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import takewhile
from typing import Any, Final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from tqe.codec import payload as codec_payload
from tqe.errors import RegistrationError, SettingsError, SubmitError
from tqe.job import SubmitOptions, is_type_name, seconds_to_ms, submit_options
from tqe.registry import Registry

SCHEDULES_MAX: Final = 1_000  # of one app: each steward looks at all of them at every tick
MISSED: Final = ("skip", "once", "all")
OPTION_NAMES: Final = ("priority", "lane", "timeout", "max_retries", "expires", "track")
CATCH_UP_MAX: Final = 1_000  # missed slots that `all` submits, the latest

_EVERY_MIN_MS: Final = 1_000
_DAY_MS: Final = 86_400_000
_HORIZON_MIN_MS: Final = 3_600_000
_HORIZON_MAX_MS: Final = 7 * _DAY_MS
_HORIZON_SLOTS: Final = 10_000
_KEY_MARGIN_S: Final = 3_600
# Fields of a record and of a [[cron]] table that are not its options.
_FIELDS: Final = (
    *("name", "type", "payload", "expression", "every", "tz"),
    *("missed", "jitter", "overlap", "slot_as"),
)
_SAMPLE_MS: Final = 1_700_000_000_000  # stands for a slot where only its form counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One schedule, checked: make it with `make` or `from_table`.

    Either `expression` with `tz`, or `every_ms`, whose slots are the multiples of it since 1970.
    """

    name: str
    type: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    expression: str | None = None
    every_ms: int = 0
    tz: str = "UTC"
    missed: str = "once"
    jitter_ms: int = 0
    overlap: bool = True  # whether a slot submits while the job of the slot before it has not ended
    slot_as: str | None = None  # the argument that gets the slot's time
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def timing(self) -> tuple[str | None, int, str]:
        """What says when the slots are: if it changes, they are other slots."""
        return self.expression, self.every_ms, self.tz

    @property
    def horizon_ms(self) -> int:
        """A slot older than this is never caught up: its idempotency key may be gone, and so nobody could
        tell any more whether it was submitted. Short for short intervals, as each slot's key takes memory."""
        if not self.every_ms:
            return _HORIZON_MAX_MS
        return min(_HORIZON_MAX_MS, max(_HORIZON_MIN_MS, _HORIZON_SLOTS * self.every_ms))

    @property
    def key_ttl_s(self) -> int:
        """How long the key of a slot is held: longer than anybody would submit that slot."""
        return self.horizon_ms // 1000 + _KEY_MARGIN_S

    def after(self, at_ms: int) -> Iterator[int]:
        """The slots after this moment, in order; ends if there are none for fifty years."""
        if self.every_ms:
            slot = (at_ms // self.every_ms + 1) * self.every_ms
            while True:
                yield slot
                slot += self.every_ms
        assert self.expression is not None
        last = at_ms
        for found in CronSim(self.expression, datetime.fromtimestamp(at_ms // 1000, _zone(self.tz))):
            slot = int(found.timestamp()) * 1000
            # In the hour that a clock repeats the parser begins with times that are over, and of an hour that
            # a clock leaves out it puts several at its end.
            if slot > last:
                last = slot
                yield slot

    def next_after(self, at_ms: int) -> int | None:
        return next(self.after(at_ms), None)

    def due(self, last_ms: int, now_ms: int, limit: int = CATCH_UP_MAX) -> tuple[list[int], int]:
        """The slots after `last_ms` up to now, the latest `limit` of them; and how many more there were that
        are not older than the horizon."""
        slots: deque[int] = deque(maxlen=limit)
        count = 0
        for slot in takewhile(
            lambda slot: slot <= now_ms, self.after(max(last_ms, now_ms - self.horizon_ms))
        ):
            slots.append(slot)
            count += 1
        return list(slots), count - len(slots)

    def key(self, slot_ms: int) -> str:
        """The idempotency key of a slot: whoever submits it first has submitted it."""
        return f"cron:{self.name}:{slot_ms}"

    def due_ms(self, slot_ms: int) -> int:
        """When the slot's job may start: within the jitter window, the same for everybody who asks."""
        if not self.jitter_ms:
            return slot_ms
        digest = hashlib.sha256(self.key(slot_ms).encode()).digest()
        return slot_ms + int.from_bytes(digest[:8]) % (self.jitter_ms + 1)

    def payload_of(self, slot_ms: int) -> dict[str, Any]:
        """The payload of a slot's job."""
        if self.slot_as is None:
            return dict(self.payload)
        return {**self.payload, self.slot_as: slot_text(slot_ms, self.tz)}

    def options_at(self, slot_ms: int, now_ms: int, lanes: Sequence[str] = ()) -> SubmitOptions:
        """Options of a slot's job. Raises what `submit_options` raises."""
        lane = self.options.get("lane") or self.options.get("priority") or (lanes[0] if lanes else "normal")
        made = submit_options(
            self.options, lanes=lanes or (str(lane).lower(),), default_lane=str(lane).lower(), now_ms=now_ms
        )
        due_ms = self.due_ms(slot_ms)
        if due_ms <= now_ms:
            return made
        # What expires does so counted from when it may start.
        expires_ms = made.expires_ms + due_ms - now_ms if made.expires_ms else 0
        return replace(made, due=f"={due_ms}", delay_ms=due_ms - now_ms, expires_ms=expires_ms)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Schedule:
        """What `as_dict` gave, checked again: it comes from Redis. RegistrationError if it is no schedule."""
        given = dict(record)
        every_ms, jitter_ms = given.pop("every_ms", 0), given.pop("jitter_ms", 0)
        if not isinstance(every_ms, int) or not isinstance(jitter_ms, int):
            raise RegistrationError("a stored schedule is damaged")
        try:
            return make(**given, every=every_ms / 1000 if every_ms else None, jitter=jitter_ms / 1000)
        except (TypeError, AttributeError, ValueError, OverflowError) as e:  # any JSON may stand there
            raise RegistrationError(f"a stored schedule is damaged: {e}") from e


@dataclass(frozen=True, kw_only=True, slots=True)
class Timetable:
    """All schedules of one app, as one supervisor knows them. `born_ms` is when it was started: of two
    versions the younger counts."""

    app: str
    born_ms: int
    schedules: tuple[Schedule, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"app": self.app, "born_ms": self.born_ms, "schedules": [s.as_dict() for s in self.schedules]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Timetable:
        schedules = tuple(Schedule.from_dict(one) for one in record["schedules"])
        return cls(app=record["app"], born_ms=record["born_ms"], schedules=schedules)


def make(
    *,
    type: Any,
    name: Any = None,
    expression: Any = None,
    every: Any = None,
    tz: Any = "UTC",
    payload: Any = None,
    missed: Any = "once",
    jitter: Any = 0,
    overlap: Any = True,
    slot_as: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Schedule:
    """Check everything that can be checked without the app's tasks and settings. Raises RegistrationError,
    whose text says what to write instead. `every` and `jitter` are seconds or timedeltas."""
    name = type if name is None else name
    if not isinstance(name, str) or not is_type_name(name):
        raise RegistrationError(
            f"{str(name)[:80]!r} cannot name a schedule: it takes 1 to 64 of A-Z a-z 0-9 _ . : -"
        )
    what = f"schedule {name}"
    if not isinstance(type, str) or not is_type_name(type):
        raise RegistrationError(f"{what}: {str(type)[:80]!r} is no type: give the name of a task")
    if (expression is None) == (every is None):
        raise RegistrationError(
            f"{what}: give either a cron expression, such as '*/5 * * * *', or every=SECONDS"
        )
    if missed not in MISSED:
        raise RegistrationError(f"{what}: missed takes one of {', '.join(MISSED)}, not {missed!r}")
    if not isinstance(overlap, bool):
        raise RegistrationError(f"{what}: overlap takes true or false, not {overlap!r}")
    if not overlap and missed == "all":
        raise RegistrationError(
            f"{what}: overlap=False and missed='all' exclude each other: slots that are caught up overlap;"
            " take missed='once'"
        )
    if slot_as is not None and not (isinstance(slot_as, str) and slot_as):
        raise RegistrationError(f"{what}: slot_as takes the name of an argument, not {slot_as!r}")
    made = Schedule(
        name=name,
        type=type,
        payload=_payload(what, payload),
        expression=None if expression is None else _expression(what, expression, _check_zone(what, tz)),
        every_ms=0 if every is None else _span_ms(what, "every", every),
        tz=_check_zone(what, tz),
        missed=missed,
        jitter_ms=_span_ms(what, "jitter", jitter),
        overlap=overlap,
        slot_as=slot_as,
        options=_options(what, options or {}),
    )
    _check_spans(what, made)
    return made


def from_table(table: Mapping[str, Any]) -> Schedule:
    """A schedule as a [[cron]] table of tqe.toml says it."""
    known = (*_FIELDS, *OPTION_NAMES)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise RegistrationError(f"no schedule has {key}; {hint}")
    if "type" not in table:
        raise RegistrationError("type is missing: it names the task whose job is submitted")
    own = {key: value for key, value in table.items() if key in _FIELDS}
    return make(**own, options={key: value for key, value in table.items() if key in OPTION_NAMES})


def timetable(
    app: str,
    born_ms: int,
    schedules: Iterable[Schedule],
    tables: Sequence[Mapping[str, Any]],
    *,
    registry: Registry,
    lanes: Sequence[str],
    default_lane: str,
) -> Timetable:
    """Everything that an app schedules: what its code says, and [[cron]] tables, which replace schedules of
    the same name. What a task says of its lane and of tracking counts here as in a submission.

    Raises RegistrationError for the code, SettingsError for a table."""
    found = {one.name: _settle(one, registry, lanes, default_lane) for one in schedules}
    named: set[str] = set()
    for at, table in enumerate(tables, 1):
        try:
            one = _settle(from_table(table), registry, lanes, default_lane)
        except RegistrationError as e:
            raise SettingsError(f"[[cron]] table {at}: {e}") from e
        if one.name in named:
            raise SettingsError(f"[[cron]] table {at}: a table before it has the name {one.name} too")
        named.add(one.name)
        found[one.name] = one
    if len(found) > SCHEDULES_MAX:
        raise RegistrationError(f"an app has at most {SCHEDULES_MAX} schedules, not {len(found)}")
    return Timetable(app=app, born_ms=born_ms, schedules=tuple(found.values()))


def slot_text(slot_ms: int, tz: str = "UTC") -> str:
    """A slot as people of its time zone write it, with the offset from UTC."""
    return datetime.fromtimestamp(slot_ms / 1000, _zone(tz)).isoformat()


# ------------------------------------------------------------------ checks


def _settle(one: Schedule, registry: Registry, lanes: Sequence[str], default_lane: str) -> Schedule:
    """With its lane, and held against its task as far as this app has it."""
    options = dict(one.options)
    task = registry.get(one.type)
    lane = options.pop("priority", None)
    options["lane"] = options.get("lane") or lane or (task and task.lane) or default_lane
    if task is not None and not task.track:
        options.setdefault("track", False)
    if not one.overlap and options.get("track") is False:
        raise RegistrationError(
            f"schedule {one.name}: overlap=False needs a record of the job before: take track=True"
        )
    settled = replace(one, options=options)
    try:
        settled.options_at(_SAMPLE_MS, _SAMPLE_MS, lanes)
        if task is not None:
            task.validate(codec_payload.encode(settled.payload_of(_SAMPLE_MS)))
    except SubmitError as e:
        raise RegistrationError(f"schedule {one.name}: {e}") from e
    return replace(settled, options={**options, "lane": str(options["lane"]).lower()})


def _payload(what: str, payload: Any) -> dict[str, Any]:
    """As it will arrive: encoded and decoded once."""
    try:
        return codec_payload.decode(codec_payload.encode({} if payload is None else payload))
    except SubmitError as e:
        raise RegistrationError(f"{what}: {e}") from e


def _options(what: str, options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in OPTION_NAMES:
            raise RegistrationError(
                f"{what}: {name} is not an option of a schedule; there are: {', '.join(OPTION_NAMES)}"
            )
    given = {
        name: value.total_seconds() if isinstance(value, timedelta) else value
        for name, value in options.items()
        if value is not None
    }
    for name, value in given.items():
        if not isinstance(value, str | int | float):
            raise RegistrationError(f"{what}: {name} takes a plain value, not {value!r:.60}")
    lane = given.get("lane", given.get("priority", "normal"))
    try:
        submit_options(given, lanes=(str(lane).lower(),), default_lane="normal", now_ms=_SAMPLE_MS)
    except SubmitError as e:
        raise RegistrationError(f"{what}: {e}") from e
    return given


def _span_ms(what: str, name: str, value: Any) -> int:
    try:
        return seconds_to_ms(name, value)
    except SubmitError as e:
        raise RegistrationError(f"{what}: {e}") from e


def _check_spans(what: str, made: Schedule) -> None:
    if made.expression is None and made.every_ms < _EVERY_MIN_MS:
        raise RegistrationError(f"{what}: every is at least 1 second; for less, let one job do several steps")
    if made.jitter_ms > _DAY_MS:
        raise RegistrationError(f"{what}: jitter is at most a day, 86400 seconds")


def _check_zone(what: str, tz: Any) -> str:
    if not isinstance(tz, str) or not tz:
        raise RegistrationError(f"{what}: tz takes a time zone's name, such as 'Europe/Berlin', not {tz!r}")
    try:
        _zone(tz)
    except (KeyError, ValueError, OSError) as e:
        raise RegistrationError(
            f"{what}: there is no time zone {tz[:64]!r} on this machine: take a name such as 'Europe/Berlin'"
            " (where there are none at all, install the package tzdata)"
        ) from e
    return tz


@lru_cache(maxsize=256)
def _zone(tz: str) -> tzinfo:
    # The parser treats this one object as having no changes of clocks, which is exact and quicker.
    return UTC if tz.upper() == "UTC" else ZoneInfo(tz)


_RANGES: Final = {
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31, L or LW",
    "month": "1-12 or JAN-DEC",
    "day-of-week": "0-7 or SUN-SAT, FRI#2 or 5L",
}


def _expression(what: str, expression: Any, tz: str) -> str:
    if not isinstance(expression, str):
        raise RegistrationError(f"{what}: an expression is a text such as '*/5 * * * *', not {expression!r}")
    shown = f"{what}: {expression[:80]!r}"
    parts = expression.split()
    if len(parts) != 5:
        raise RegistrationError(
            f"{shown} has {len(parts)} fields, and a cron expression has five: minute hour day-of-month month"
            " day-of-week, such as '30 3 * * MON-FRI'; for seconds take every=SECONDS"
        )
    try:
        upcoming = CronSim(expression, datetime.fromtimestamp(_SAMPLE_MS / 1000, _zone(tz)))
    except CronSimError as e:
        name = re.sub(r"^Bad ", "", str(e))
        raise RegistrationError(
            f"{shown} has a wrong {name}: it takes {_RANGES.get(name, 'another value')}, lists with commas,"
            " ranges with -, steps with /, or *"
        ) from e
    if next(upcoming, None) is None:
        raise RegistrationError(f"{shown} names no day that ever comes: change its day or month")
    return " ".join(parts)
