"""The cron duty against a real Redis, its time moved by hand: policies, pauses, versions, rivals, deaths."""

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.support import cron_ticks
from tests.support.fake_clock import FakeClock
from tests.support.hands import Hands
from tests.support.housework import Scene
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe import clock, codec
from tqe.errors import QueueFull, RedisUnavailable
from tqe.schedule import Schedule, Timetable, make
from tqe.settings import Settings
from tqe.steward import cron
from tqe.steward.cron import Cron, CronReport
from tqe.store import scheduling
from tqe.store.call import Call, SyncDoor, connect
from tqe.store.link import SyncLink

MINUTE_MS = 60_000
T0_MS = 1_780_000_020_000  # 20:27:00 UTC: a full minute
ROOT = Path(__file__).parents[2]


class Time:
    """Redis' time as the duties get it."""

    def __init__(self) -> None:
        self.ms = T0_MS + 5_000

    def __call__(self, told_ms: int) -> int:
        return self.ms


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


Duty = Callable[..., Cron]


@pytest.fixture
def duty(scene: Scene, time: Time) -> Duty:
    """`duty(*schedules, born=1, app="m:app")` is a steward's, registered."""

    def made(*schedules: Schedule, born: int = 1, app: str = "m:app") -> Cron:
        one = Cron(scene.context, Timetable(app=app, born_ms=born, schedules=schedules), redis_now_ms=time)
        one.run_once()
        return one

    return made


def each_minute(**more: Any) -> Schedule:
    return make(**{"type": "EACH", "every": 60, "options": {"lane": "high"}, "slot_as": "at", **more})


def slots(scene: Scene, lane: str = "high") -> list[int]:
    """The slots whose jobs wait, in minutes after T0."""
    found = []
    for one in scene.client.lrange(scene.keys.queue(lane), 0, -1):
        ((_, _, payload, _, _),) = codec.walk(one)
        at = datetime.fromisoformat(json.loads(payload)["at"]).timestamp()
        found.append(round((at * 1000 - T0_MS) / MINUTE_MS, 3))
    return found


def last(scene: Scene, name: str = "EACH") -> float:
    noted = scene.client.hget(scene.keys.cron, f"last:{name}")
    return (int(noted.split()[0]) - T0_MS) / MINUTE_MS


# ------------------------------------------------------------------ slots


def test_a_slot_is_submitted_when_it_comes_and_once(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute())
    assert one.run_once() == CronReport() and slots(scene) == []
    time.ms = T0_MS + MINUTE_MS - 1
    assert one.run_once() == CronReport()
    assert one.next_in_s == cron.SOONEST_S
    time.ms += 1
    assert one.run_once() == CronReport(submitted=1)
    assert one.run_once() == CronReport()
    time.ms += MINUTE_MS + 700
    assert one.run_once() == CronReport(submitted=1)
    assert slots(scene) == [1, 2] and last(scene) == 2
    assert scene.depth() == {"high": 2} and scene.stats() == {"submitted": 2}


def test_the_next_look_is_when_the_next_slot_comes(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute())
    assert one.next_in_s is None
    time.ms = T0_MS + MINUTE_MS - 400
    one.run_once()
    assert one.next_in_s == 0.4


def test_the_job_is_like_one_that_was_submitted(scene: Scene, time: Time, duty: Duty) -> None:
    options = {"lane": "low", "timeout": 5, "max_retries": 2, "expires": 60}
    one = duty(each_minute(payload={"a": 1}, options=options))
    time.ms = T0_MS + MINUTE_MS
    one.run_once()
    job = scene.client.hget(scene.keys.cron, "last:EACH").split()[1].decode()
    hands = Hands(scene.client).fetch()
    ((name, kind, payload),) = hands.jobs()
    assert (name, kind, payload["a"]) == (job, "EACH", 1)
    (frame,) = hands.leases.values()
    header = codec.parse(frame)
    assert header.lane == "low" and header.flags & codec.TRACKED
    told = json.loads(frame[128 : 128 + int(frame[96:101])])
    assert told == {"timeout_ms": 5000, "max_retries": 2, "expires_ms": time.ms + 60_000}
    key = scene.keys.idem(f"cron:EACH:{T0_MS + MINUTE_MS}")
    assert scene.client.get(key).split()[0].decode() == job
    assert scene.client.ttl(key) > each_minute().horizon_ms // 1000


