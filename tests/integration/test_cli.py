"""The verbs that read and operate, and what a user is told when something is wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from tests.support.cli import Cli, bury
from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tqe.cli.main import main
from tqe.client import Client
from tqe.settings import Settings
from tqe.store.keys import Keys

KEYS = Keys()
NOWHERE = "01JD8Z3V7Q8K2M4N6P8R0T2W00.0"


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli({"TQE_REDIS_URL": redis_server.url})


def publish(client: redis.Redis, *, lanes: list[str], job: str | None = None) -> None:
    """What a steward does once a second."""
    jobs = [{"id": job, "type": "A", "since_ms": 1_700_000_000_000}] if job else []
    record = {
        "worker": 3,
        "pid": 77,
        "cpu": 1,
        "state": "busy" if job else "idle",
        "host": "h",
        "jobs": jobs,
        "lanes": lanes,
    }
    client.zadd(KEYS.incarnations, {"one": 2e12})
    client.set(KEYS.worker("one"), json.dumps(record))


# ------------------------------------------------------------------ help


def test_help_of_every_verb_has_an_example(cli: Cli) -> None:
    said = cli("--help").stdout
    for name, verb in main.commands.items():
        if not verb.hidden:
            assert f"  {name} " in said
            assert "Example" in cli(name, "--help").stdout, name


def test_a_wrong_verb_is_usage(cli: Cli) -> None:
    assert "No such command" in cli.fails(2, "sumbit")


# ------------------------------------------------------------------ status


def test_status_as_json_has_the_whole_shape(cli: Cli, redis_client: redis.Redis) -> None:
    cli.json("submit", "A", "--priority", "high")
    publish(redis_client, lanes=["high"], job=NOWHERE)
    assert cli.json("status") == {
        "lanes": {
            "high": {"queued": 1, "sorted": 0},
            "normal": {"queued": 0, "sorted": 0},
            "low": {"queued": 0, "sorted": 0},
        },
        "running": 1,
        "scheduled": 0,
        "dead": 0,
        "totals": {
            "submitted": 1,
            "completed": 0,
            "failed": 0,
            "retried": 0,
            "dead": 0,
            "duplicate": 0,
            "cancelled": 0,
            "recovered": 0,
            "fenced": 0,
        },
        "workers": [{"worker": 3, "pid": 77, "cpu": 1, "state": "busy", "job": NOWHERE}],
    }


def test_status_for_people(cli: Cli, redis_client: redis.Redis) -> None:
    said = cli("status").stdout
    assert "no worker runs" in said
    publish(redis_client, lanes=["high"], job=NOWHERE)
    cli("pause", "low")
    redis_client.rpush(KEYS.quarantine, b"x")
    said = cli("status").stdout
    assert f"3   77    1  busy   {NOWHERE}  A" in said
    assert "low          0       0     -       -  paused" in said
    assert "1 damaged frame in quarantine" in said
    assert all(line == line.rstrip() for line in said.splitlines())


def test_status_tells_what_waits_and_what_tasks_did(cli: Cli, redis_client: redis.Redis) -> None:
    cli.json("submit", "A", "--priority", "high")
    publish(redis_client, lanes=["high"])
    record = json.loads(redis_client.get(KEYS.worker("one"))) | {"steward": "s"}
    redis_client.set(KEYS.worker("one"), json.dumps(record))
    bins = [0] * 24
    bins[10] = 4  # 1 to 2 ms
    task = {"outcomes": {"completed": 3, "failed": 1}, "run_bins": bins, "run_sum_s": 0.005}
    redis_client.set(KEYS.tasks("s"), json.dumps({"A": task | {"wait_bins": bins, "wait_sum_s": 0.005}}))
    said = cli("status").stdout
    assert re.search(r"(?m)^high +1 +0 +[\d.]+ s +[\d.]+ m?s$", said), said
    assert re.search(r"(?m)^A +4 +1 +1\.4\d* ms +1\.9\d* ms +2(\.0\d*)? ms +1\.9\d* ms$", said), said


# ------------------------------------------------------------------ job, cancel


def test_a_job_as_json(cli: Cli, redis_client: redis.Redis) -> None:
    name = cli.json("submit", "A")["id"]
    Hands(redis_client).fetch().settle(lambda one: ("C", {"x": [1, None]}))
    told = cli.json("job", name)
    assert list(told) == [
        *("id", "type", "status", "lane", "attempts"),
        *("submitted_at", "started_at", "finished_at", "result", "error"),
        *("predicted_ms", "predicted_wait_ms"),
    ]
    assert (told["id"], told["type"], told["status"], told["result"]) == (
        name,
        "A",
        "completed",
        {"x": [1, None]},
    )
    said = cli("job", name).stdout
    assert "status     completed" in said
    assert 'result     {"x": [1, null]}' in said
    assert cli("job", f" {name.lower()} ").exit_code == 0


def test_a_dead_job_shows_its_error_without_control_characters(cli: Cli, redis_client: redis.Redis) -> None:
    name = cli.json("submit", "A")["id"]
    bury(redis_client, message="Traceback:\n  \x1b[31mred\x1b[0m")
    said = cli("job", name).stdout
    assert "\\x1b[31mred" in said and "\x1b" not in said


def test_a_job_of_which_nothing_is_known(cli: Cli) -> None:
    result = cli("job", NOWHERE, "--json")
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (1, "unknown")
    assert "no job id" in cli.fails(2, "job", "17").replace("not a job id", "no job id")


def test_cancel_says_what_became_of_it(cli: Cli, redis_client: redis.Redis) -> None:
    later = cli.json("submit", "A", "--delay", "60")["id"]
    assert cli.json("cancel", later) == {"id": later, "outcome": "cancelled"}
    waiting = cli.json("submit", "A")["id"]
    assert "requested" in cli("cancel", waiting).stdout
    Hands(redis_client).fetch().settle(lambda one: ("C", 1))
    result = cli("cancel", waiting, "--json")
    assert (result.exit_code, json.loads(result.stdout)["outcome"]) == (1, "too_late")
    assert cli("cancel", NOWHERE).exit_code == 1


# ------------------------------------------------------------------ dead letters


@pytest.fixture
def dead(cli: Cli, redis_client: redis.Redis) -> list[str]:
    """Three dead jobs: A, A, B."""
    names = []
    for kind in ("A", "A", "B"):
        names.append(cli.json("submit", kind, '{"n": 1}')["id"])
        bury(redis_client)
    return names


def test_dlq_list(cli: Cli, dead: list[str]) -> None:
    told = cli.json("dlq", "list")
    assert {one["id"] for one in told} == set(dead)
    assert list(told[0]) == ["id", "type", "lane", "reason", "error", "attempts", "crashes", "died_at"]
    assert [one["id"] for one in cli.json("dlq", "list", "--type", "B")] == [dead[2]]
    assert cli.json("dlq", "list", "--reason", "crash") == []
    limited = cli("dlq", "list", "--limit", "2")
    assert len(limited.stdout.splitlines()) == 3 and "and more" in limited.stderr
    assert "ValueError: no good" in limited.stdout
    assert len(cli.json("dlq", "list", "--limit", "0")) == 3
    assert "no dead jobs that match" in cli("dlq", "list", "--type", "C").stdout


def test_dlq_show(cli: Cli, dead: list[str]) -> None:
    assert cli.json("dlq", "show", dead[0])["payload"] == {"n": 1}
    assert 'payload   {"n": 1}' in cli("dlq", "show", dead[0]).stdout
    assert "is not in the dead-letter queue" in cli.fails(1, "dlq", "show", NOWHERE)


def test_status_shows_dead_letters_by_error(cli: Cli, dead: list[str]) -> None:
    said = cli("status").stdout
    assert re.search(r"(?m)^dead +type +reason +error$", said), said
    assert re.search(r"(?m)^ *2 +A +failed +ValueError: no good$", said), said
    assert re.search(r"(?m)^ *1 +B +failed +ValueError: no good$", said), said
    cli("dlq", "purge", "--all", "--yes")
    assert "no good" not in cli("status").stdout


def test_dlq_replay_by_id(cli: Cli, dead: list[str]) -> None:
    result = cli("dlq", "replay", dead[0], NOWHERE)
    assert (result.exit_code, result.stdout) == (1, "1 replayed\n")
    assert f"{NOWHERE}: not in the dead-letter queue" in result.stderr
    assert cli.json("job", dead[0])["status"] == "queued"
    assert cli.json("dlq", "replay", dead[1]) == {"replayed": 1, "missing": [], "damaged": [], "unknown": []}


def test_dlq_replay_of_all_that_match(cli: Cli, dead: list[str]) -> None:
    assert cli.json("dlq", "replay", "--all", "--type", "A", "--yes")["replayed"] == 2
    status = cli.json("status")
    assert (status["dead"], status["lanes"]["normal"]["queued"]) == (1, 2)


def test_dlq_purge(cli: Cli, dead: list[str]) -> None:
    assert cli.json("dlq", "purge", dead[0]) == {"purged": 1}
    assert cli("dlq", "purge", dead[0]).exit_code == 1
    assert cli("dlq", "purge", "--all", "--yes").stdout == "2 purged\n"
    assert cli.json("status")["dead"] == 0


@pytest.mark.parametrize("verb", ["replay", "purge"])
def test_all_of_them_only_if_that_was_meant(cli: Cli, dead: list[str], verb: str) -> None:
    assert "add --yes" in cli.fails(2, "dlq", verb, "--all")
    assert "--all" in cli.fails(2, "dlq", verb)
    assert "not both" in cli.fails(2, "dlq", verb, dead[0], "--all")
    assert "not both" in cli.fails(2, "dlq", verb, dead[0], "--type", "A")
    assert "not a job id" in cli.fails(2, "dlq", verb, "x")
    assert cli.json("status")["dead"] == 3


# ------------------------------------------------------------------ lanes


def test_pause_and_resume(cli: Cli, redis_client: redis.Redis) -> None:
    assert cli("pause", "LOW").exit_code == 0
    assert redis_client.smembers(KEYS.paused) == {b"low"}
    assert cli("resume", "low").exit_code == 0
    assert redis_client.smembers(KEYS.paused) == set()
    assert "no lane 'x'" in cli.fails(2, "pause", "x")


# ------------------------------------------------------------------ what is wrong


def test_redis_is_not_there(cli: Cli) -> None:
    assert "cannot be reached" in cli.fails(1, "status", "--redis", "redis://127.0.0.1:1")
    assert "cannot be reached" in cli.fails(1, "submit", "A", TQE_REDIS_URL="unix:///nowhere/redis.sock")


def test_a_wrong_password(cli: Cli, make_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    server = make_redis()
    with server.client() as client:
        client.config_set("requirepass", "secret")
    said = cli.fails(1, "status", "--redis", f"unix://:wrong@{server.socket}")
    assert "refuses the login" in said and "wrong" not in said


def test_an_evicting_policy_is_refused(cli: Cli, redis_client: redis.Redis) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    assert "CONFIG SET maxmemory-policy noeviction" in cli.fails(1, "submit", "A")


def test_a_read_only_replica_is_refused(cli: Cli, make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis(replicaof="127.0.0.1 1")
    assert "read-only replica" in cli.fails(1, "status", "--redis", server.url)


def test_a_folder_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = cli.fails(1, "status", TQE_REDIS_URL="", TQE_DATA_DIR=str(tmp_path / "file" / "below"))
    assert "choose a folder that you may write with TQE_DATA_DIR" in said


def test_settings_are_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    assert "TQE_LANE, which is not a setting" in cli.fails(2, "status", TQE_LANE="x")
    assert "sets namespace to 'a b'" in cli.fails(2, "status", "--namespace", "a b")
    assert "sets redis_url to 'http://x'" in cli.fails(2, "status", "--redis", "http://x")
    (tmp_path / "tqe.toml").write_text("lease = 5\n")
    assert "tqe.toml sets lease" in cli.fails(2, "status")


def test_options_win_over_the_environment(cli: Cli, redis_server: RedisServer) -> None:
    assert cli("status", "--redis", redis_server.url, TQE_REDIS_URL="redis://127.0.0.1:1").exit_code == 0
    cli.json("submit", "A", "--namespace", "other")
    assert cli.json("status")["totals"]["submitted"] == 0
    assert cli.json("status", TQE_NAMESPACE="other")["totals"]["submitted"] == 1


# ------------------------------------------------------------------ doctor


def checks(cli: Cli, code: int, *args: str) -> dict[str, tuple[str, str]]:
    """By check: its level and text."""
    result = cli("doctor", "--json", *args)
    assert result.exit_code == code, result.output
    told = json.loads(result.stdout)
    assert told["ok"] is (code == 0)
    return {one["check"]: (one["level"], f"{one['text']} {one['advice']}") for one in told["checks"]}


def test_a_healthy_queue(cli: Cli, redis_client: redis.Redis) -> None:
    publish(redis_client, lanes=["high", "normal", "low"])
    found = checks(cli, 0)
    for name in ("version", "extension", "limits", "redis", "persistence", "clock", "lanes", "workers"):
        assert found[name][0] == "ok", (name, found[name])
    assert "all is well" in cli("doctor").stdout


def test_jobs_without_workers(cli: Cli) -> None:
    cli.json("submit", "A")
    found = checks(cli, 1)
    assert found["workers"][0] == "warning"
    assert found["lane"][1].startswith("lane normal: 1 waiting job, the oldest for ")
    assert "something is wrong" in cli("doctor").stdout


def test_a_lane_that_no_worker_serves(cli: Cli, redis_client: redis.Redis) -> None:
    publish(redis_client, lanes=["high"])
    with Client(Settings(redis_url=cli.env["TQE_REDIS_URL"], lanes=("bulk",), default_lane="bulk")) as client:
        client.submit("A", {})
    level, text = checks(cli, 1)["lane"]
    assert level == "warning" and "lane bulk: 1 waiting job" in text and "no worker serves it" in text
    publish(redis_client, lanes=["high", "bulk"])
    assert checks(cli, 0)["lane"][0] == "ok"


def test_a_lane_that_is_paused_is_a_note(cli: Cli, redis_client: redis.Redis) -> None:
    publish(redis_client, lanes=["high"])
    cli.json("submit", "A", "--priority", "low")
    cli("pause", "low")
    level, text = checks(cli, 0)["lane"]
    assert level == "note" and "tqe resume low" in text


def test_jobs_that_have_waited_for_long(
    cli: Cli, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqe.cli import doctor

    publish(redis_client, lanes=["low"])
    cli.json("submit", "A", "--priority", "low")
    wall_ms = doctor.clock.wall_ms
    monkeypatch.setattr(doctor.clock, "wall_ms", lambda: wall_ms() + 301_000)
    assert checks(cli, 0)["lane"][0] == "note"
    monkeypatch.setattr(doctor.clock, "wall_ms", lambda: wall_ms() + 901_000)
    level, text = checks(cli, 1)["lane"]
    assert level == "warning" and "lane_weights" in text


def test_what_was_put_aside(cli: Cli, redis_client: redis.Redis) -> None:
    redis_client.rpush(KEYS.quarantine, b"x")
    redis_client.rpush(KEYS.parked, b"y", b"z")
    found = checks(cli, 1)
    assert "1 damaged frame put aside" in found["quarantine"][1]
    assert "2 frames of another version" in found["parked"][1]


def test_dead_jobs_are_a_note(cli: Cli, dead: list[str]) -> None:
    assert checks(cli, 0)["dead"] == ("note", "3 dead jobs, of 1,000,000 that are kept see `tqe dlq list`")


def test_a_redis_that_must_not_be_used(cli: Cli, redis_client: redis.Redis) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    level, text = checks(cli, 1)["redis"]
    assert level == "error" and "noeviction" in text
    level, text = checks(cli, 1, "--redis", "redis://127.0.0.1:1")["redis"]
    assert level == "error" and "cannot be reached" in text


def test_a_redis_without_an_append_only_file(cli: Cli, make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis(appendonly="no")
    found = checks(cli, 1, "--redis", server.url)
    assert found["aof"][0] == "warning" and "persistence" not in found


def test_a_clock_that_is_off(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from tqe.cli import doctor

    wall_us = doctor.clock.wall_us
    monkeypatch.setattr(doctor.clock, "wall_us", lambda: wall_us() + 5_000_000)
    level, text = checks(cli, 1)["clock"]
    assert level == "warning" and "behind ours" in text


def test_a_missing_extension_and_few_files(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from tqe.cli import doctor

    monkeypatch.setattr(doctor.codec, "BACKEND", "pure")
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (64, 4096))
    found = checks(cli, 1)
    assert found["extension"][0] == "error"
    assert found["limits"][0] == "warning" and "ulimit -n" in found["limits"][1]
