"""Owns the schedules in Redis: what stands in `cron` and `cron_paused`, and every change of it.

The hash has three kinds of fields: `app:<app>` when the youngest supervisor of the app was started,
`schedule:<name>` its app and definition, `last:<name>` the last slot that was seen to and its job. What
stands there counts for every steward of the app, so that two versions of it cannot both fire one schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from tqe.errors import RegistrationError
from tqe.job import bucket_of, is_job_id, split_job_id, to_datetime, to_iso
from tqe.schedule import Schedule, Timetable
from tqe.store.call import Argument, Call
from tqe.store.keys import Keys
from tqe.store.producing import persist
from tqe.store.reading import ask
from tqe.store.steps import Reads, Steps

_encode: Final = msgspec.json.Encoder(order="deterministic").encode


NowMs = Callable[[int], int]  # makes of Redis' time the one that counts; another one only in tests


def _as_told(told_ms: int) -> int:
    return told_ms


def _iso(at_ms: int | None) -> str | None:
    return to_iso(to_datetime(at_ms or 0))


class Row(NamedTuple):
    """One schedule as it stands in Redis. `last_ms` is None if nobody has noted a slot yet."""

    schedule: Schedule
    app: str
    last_ms: int | None
    last_job: str
    paused: bool

    def next_ms(self, now_ms: int) -> int | None:
        """The next slot, None while it is paused."""
        return None if self.paused else self.schedule.next_after(now_ms)

    def as_dict(self, now_ms: int) -> dict[str, Any]:
        """The shape of `tqe cron list --json`."""
        one = self.schedule
        return {
            "name": one.name,
            "app": self.app,
            "type": one.type,
            "expression": one.expression,
            "every": one.every_ms / 1000 if one.every_ms else None,
            "tz": one.tz,
            "payload": dict(one.payload),
            "missed": one.missed,
            "jitter": one.jitter_ms / 1000,
            "overlap": one.overlap,
            "slot_as": one.slot_as,
            "options": dict(one.options),
            "paused": self.paused,
            "last": _iso(self.last_ms if self.last_job else None),
            "last_job": self.last_job or None,
            "next": _iso(self.next_ms(now_ms)),
        }


@dataclass(frozen=True, slots=True)
class View:
    """All schedules at one moment of Redis; `damaged` are those that cannot be read."""

    now_ms: int
    born: Mapping[str, int]
    rows: Mapping[str, Row]
    damaged: tuple[str, ...] = ()


def look_commands(keys: Keys) -> tuple[tuple[Argument, ...], ...]:
    """What to send for a View; `read_look` reads the answers."""
    return (("TIME",), ("HGETALL", keys.cron), ("SMEMBERS", keys.cron_paused))


def read_look(answers: Sequence[Any], now_ms: NowMs = _as_told) -> View:
    time, flat, paused = answers
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return _view(now_ms(_ms(time)), fields, paused)


def _ms(time: Sequence[Any]) -> int:
    return int(time[0]) * 1000 + int(time[1]) // 1000


def _view(now_ms: int, fields: Mapping[bytes, bytes], paused: Sequence[bytes]) -> View:
    born: dict[str, int] = {}
    rows: dict[str, Row] = {}
    damaged: list[str] = []
    for key, value in sorted(fields.items()):
        kind, _, name = key.decode("utf-8", "replace").partition(":")
        if kind == "app" and value.isdigit():
            born[name] = int(value)
        elif kind == "schedule":
            try:
                record = msgspec.json.decode(value, type=dict[str, Any])
                app, schedule = str(record.pop("app", "")), Schedule.from_dict(record)
            except (msgspec.DecodeError, RegistrationError):
                damaged.append(name)
                continue
            rows[name] = Row(schedule, app, *_noted(fields, name), name.encode() in paused)
    return View(now_ms, born, rows, tuple(damaged))


def _noted(fields: Mapping[bytes, bytes], name: str) -> tuple[int | None, str]:
    """Up to when a schedule's slots have been seen to, and the job of the last; None and "" where nothing
    of it can be read."""
    last, _, job = fields.get(b"last:" + name.encode(), b"").decode("ascii", "replace").partition(" ")
    return int(last) if last.isdigit() and len(last) < 16 else None, job if is_job_id(job) else ""


def look(keys: Keys) -> Steps[View]:
    """All schedules, for clients."""
    return read_look((yield from ask(*look_commands(keys))))


# ------------------------------------------------------------------ registering


class Registered(NamedTuple):
    """What became of an app's timetable: names that were written and removed, and (name, app) that were
    another app's; `followed` if a younger supervisor of the app has registered, whose timetable counts."""

    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    taken: tuple[tuple[str, str], ...] = ()
    followed: bool = False