def test_jitter_delays_the_job_and_not_the_slot(scene: Scene, time: Time, duty: Duty) -> None:
    schedule = each_minute(jitter=3000)
    one = duty(schedule)
    now_ms = scene.redis_ms()
    time.ms = now_ms // MINUTE_MS * MINUTE_MS + 5 * MINUTE_MS  # by Redis' own clock it lies ahead
    scene.client.hset(scene.keys.cron, "last:EACH", time.ms - 1)
    assert one.run_once() == CronReport(submitted=1)
    ((_, due_ms),) = scene.client.zrange(scene.keys.delayed, 0, -1, withscores=True)
    assert due_ms == schedule.due_ms(time.ms) > time.ms


def test_a_storm_of_schedules_takes_several_passes(
    scene: Scene, time: Time, duty: Duty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cron, "SLOTS_MAX", 4)
    one = duty(*(each_minute(name=f"n{k}") for k in range(10)))
    time.ms = T0_MS + MINUTE_MS
    assert one.run_once() == CronReport(submitted=4)
    assert one.next_in_s == 0.0
    assert [one.run_once().submitted for _ in range(3)] == [4, 2, 0]
    assert slots(scene) == [1] * 10


def test_who_has_no_schedules_asks_redis_nothing(scene: Scene, duty: Duty) -> None:
    one = duty()
    assert scene.client.keys("*cron*") == []
    before = scene.client.info("stats")["total_commands_processed"]
    one.run_once()
    assert scene.client.info("stats")["total_commands_processed"] == before + 1  # the INFO


# ------------------------------------------------------------------ missed slots


@pytest.mark.parametrize(
    ("missed", "expected"),
    [("skip", []), ("once", [9]), ("all", [1, 2, 3, 4, 5, 6, 7, 8, 9])],
)
def test_slots_at_which_no_steward_ran(
    scene: Scene, time: Time, duty: Duty, missed: str, expected: list[int]
) -> None:
    schedule = each_minute(expression="*/3 * * * *", every=None, missed=missed)  # 20:27, 20:30, …
    duty(schedule)
    time.ms = T0_MS + 29 * MINUTE_MS
    one = duty(schedule, born=2)
    assert slots(scene) == [3 * slot for slot in expected]
    assert one.run_once() == CronReport()
    time.ms += MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    assert slots(scene) == [3 * slot for slot in (*expected, 10)]


def test_skip_takes_the_last_slot_if_it_is_not_late(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute(missed="skip"))
    time.ms = T0_MS + 3 * MINUTE_MS + cron.LATE_MS - 1
    assert one.run_once() == CronReport(submitted=1, skipped=2)
    assert slots(scene) == [3]


def test_all_makes_up_for_many_in_order_and_in_batches(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute(missed="all"))
    time.ms = T0_MS + 250 * MINUTE_MS
    reports = [one.run_once().submitted for _ in range(4)]
    assert reports == [100, 100, 50, 0]
    assert slots(scene) == [*range(1, 251)]


def test_all_makes_up_for_the_last_thousand(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute(missed="all"))
    time.ms = T0_MS + 1200 * MINUTE_MS
    reports = [one.run_once() for _ in range(11)]
    assert sum(report.submitted for report in reports) == 1000
    assert slots(scene) == [*range(201, 1201)]


def test_who_waits_for_room_is_counted_and_told_once(
    scene: Scene, time: Time, duty: Duty, logged: list[str]
) -> None:
    one = duty(each_minute(name="ALL", missed="all"), each_minute(name="ONCE"))
    time.ms = T0_MS + 250 * MINUTE_MS
    reports = [one.run_once() for _ in range(4)]
    assert [report.skipped for report in reports] == [0, 0, 249, 0]
    assert sum(report.submitted for report in reports) == 251
    assert logged == ["schedule ONCE missed slots"]


