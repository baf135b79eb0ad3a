"""Schedules: slots across clock changes, horizons, jitter, payloads, and every wrong one refused in words."""

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from itertools import islice, takewhile
from operator import ge
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tqe import App
from tqe.errors import RegistrationError, SettingsError
from tqe.schedule import Schedule, Timetable, make, slot_text, timetable
from tqe.settings import Settings

BERLIN = "Europe/Berlin"
DAY_MS = 86_400_000


def ms(text: str, tz: str = BERLIN, fold: int = 0) -> int:
    """A local time as ms."""
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(tz), fold=fold).timestamp()) * 1000


def slots(one: Schedule, start: str, end: str) -> list[str]:
    """Slots after a local time and up to another one, as local times with their offset."""
    until = ms(end, one.tz)
    return [slot_text(slot, one.tz) for slot in takewhile(lambda s: s <= until, one.after(ms(start, one.tz)))]


def at(expression: str, tz: str = BERLIN) -> Schedule:
    return make(type="A", expression=expression, tz=tz)


# ------------------------------------------------------------------ slots


def test_an_expression_counts_in_its_time_zone() -> None:
    assert slots(at("30 3 * * MON-FRI"), "2026-06-05T00:00", "2026-06-09T00:00") == [
        "2026-06-05T03:30:00+02:00",
        "2026-06-08T03:30:00+02:00",
    ]


def test_in_spring_a_time_that_is_left_out_comes_right_after_the_gap() -> None:
    assert slots(at("30 2 * * *"), "2026-03-28T00:00", "2026-03-30T23:00") == [
        "2026-03-28T02:30:00+01:00",
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
    ]


def test_several_times_that_are_left_out_are_one_slot() -> None:
    assert slots(at("0,20,40 2 * * *"), "2026-03-29T00:00", "2026-03-29T23:00") == [
        "2026-03-29T03:00:00+02:00"
    ]


def test_in_spring_each_hour_is_an_hour() -> None:
    assert slots(at("0 * * * *"), "2026-03-29T00:30", "2026-03-29T04:00") == [
        "2026-03-29T01:00:00+01:00",
        "2026-03-29T03:00:00+02:00",
        "2026-03-29T04:00:00+02:00",
    ]


def test_in_autumn_a_time_that_comes_twice_is_one_slot() -> None:
    assert slots(at("30 2 * * *"), "2026-10-24T12:00", "2026-10-26T12:00") == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
    ]


def test_in_autumn_each_hour_is_an_hour() -> None:
    assert slots(at("30 * * * *"), "2026-10-25T01:00", "2026-10-25T03:59") == [
        "2026-10-25T01:30:00+02:00",
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:30:00+01:00",
        "2026-10-25T03:30:00+01:00",
    ]


@pytest.mark.parametrize("minute", range(0, 60, 10))
def test_who_begins_within_the_repeated_hour_never_goes_back(minute: int) -> None:
    start = ms(f"2026-10-25T02:{minute:02}", fold=1)
    first = at("30 2 * * *").next_after(start)
    assert first is not None and slot_text(first, BERLIN) == "2026-10-26T02:30:00+01:00"


def clock_changes(tz: str) -> list[int]:
    """The hours of 2026 and 2027 after which a zone's clocks show something else."""
    first = ms("2026-01-01T00:00", "UTC")
    hours = range(first, first + 730 * DAY_MS, 3_600_000)
    offset = [datetime.fromtimestamp(hour / 1000, ZoneInfo(tz)).utcoffset() for hour in hours]
    return [
        hour for hour, before, after in zip(hours[1:], offset, offset[1:], strict=False) if before != after
    ]


@pytest.mark.parametrize("tz", [BERLIN, "America/New_York", "Pacific/Chatham"])
@pytest.mark.parametrize("expression", ["30 2 * * *", "*/20 * * * *", "15,45 1-3 * * *", "5 */6 * * *"])
def test_all_find_the_same_slots_wherever_they_begin(tz: str, expression: str) -> None:
    """Stewards begin at different moments; two names for one slot would be two jobs."""
    one = at(expression, tz)
    changes = clock_changes(tz)
    assert len(changes) == 4
    for change in changes:
        known = [*takewhile(partial(ge, change + 3 * DAY_MS), one.after(change - DAY_MS))]
        assert known == sorted(set(known)) and len(known) > 1
        for start in range(change - 3 * 3_600_000, change + 3 * 3_600_000, 7 * 60_000):
            assert one.next_after(start) == next(slot for slot in known if slot > start)


def test_every_counts_from_1970() -> None:
    one = make(type="A", every=30)
    assert [*islice(one.after(0), 3)] == [30_000, 60_000, 90_000]
    assert one.next_after(29_999) == 30_000
    assert make(type="A", every=timedelta(minutes=5)).next_after(1) == 300_000


def test_rare_days_are_found() -> None:
    assert slots(at("0 0 29 2 *"), "2025-01-01T00:00", "2033-01-01T00:00") == [
        "2028-02-29T00:00:00+01:00",
        "2032-02-29T00:00:00+01:00",
    ]


# ------------------------------------------------------------------ what is due


