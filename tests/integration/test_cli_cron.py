"""`tqe cron`, and schedules on their way from code and tqe.toml through `tqe run` to jobs that have run."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.cli import Cli, Program
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.schedule import Timetable, make
from tqe.store import housekeeping, scheduling
from tqe.store.call import SyncDoor
from tqe.store.keys import Keys

KEYS = Keys()

APP = """
from tqe import App

app = App()


@app.cron(every=1, slot_as="at")
@app.task("TICK")
def tick(at: str, text: str = "code") -> str:
    return f"{text} {at}"


app.cron("0 3 * * *", "TICK", {"text": "night"}, name="nightly", tz="Europe/Berlin", slot_as="at")
"""
TOML = """
[[cron]]
name = "often"
type = "TICK"
every = 1
slot_as = "at"
payload = {text = "toml"}
priority = "high"
"""


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli({"TQE_REDIS_URL": redis_server.url})


@pytest.fixture
def known(redis_client: redis.Redis) -> Timetable:
    """Schedules as a steward has registered them."""
    timetable = Timetable(
        app="m:app",
        born_ms=1,
        schedules=(
            make(
                type="REPORT",
                name="nightly",
                expression="30 2 * * *",
                tz="Europe/Berlin",
                slot_as="day",
                payload={"to": "a@example.com"},
                options={"lane": "low"},
            ),
            make(type="PING", every=3600, jitter=60, options={"lane": "high"}),
        ),
    )
    housekeeping.watched(
        SyncDoor(redis_client), KEYS.cron, lambda pipe: scheduling.register(pipe, KEYS, timetable)
    )
    return timetable


def test_no_schedules(cli: Cli) -> None:
    assert "no schedules: `tqe run` registers" in cli("cron", "list").stdout
    assert cli.json("cron", "list") == []
    assert "nothing is scheduled" in cli("cron", "next").stdout
    assert "there is no schedule 'x' (0 schedules: none)" in cli.fails(2, "cron", "run", "x")


def test_every_verb_has_an_example(cli: Cli) -> None:
    for verb in ("list", "next", "run", "pause", "resume", "remove"):
        assert "Example" in cli("cron", verb, "--help").stdout


def test_the_status_shows_what_comes_next(cli: Cli, known: Timetable) -> None:
    said = cli("status").stdout
    assert re.search(r"(?m)^schedule +type +next\n.+ PING +in [\d.]+ \w+\nnightly +REPORT +in ", said), said
    cli("cron", "pause", "nightly")
    assert re.search(r"(?m)^nightly +REPORT +paused$", cli("status").stdout)


def test_list(cli: Cli, known: Timetable) -> None:
    said = cli("cron", "list").stdout
    assert "30 2 * * *  Europe/Berlin" in said and "every 60 min, within 60.0 s" in said
    ping, nightly = cli.json("cron", "list")
    assert ping["every"] == 3600 and ping["jitter"] == 60 and ping["expression"] is None
    coming = nightly.pop("next")
    assert coming.endswith("Z") and coming[11:16] in ("00:30", "01:00", "01:30")
    assert nightly == {
        "name": "nightly",
        "app": "m:app",
        "type": "REPORT",
        "expression": "30 2 * * *",
        "every": None,
        "tz": "Europe/Berlin",
        "payload": {"to": "a@example.com"},
        "missed": "once",
        "jitter": 0,
        "overlap": True,
        "slot_as": "day",
        "options": {"lane": "low"},
        "paused": False,
        "last": None,
        "last_job": None,
    }


def test_next(cli: Cli, known: Timetable) -> None:
    found = cli.json("cron", "next", "nightly", "-n", "3")
    assert [one["local"][11:19] for one in found if "T02" in one["local"]]
    assert len(found) == 3 and found == sorted(found, key=lambda one: one["slot"])
    mixed = cli.json("cron", "next", "-n", "30")
    assert {one["name"] for one in mixed} == {"PING", "nightly"}
    assert all(one["due"] >= one["slot"] for one in mixed)
    assert len(cli("cron", "next").stdout.splitlines()) == 5


def test_run(cli: Cli, known: Timetable, redis_client: redis.Redis) -> None:
    job = cli("cron", "run", "nightly").stdout.strip()
    told = cli.json("job", job)
    assert (told["type"], told["lane"], told["status"]) == ("REPORT", "low", "queued")
    assert cli.json("cron", "run", "PING")["name"] == "PING"
    assert redis_client.hget(KEYS.cron, "last:nightly").endswith(b" "), "its slots know nothing of it"


def test_pause_and_resume(cli: Cli, known: Timetable) -> None:
    assert "`tqe cron resume PING` ends that" in cli("cron", "pause", "PING").stdout
    (ping, _) = cli.json("cron", "list")
    assert ping["paused"] is True and ping["next"] is None
    assert cli.json("cron", "next", "PING") == []
    assert "paused: it has no next slot" in cli("cron", "next", "PING").stdout
    assert cli.json("cron", "resume", "PING")["paused"] is False
    assert cli.json("cron", "list")[0]["next"] is not None
    assert cli("cron", "resume", "PING").exit_code == 0


def test_remove(cli: Cli, known: Timetable, redis_client: redis.Redis) -> None:
    cli("cron", "pause", "PING")
    assert cli.json("cron", "remove", "PING") == {"name": "PING", "removed": True}
    assert [one["name"] for one in cli.json("cron", "list")] == ["nightly"]
    assert not redis_client.exists(KEYS.cron_paused)
    assert "there is no schedule 'PING'" in cli.fails(2, "cron", "remove", "PING")


def test_a_record_that_cannot_be_read_is_told(cli: Cli, known: Timetable, redis_client: redis.Redis) -> None:
    redis_client.hset(KEYS.cron, "schedule:BAD", "{")
    said = cli("cron", "list")
    assert "BAD: it cannot be read" in said.stderr and "nightly" in said.stdout


# ------------------------------------------------------------------ with workers


@pytest.fixture
def program(redis_server: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def start(*args: str) -> Program:
        made.append(Program(tmp_path, {"TQE_REDIS_URL": redis_server.url}, args))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_schedules_run(
    cli: Cli, program: Callable[..., Program], redis_client: redis.Redis, tmp_path: Path, preload: str
) -> None:
    (tmp_path / "ticks.py").write_text(APP)
    (tmp_path / "tqe.toml").write_text(TOML)
    running = program("run", "ticks:app", "--procs", "1", "--no-pin", preload)
    assert "3 schedules; `tqe cron list` shows them" in running.says("tqe cron list")

    def done(name: str) -> Any:
        found = {one["name"]: one for one in cli.json("cron", "list")}
        job = found[name]["last_job"] if name in found else None
        told = cli.json("job", job) if job else {"status": "none"}
        return told if told["status"] == "completed" else None

    for name, text, lane in (("TICK", "code", "normal"), ("often", "toml", "high")):
        wait_until(lambda name=name: done(name), 30.0, f"a job of {name}")
        job = cli.json("cron", "list")
        assert {one["name"] for one in job} == {"TICK", "often", "nightly"}
        told = done(name)
        assert told is None or (told["result"].split()[0], told["lane"]) == (text, lane)
    records = [
        json.loads(value) for key, value in redis_client.hgetall(KEYS.cron).items() if b"schedule:" in key
    ]
    assert {record["app"] for record in records} == {"ticks:app"}


@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_a_wrong_table_is_told_before_anything_starts(cli: Cli, tmp_path: Path, preload: str) -> None:
    (tmp_path / "wrongticks.py").write_text(APP)
    (tmp_path / "tqe.toml").write_text('[[cron]]\ntype = "TICK"\nexpression = "61 * * * *"\n')
    said = cli.fails(2, "run", "wrongticks:app", preload)
    assert "'61 * * * *' has a wrong minute" in said


def test_tables_come_from_the_file_alone(cli: Cli) -> None:
    assert "TQE_CRON" in cli.fails(2, "status", TQE_CRON="* * * * *")


def test_burst_keeps_no_times(
    program: Callable[..., Program], redis_client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "burstticks.py").write_text(APP)
    running = program("run", "burstticks:app", "--procs", "1", "--no-pin", "--burst")
    assert "nothing is scheduled with --burst" in running.says("--burst")
    assert running.ended() == 0
    assert not redis_client.exists(KEYS.cron)