@pytest.mark.parametrize("missed", ["once", "all"])
def test_nobody_makes_up_for_what_lies_beyond_the_horizon(
    scene: Scene, time: Time, duty: Duty, missed: str
) -> None:
    """The slot's key may be gone by then, and so nobody knows whether it was submitted."""
    monthly = make(type="EACH", expression="0 0 1 * *", missed=missed, slot_as="at", options={"lane": "high"})
    time.ms = int(datetime(2026, 6, 30, 12, tzinfo=ZoneInfo("UTC")).timestamp() * 1000)
    one = duty(monthly)
    time.ms += 9 * 86_400_000
    assert one.run_once() == CronReport()
    assert slots(scene) == []
    assert one.run_once() == CronReport()
    time.ms = int(datetime(2026, 8, 3, tzinfo=ZoneInfo("UTC")).timestamp() * 1000)
    assert one.run_once().submitted == 1


@pytest.mark.parametrize(
    ("day", "expected"),
    [("2026-03-29", ["03:00+02:00"]), ("2026-10-25", ["02:30+02:00"]), ("2026-06-10", ["02:30+02:00"])],
)
def test_a_night_with_a_change_of_clocks(
    scene: Scene, time: Time, duty: Duty, day: str, expected: list[str]
) -> None:
    """A steward that looks every ten minutes of the night submits one job."""
    berlin = ZoneInfo("Europe/Berlin")
    time.ms = int(datetime.fromisoformat(day).replace(tzinfo=berlin).timestamp() * 1000)
    nightly = make(
        type="EACH", expression="30 2 * * *", tz="Europe/Berlin", slot_as="at", options={"lane": "high"}
    )
    one = duty(nightly)
    for _ in range(6 * 7):
        time.ms += 10 * MINUTE_MS
        one.run_once()
    told = [
        json.loads(next(iter(codec.walk(frame)))[2])["at"]
        for frame in scene.client.lrange(scene.keys.queue("high"), 0, -1)
    ]
    assert [text.replace(f"{day}T", "").replace(":00+", "+") for text in told] == expected


# ------------------------------------------------------------------ overlaps


def test_without_overlap_a_slot_waits_for_the_job_before(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute(overlap=False))
    time.ms = T0_MS + MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    time.ms += MINUTE_MS
    assert one.run_once() == CronReport(skipped=1)
    hands = Hands(scene.client).fetch()
    time.ms += MINUTE_MS
    assert one.run_once() == CronReport(skipped=1)
    hands.settle(lambda name: ("C", None))
    assert last(scene) == 3
    time.ms += MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    assert slots(scene) == [4]


@pytest.mark.parametrize("how", ["resume", "expression", "clock", "name"])
def test_the_job_before_is_known_wherever_the_slots_begin_anew(
    scene: Scene, redis_server: RedisServer, time: Time, duty: Duty, how: str
) -> None:
    one = duty(each_minute(overlap=False))
    time.ms = T0_MS + MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    ((job, _, _),) = Hands(scene.client).fetch().jobs()
    time.ms += 10_000
    match how:
        case "resume":
            run(scene, redis_server, scheduling.pause(scene.keys, "EACH"))
            run(scene, redis_server, scheduling.resume(scene.keys, "EACH", time.ms))
        case "expression":
            one = duty(each_minute(every=None, expression="* * * * *", overlap=False), born=2)
        case "clock":
            scene.client.hset(scene.keys.cron, "last:EACH", f"{T0_MS + 365 * 86_400_000} {job}")
            assert one.run_once() == CronReport()
        case "name":  # another app takes the schedule over
            one = duty(each_minute(every=None, expression="* * * * *", overlap=False), app="n:app")
    assert run(scene, redis_server, scheduling.look(scene.keys)).rows["EACH"].last_job == job
    time.ms = T0_MS + 2 * MINUTE_MS
    assert one.run_once() == CronReport(skipped=1)
    assert slots(scene) == []