def test_due_gives_the_latest_and_counts_the_rest() -> None:
    one = make(type="A", every=60)
    assert one.due(0, 59_999) == ([], 0)
    assert one.due(0, 60_000) == ([60_000], 0)
    assert one.due(60_000, 60_000) == ([], 0)
    assert one.due(0, 300_000, limit=2) == ([240_000, 300_000], 3)


def test_nothing_beyond_the_horizon_is_due_and_keys_outlive_it() -> None:
    for one in (make(type="A", every=1), make(type="A", every=600), at("* * * * *")):
        now = ms("2026-06-01T12:00")
        found, _ = one.due(0, now, limit=10**6)
        assert found[-1] <= now and found[0] > now - one.horizon_ms
        assert one.key_ttl_s * 1000 > one.horizon_ms + one.every_ms
        assert len(found) <= 10_080, "each slot's key takes memory"


def test_jitter_is_the_same_for_all_and_stays_in_its_window() -> None:
    one = make(type="A", every=60, jitter=30)
    late = [one.due_ms(slot) - slot for slot in islice(one.after(0), 200)]
    assert min(late) >= 0 and max(late) <= 30_000 and len(set(late)) > 150
    assert late == [
        make(type="A", every=60, jitter=30).due_ms(slot) - slot for slot in islice(one.after(0), 200)
    ]
    options = one.options_at(60_000, 60_000)
    assert options.due == f"={one.due_ms(60_000)}" and options.delay_ms == one.due_ms(60_000) - 60_000
    assert one.options_at(60_000, 95_000).due == "0"


def test_expiry_counts_from_the_start_that_jitter_gives() -> None:
    one = make(type="A", every=3600, jitter=1800, options={"expires": 60})
    slot = next(slot for slot in one.after(0) if one.due_ms(slot) - slot > 120_000)
    assert one.options_at(slot, slot).expires_ms == one.due_ms(slot) + 60_000


def test_the_slot_is_told_in_its_time_zone() -> None:
    one = make(type="A", expression="0 3 * * *", tz=BERLIN, payload={"a": 1}, slot_as="day")
    slot = ms("2026-06-05T03:00")
    assert one.payload_of(slot) == {"a": 1, "day": "2026-06-05T03:00:00+02:00"}
    assert make(type="A", every=1, payload={"a": 1}).payload_of(slot) == {"a": 1}


def test_a_schedule_survives_json() -> None:
    one = make(
        type="A",
        name="n",
        expression="0 3 * * *",
        tz=BERLIN,
        payload={"a": [1, None]},
        jitter=1.5,
        missed="all",
        options={"priority": "low", "expires": timedelta(hours=1)},
    )
    assert Schedule.from_dict(one.as_dict()) == one
    table = Timetable(app="a:b", born_ms=7, schedules=(one, make(type="B", every=0.5 * 60)))
    assert Timetable.from_dict(table.as_dict()) == table


@pytest.mark.parametrize("record", [{}, {"type": "A"}, {"type": "A", "every_ms": "x"}, {"type": "A", "x": 1}])
def test_a_damaged_record_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(RegistrationError):
        Schedule.from_dict(record)