def register(pipe: Any, keys: Keys, timetable: Timetable, *, now_ms: NowMs = _as_told) -> Registered:
    """Make this timetable the one of its app. To be run under WATCH of `cron` (`housekeeping.watched`).

    A schedule that is new or has other times begins now: slots that it did not have were not missed. The job
    of its last slot may still run, so that one stays noted.
    """
    begin_ms = now_ms(_ms(pipe.time()))
    fields = pipe.hgetall(keys.cron)
    view = _view(begin_ms, fields, ())
    pipe.multi()
    if view.born.get(timetable.app, 0) > timetable.born_ms:
        return Registered(followed=True)
    wanted = {one.name: one for one in timetable.schedules}
    gone = [name for name, row in view.rows.items() if row.app == timetable.app and name not in wanted]
    written, taken = [], []
    for name, one in wanted.items():
        record = _encode({"app": timetable.app, **one.as_dict()})
        before = view.rows.get(name)
        if before is not None and before.app != timetable.app:
            taken.append((name, before.app))
        if fields.get(f"schedule:{name}".encode()) != record:
            pipe.hset(keys.cron, f"schedule:{name}", record)
            written.append(name)
        if before is None or before.last_ms is None or before.schedule.timing != one.timing:
            pipe.hset(keys.cron, f"last:{name}", f"{begin_ms} {_noted(fields, name)[1]}")
    for name in gone:
        _remove(pipe, keys, name)
    if wanted or timetable.app in view.born:
        pipe.hset(keys.cron, f"app:{timetable.app}", timetable.born_ms)
    return Registered(tuple(written), tuple(gone), tuple(taken))


def _remove(pipe: Any, keys: Keys, name: str) -> None:
    pipe.hdel(keys.cron, f"schedule:{name}", f"last:{name}")
    pipe.srem(keys.cron_paused, name)


# ------------------------------------------------------------------ slots


class Move(NamedTuple):
    """A schedule's slots up to this one have been seen to; `job_id` is the job of the last, "" for none."""

    name: str
    slot_ms: int
    job_id: str = ""


def advance_call(keys: Keys, moves: Sequence[Move]) -> Call:
    """The call that notes them."""
    return Call("advance", (keys.void, keys.cron), tuple(part for move in moves for part in move))


def begin_anew(keys: Keys, row: Row, now_ms: int) -> tuple[Argument, ...]:
    """The command that lets a schedule's slots count from now, wherever it stood. Its last job stays noted:
    it may run, and without overlaps the next slot asks for it."""
    return ("HSET", keys.cron, f"last:{row.schedule.name}", f"{now_ms} {row.last_job}")


def state_commands(keys: Keys, job_ids: Sequence[str]) -> list[tuple[Argument, ...]]:
    """What to ask for the records of these jobs, each the only one of its frame."""
    frames = [split_job_id(one)[0] for one in job_ids]
    return [("HGET", keys.bucket(*bucket_of(frame)), frame) for frame in frames]


# ------------------------------------------------------------------ operators


def pause(keys: Keys, name: str) -> Steps[None]:
    """Slots are skipped until the schedule is resumed. Works at full memory too, when it is needed most."""
    yield from persist(Call("pause", (keys.void, keys.cron_paused), (name,)))


def resume(keys: Keys, name: str, now_ms: int) -> Steps[None]:
    """Slots count from now on: those of the pause were not missed. In this order, so that no steward sees the
    schedule resumed and yet standing where it was paused."""
    yield from persist(advance_call(keys, [Move(name, now_ms)]))
    yield from persist(Reads((("SREM", keys.cron_paused, name),)))


def remove(keys: Keys, name: str) -> Steps[None]:
    """Forget a schedule. An app that still has it brings it back when it is started anew."""
    yield from persist(
        Reads(
            (
                ("HDEL", keys.cron, f"schedule:{name}", f"last:{name}"),
                ("SREM", keys.cron_paused, name),
            )
        )
    )