# ------------------------------------------------------------------ pausing


def run(scene: Scene, server: RedisServer, steps: Any) -> Any:
    link = SyncLink(Settings(redis_url=server.url))
    try:
        return link.run(steps)
    finally:
        link.close()


@pytest.mark.parametrize("missed", ["once", "all"])
def test_slots_of_a_pause_are_not_made_up_for(
    scene: Scene, redis_server: RedisServer, time: Time, duty: Duty, missed: str
) -> None:
    one = duty(each_minute(missed=missed))
    run(scene, redis_server, scheduling.pause(scene.keys, "EACH"))
    time.ms = T0_MS + 5 * MINUTE_MS
    assert one.run_once() == CronReport()
    run(scene, redis_server, scheduling.resume(scene.keys, "EACH", time.ms))
    assert one.run_once() == CronReport()
    time.ms += MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    assert slots(scene) == [6]


def test_a_schedule_can_be_paused_when_redis_is_full(
    scene: Scene, redis_server: RedisServer, duty: Duty
) -> None:
    duty(each_minute())
    scene.client.config_set("maxmemory", "1")
    run(scene, redis_server, scheduling.pause(scene.keys, "EACH"))
    scene.client.config_set("maxmemory", "0")
    assert scene.client.smembers(scene.keys.cron_paused) == {b"EACH"}


# ------------------------------------------------------------------ versions of an app


def test_a_changed_expression_begins_now(scene: Scene, time: Time, duty: Duty) -> None:
    old = duty(each_minute(every=3600, missed="all"))
    time.ms = T0_MS + 40 * MINUTE_MS + 7_000
    new = duty(each_minute(missed="all"), born=2)
    assert new.run_once() == CronReport() and slots(scene) == []
    time.ms += MINUTE_MS
    assert new.run_once() == CronReport(submitted=1)
    time.ms += MINUTE_MS
    assert old.run_once() == CronReport(submitted=1), "the older steward goes by what stands in Redis"
    assert slots(scene) == [41, 42]


def test_another_payload_keeps_its_place(scene: Scene, time: Time, duty: Duty) -> None:
    duty(each_minute())
    time.ms = T0_MS + MINUTE_MS + 1
    duty(each_minute(payload={"b": 2}), born=2)
    assert slots(scene) == [1]


def test_an_older_version_that_comes_back_changes_nothing(scene: Scene, time: Time, duty: Duty) -> None:
    """A steward of the old version is restarted while the new one runs."""
    duty(each_minute(), each_minute(name="GONE"), born=1)
    duty(each_minute(every=120), born=2)
    before = scene.client.hgetall(scene.keys.cron)
    duty(each_minute(), each_minute(name="GONE"), born=1)
    assert scene.client.hgetall(scene.keys.cron) == before


def test_a_rollback_counts_as_the_younger(scene: Scene, time: Time, duty: Duty) -> None:
    duty(each_minute(), born=1)
    duty(born=2)
    assert scene.client.hgetall(scene.keys.cron) == {b"app:m:app": b"2"}
    duty(each_minute(), born=3)
    time.ms = T0_MS + MINUTE_MS
    assert duty(each_minute(), born=3).run_once() == CronReport()
    assert slots(scene) == [1]


def test_a_removed_schedule_leaves_nothing_behind(
    scene: Scene, redis_server: RedisServer, time: Time, duty: Duty
) -> None:
    old = duty(each_minute(), each_minute(name="GONE"))
    run(scene, redis_server, scheduling.pause(scene.keys, "GONE"))
    duty(each_minute(), born=2)
    assert set(scene.client.hgetall(scene.keys.cron)) == {b"app:m:app", b"schedule:EACH", b"last:EACH"}
    assert not scene.client.exists(scene.keys.cron_paused)
    time.ms = T0_MS + MINUTE_MS
    assert old.run_once() == CronReport(submitted=1)
    # Somebody who was on his way with a slot of it.
    moves = [scheduling.Move("GONE", T0_MS, "x")]
    assert scene.context.door.run(scheduling.advance_call(scene.keys, moves)) == 0