# ------------------------------------------------------------------ wrong ones

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"expression": "61 * * * *"}, "'61 * * * *' has a wrong minute: it takes 0-59"),
    ({"expression": "* 24 * * *"}, "wrong hour: it takes 0-23"),
    ({"expression": "* * 0 * *"}, "wrong day-of-month: it takes 1-31"),
    ({"expression": "0 0 31 FEB *"}, "wrong day-of-month"),
    ({"expression": "* * * 13 *"}, "wrong month: it takes 1-12"),
    ({"expression": "* * * * 8"}, "wrong day-of-week: it takes 0-7"),
    ({"expression": "*/0 * * * *"}, "wrong minute"),
    ({"expression": "5-1 * * * *"}, "wrong minute"),
    ({"expression": "* * * *"}, "has 4 fields, and a cron expression has five"),
    ({"expression": "0 * * * * *"}, "has 6 fields, and a cron expression has five"),
    ({"expression": "@daily"}, "such as '30 3 * * MON-FRI'"),
    ({"expression": ""}, "has 0 fields"),
    ({"expression": 5}, "an expression is a text"),
    ({}, "give either a cron expression, such as '*/5 * * * *', or every=SECONDS"),
    ({"expression": "* * * * *", "every": 5}, "give either"),
    ({"every": 0.5}, "every is at least 1 second"),
    ({"every": -1}, "every is negative"),
    ({"every": "5"}, "every takes a number of seconds"),
    ({"every": 60, "tz": "Berlin"}, "there is no time zone 'Berlin' on this machine: take a name such as"),
    ({"every": 60, "tz": "../etc/passwd"}, "there is no time zone"),
    ({"every": 60, "tz": "Europe"}, "there is no time zone"),
    ({"every": 60, "tz": None}, "tz takes a time zone's name"),
    ({"every": 60, "missed": "never"}, "missed takes one of skip, once, all, not 'never'"),
    ({"every": 60, "jitter": 90_000}, "jitter is at most a day"),
    ({"every": 60, "jitter": -1}, "jitter is negative"),
    ({"every": 60, "overlap": "no"}, "overlap takes true or false"),
    ({"every": 60, "overlap": False, "missed": "all"}, "take missed='once'"),
    ({"every": 60, "slot_as": 5}, "slot_as takes the name of an argument"),
    ({"every": 60, "payload": [1]}, "a payload is a JSON object"),
    ({"every": 60, "name": "a b"}, "'a b' cannot name a schedule"),
    ({"every": 60, "type": ""}, "cannot name a schedule"),
    ({"every": 60, "type": 5, "name": "n"}, "'5' is no type: give the name of a task"),
    ({"every": 60, "options": {"delay": 5}}, "delay is not an option of a schedule; there are: priority"),
    ({"every": 60, "options": {"timeout": 0}}, "timeout is 0"),
    ({"every": 60, "options": {"expires": datetime(2026, 1, 1)}}, "expires takes a plain value"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_a_wrong_schedule_is_refused_with_what_to_do(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RegistrationError) as told:
        make(**{"type": "A", **wrong})
    assert says in str(told.value)


# ------------------------------------------------------------------ an app's schedules


@pytest.fixture
def app() -> App:
    app = App()

    @app.cron("*/5 * * * *", tz=BERLIN, payload={"n": 1})
    @app.task("COUNT", priority="low")
    def count(n: int = 0) -> int:
        return n

    @app.task("QUIET", track=False)
    def quiet() -> None: ...

    return app


def table_of(app: App, *tables: dict[str, Any], **more: Any) -> dict[str, Schedule]:
    found = app.timetable("m:app", Settings(cron=tables, **more), born_ms=1)
    assert (found.app, found.born_ms) == ("m:app", 1)
    return {one.name: one for one in found.schedules}


def test_a_task_keeps_what_it_is(app: App) -> None:
    task = app.registry.get("COUNT")
    assert task is not None and task(3) == 3


def test_the_lane_and_tracking_of_the_task_count(app: App) -> None:
    app.cron(None, "QUIET", every=60)
    app.cron(None, "COUNT", name="urgent", every=60, priority="HIGH")
    app.cron(None, "OTHER", every=60)
    found = table_of(app)
    assert {name: one.options for name, one in found.items()} == {
        "COUNT": {"lane": "low"},
        "QUIET": {"lane": "normal", "track": False},
        "urgent": {"lane": "high"},
        "OTHER": {"lane": "normal"},
    }


def test_tables_add_to_and_replace_what_the_code_says(app: App) -> None:
    found = table_of(
        app,
        {"type": "COUNT", "expression": "0 4 * * *", "payload": {"n": 2}},
        {"name": "second", "type": "COUNT", "every": 30, "priority": "high", "slot_as": None},
    )
    assert found["COUNT"].expression == "0 4 * * *" and found["COUNT"].payload == {"n": 2}
    assert found["second"].every_ms == 30_000 and found["second"].options == {"lane": "high"}


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([{"every": 5}], "[[cron]] table 1: type is missing: it names the task"),
        (
            [{"type": "A", "evry": 5}],
            "[[cron]] table 1: no schedule has evry; did you mean every?",
        ),
        (
            [{"type": "A", "every": 5}, {"type": "A", "every": 6}],
            "table 2: a table before it has the name A too",
        ),
        ([{"type": "COUNT", "every": 5, "payload": {"m": 1}}], "COUNT has no argument m; it takes n"),
        ([{"type": "COUNT", "every": 5, "payload": {"n": "x"}}], "the argument n is wrong"),
        ([{"type": "COUNT", "every": 5, "slot_as": "when"}], "COUNT has no argument when"),
        ([{"type": "A", "every": 5, "priority": "hihg"}], "there is no lane 'hihg'; configured are: high"),
        ([{"type": "QUIET", "every": 5, "overlap": False}], "take track=True"),
    ],
)
def test_a_wrong_table_is_refused(app: App, tables: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(SettingsError) as told:
        table_of(app, *tables)
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("register", "says"),
    [
        (lambda app: app.cron("* * * * *")(print), "is no task yet: put @app.cron(…) above @app.task(…)"),
        (lambda app: app.cron(None, "COUNT", every=5), "there is a schedule COUNT already: give this one"),
        (lambda app: app.cron("x", "N"), "has 1 fields"),
        (lambda app: app.cron(None, "N", every=5, dealy=5), "dealy is not an option of a schedule"),
    ],
)
def test_a_wrong_registration_is_refused(app: App, register: Callable[[App], Any], says: str) -> None:
    with pytest.raises(RegistrationError) as told:
        register(app)
    assert says in str(told.value)


def test_too_many_or_too_late(app: App) -> None:
    app.registry.freeze()
    with pytest.raises(RegistrationError, match="comes too late"):
        app.cron(None, "LATE", every=5)
    many = [make(type="A", name=f"n{k}", every=5) for k in range(1001)]
    with pytest.raises(RegistrationError, match="at most 1000 schedules"):
        timetable("a", 1, many, (), registry=app.registry, lanes=("high",), default_lane="high")