def test_apps_leave_each_others_schedules_alone(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute(name="ONE"), app="a:app")
    two = duty(each_minute(name="TWO"), app="b:app", born=5)
    duty(app="c:app", born=9)
    time.ms = T0_MS + MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    assert two.run_once() == CronReport(submitted=1)
    three = duty(each_minute(name="ONE"), app="d:app")
    time.ms += MINUTE_MS
    assert one.run_once() == CronReport(), "the name was taken"
    assert three.run_once() == CronReport(submitted=1)


# ------------------------------------------------------------------ what goes wrong


def test_one_schedule_that_cannot_submit_stops_no_other(scene: Scene, time: Time, duty: Duty) -> None:
    scene.context.settings = Settings(payload_max_bytes=64)
    one = duty(each_minute(name="BIG", payload={"x": "y" * 100}), each_minute())
    time.ms = T0_MS + MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    assert one.run_once() == CronReport()
    assert last(scene, "BIG") == 1


def test_a_damaged_record_stops_no_other(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute())
    odd = json.dumps({"app": "m:app", **each_minute(name="ODD").as_dict(), "options": ["lane"]})
    scene.client.hset(scene.keys.cron, mapping={"schedule:BAD": "{", "schedule:ODD": odd, "junk": "1"})
    time.ms = T0_MS + MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)


@pytest.mark.parametrize("noted", [None, "junk", f"{T0_MS + 365 * 86_400_000} x"])
def test_a_schedule_that_stands_nowhere_counts_from_now(
    scene: Scene, time: Time, duty: Duty, noted: str | None
) -> None:
    """Redis' clock stood a year ahead for a moment, or somebody changed the record by hand."""
    one = duty(each_minute())
    if noted is None:
        scene.client.hdel(scene.keys.cron, "last:EACH")
    else:
        scene.client.hset(scene.keys.cron, "last:EACH", noted)
    time.ms = T0_MS + 3 * MINUTE_MS
    assert one.run_once() == CronReport()
    time.ms += MINUTE_MS
    assert one.run_once() == CronReport(submitted=1)
    assert slots(scene) == [4]


def test_a_full_redis_delays_and_loses_nothing(scene: Scene, time: Time, duty: Duty) -> None:
    one = duty(each_minute())
    time.ms = T0_MS + MINUTE_MS
    scene.client.config_set("maxmemory", "1")
    with pytest.raises(QueueFull):
        one.run_once()
    scene.client.config_set("maxmemory", "0")
    assert one.run_once() == CronReport(submitted=1)
    assert slots(scene) == [1]


class Lossy(SyncDoor):
    """Loses the answer of one script, after or before it was applied; then the steward is another."""

    def __init__(self, server: RedisServer, script: str, *, applied: bool) -> None:
        super().__init__(connect(server.url))
        self.script = script
        self.applied = applied

    def run(self, call: Call) -> Any:
        if call.script == self.script:
            if self.applied:
                super().run(call)
            raise RedisUnavailable("killed here")
        return super().run(call)


@pytest.mark.parametrize("missed", ["skip", "once", "all"])
@pytest.mark.parametrize("script", ["enqueue", "advance"])
@pytest.mark.parametrize("applied", [True, False])
def test_a_steward_that_dies_at_the_tick(
    scene: Scene, redis_server: RedisServer, time: Time, duty: Duty, missed: str, script: str, applied: bool
) -> None:
    one = duty(each_minute(missed=missed))
    time.ms = T0_MS + MINUTE_MS
    door = scene.context.door
    scene.context.door = Lossy(redis_server, script, applied=applied)
    with contextlib.closing(scene.context.door.client), pytest.raises(RedisUnavailable):
        one.run_once()
    scene.context.door = door
    report = duty(each_minute(missed=missed)).run_once()  # its first run was the one that mattered
    assert report == CronReport()
    assert slots(scene) == [1] and last(scene) == 1
    assert scene.stats()["submitted"] == 1


def test_what_is_noted_goes_forward_only(scene: Scene, duty: Duty) -> None:
    duty(each_minute())

    def advance(*moves: scheduling.Move) -> int:
        return int(scene.context.door.run(scheduling.advance_call(scene.keys, moves)))

    assert advance(scheduling.Move("EACH", T0_MS + 9 * MINUTE_MS, "job-9")) == 1
    assert advance(scheduling.Move("EACH", T0_MS + 8 * MINUTE_MS, "job-8")) == 0
    assert advance(scheduling.Move("EACH", T0_MS + 10 * MINUTE_MS)) == 1
    noted = scene.client.hget(scene.keys.cron, "last:EACH")
    assert noted == f"{T0_MS + 10 * MINUTE_MS} job-9".encode()


def test_without_the_key_a_slot_would_be_submitted_twice(scene: Scene, time: Time, duty: Duty) -> None:
    """The tooth of the tests above: it is the key that protects, not luck."""
    one = duty(each_minute())
    time.ms = T0_MS + MINUTE_MS
    one.run_once()
    scene.client.hset(scene.keys.cron, "last:EACH", T0_MS)
    assert one.run_once() == CronReport(duplicates=1)
    scene.client.hset(scene.keys.cron, "last:EACH", T0_MS)
    scene.client.delete(scene.keys.idem(each_minute().key(T0_MS + MINUTE_MS)))
    assert one.run_once() == CronReport(submitted=1)
    assert slots(scene) == [1, 1]


# ------------------------------------------------------------------ five at once


class Stewards:
    """Five programs of the cron duty, killed and started again as the seed says."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self.log = (folder / "stewards.log").open("wb")
        real_ms = clock.wall_ms()
        self.args = [server.url, str(T0_MS), str(real_ms), "600"]  # a minute is a tenth of a second
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        program = [sys.executable, "-m", cron_ticks.__name__, *self.args]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.processes.append(subprocess.Popen(program, cwd=ROOT, env=env, stdout=self.log, stderr=self.log))

    def kill(self, at: int) -> None:
        process = self.processes.pop(at)
        process.kill()
        process.wait(10)

    def close(self) -> None:
        while self.processes:
            self.kill(0)
        self.log.close()


def test_five_stewards_and_kills_at_the_tick(redis_server: RedisServer, scene: Scene, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rnd = random.Random(seed)
    stewards = Stewards(redis_server, tmp_path)
    ended = 0

    def jobs() -> int:
        return int(scene.client.llen(scene.keys.queue("high")))

    try:
        for _ in range(5):
            stewards.start()
        for kill in range(6):
            # As soon as a slot has been submitted: some are killed before they note it.
            seen = jobs()
            wait_until(lambda seen=seen: jobs() > seen + rnd.randrange(3), 30.0, f"a slot (seed {seed})")
            if kill == 3:
                while stewards.processes:  # all of them at once
                    stewards.kill(0)
                for _ in range(4):
                    stewards.start()
            else:
                stewards.kill(rnd.randrange(len(stewards.processes)))
            ended += 1
            stewards.start()
        seen = jobs()
        wait_until(lambda: jobs() > seen + 5, 30.0, f"more slots (seed {seed})")
    finally:
        stewards.close()
    for at, lane in enumerate(("high", "low")):
        name = cron_ticks.TIMETABLE.schedules[at].name
        keys = {
            key.decode().rpartition(":")[2] for key in scene.client.keys(scene.keys.idem(f"cron:{name}:*"))
        }
        count = scene.client.llen(scene.keys.queue(lane))
        submitted = sorted(map(int, keys))
        expected = [*islice(cron_ticks.TIMETABLE.schedules[at].after(submitted[0] - 1), len(submitted))]
        assert submitted == expected, f"a slot is missing (seed {seed})"
        assert count == len(submitted), f"a slot was submitted twice (seed {seed})"
    assert ended == 6
