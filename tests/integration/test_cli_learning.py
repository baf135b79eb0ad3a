"""`tqe ml` against a real Redis: from captured runs to a published version and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis

from tests.ml.test_traces import lines
from tests.support.cli import Cli
from tests.support.redis_server import RedisServer
from tqe.errors import QueueFull
from tqe.store import learning
from tqe.store.call import SyncDoor, connect
from tqe.store.keys import Keys
from tqe.store.learning import Files, Published

KEYS = Keys()


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path) -> Cli:
    return Cli({"TQE_REDIS_URL": redis_server.url, "TQE_DATA_DIR": str(tmp_path), "HOME": str(tmp_path)})


def capture(client: redis.Redis, jobs: int) -> None:
    pipe = client.pipeline()
    for line in lines(jobs):
        pipe.execute_command(*learning.add_trace(KEYS, line, 50_000))
    pipe.execute()


def test_nothing_was_learnt_yet(cli: Cli) -> None:
    said = cli.json("ml", "status")
    assert said["mode"] == {"high": "bounded", "normal": "bounded", "low": "bounded"}
    assert set(said) == {"mode", "rung", "model", "scored", "fallbacks"}
    assert said["rung"] == "fifo" and said["model"] is None
    assert said["scored"] == 0 and said["fallbacks"] == {}
    assert "none was published" in cli("ml", "status").stdout
    assert "no usable job" in cli.fails(1, "ml", "train")
    assert "no run was captured" in cli.fails(1, "ml", "export", "x.csv.gz")
    assert cli("ml", "rollback").exit_code == 1


def test_from_captured_runs_to_a_version_and_back(
    cli: Cli, redis_client: redis.Redis, door: SyncDoor, tmp_path: Path
) -> None:
    capture(redis_client, 2500)
    path = tmp_path / "jobs.csv.gz"
    assert cli.json("ml", "export", str(path))["runs"] == 2500
    schema = str(tmp_path / "schema.json")
    report = cli.json("ml", "evaluate", str(path), "--schema", schema, "--servers", "4", "--loads", "0.9")
    assert report["trace"] == "jobs" and report["loads"]["0.9"]["sjf_model"]["share_of_oracle"] > 0.5
    first = cli.json("ml", "train", "--servers", "4")
    assert first["chosen"] == "model" and first["folder"] is None
    said = cli.json("ml", "status")
    assert said["rung"] == "model"
    assert said["model"] == {name: first[name] for name in ("version", "sha256", "trained_at")}
    held = redis_client.hgetall(KEYS.model)
    version = first["version"].encode()
    assert held[b"bytes:" + version].startswith(b"tree") and held[b"manifest"] == held[b"manifest:" + version]
    assert int(held[b"bound_us"]) == int(first["bound_s"] * 1e6) and int(held[b"mean_us"]) > 0
    answers = cli.json("ml", "simulate", "--servers", "4", "--modes", "fifo,bounded")
    assert answers["servers"][0]["servers"] == 4
    capture(redis_client, 600)
    second = cli.json("ml", "train", "--servers", "4")
    assert second["version"] != first["version"]
    assert cli.json("ml", "rollback") == {"from": second["version"], "to": first["version"]}
    said = cli.json("ml", "status")
    assert said["model"] == {name: first[name] for name in ("version", "sha256", "trained_at")}
    state = learning.state(door, KEYS)
    assert state.previous == second["version"] and state.bound_us == int(first["bound_s"] * 1e6)
    assert learning.traces_held(door, KEYS) == 3100


def test_modes_are_set_by_lane(cli: Cli, redis_client: redis.Redis) -> None:
    assert cli.json("ml", "mode", "LOW", "sjf") == {"low": "sjf"}
    assert cli.json("ml", "mode") == {"high": "bounded", "normal": "bounded", "low": "sjf"}
    assert cli.json("ml", "mode", "high") == {"high": "bounded"}
    assert redis_client.hget(KEYS.model, "mode:low") == b"sjf"
    assert "no lane nope" in cli.fails(2, "ml", "mode", "nope", "sjf")
    assert "is not one of" in cli.fails(2, "ml", "mode", "low", "lifo")


# ------------------------------------------------------------------ the hash


def made(number: int, sha256: str = "") -> Published:
    return Published(
        version=f"v{number}", sha256=sha256, bound_us=number, mean_us=7, trained_at="t", chosen="model",
        rung="model",
    )  # fmt: skip


def files(number: int) -> Files:
    return Files(manifest=b'{"n":%d}' % number, history=b"h%d" % number, model=b"m%d" % number)


@pytest.fixture
def door(redis_server: RedisServer) -> SyncDoor:
    return SyncDoor(connect(redis_server.url))


def test_two_versions_are_kept_and_older_ones_dropped(door: SyncDoor, redis_client: redis.Redis) -> None:
    learning.set_mode(door, KEYS, ["low"], "sjf")
    learning.add_death(door, KEYS, "abc")
    for number in (1, 2, 3):
        learning.publish(door, KEYS, made(number), files(number))
    state = learning.state(door, KEYS)
    assert (state.version, state.previous, state.bound_us) == ("v3", "v2", 3)
    assert state.mode("low") == "sjf" and state.bans == {"abc": 1}
    assert learning.files(door, KEYS, "v1") is None and learning.files(door, KEYS, "v2") == files(2)
    learning.publish(door, KEYS, made(3), files(3))  # again: the one to go back to is still the one before
    assert learning.state(door, KEYS).previous == "v2"
    assert learning.set_rung(door, KEYS, "v3", "mean") and not learning.set_rung(door, KEYS, "v2", "fifo")
    assert learning.state(door, KEYS).rung == "mean"
    assert learning.rollback(door, KEYS) == ("v3", "v2") and learning.state(door, KEYS).rung == "model"


def test_what_stands_there_may_be_written_by_any_hand(door: SyncDoor, redis_client: redis.Redis) -> None:
    redis_client.hset(
        KEYS.model,
        mapping={"bound_us": "much", "mean_us": "-5", "mode:low": "lifo", "rung": "?", "scored": "1e999"},
    )
    state = learning.state(door, KEYS)
    assert (state.bound_us, state.mean_us, state.scored, state.rung) == (0, 0, 0, "fifo")
    assert state.mode("low") == "bounded"


def test_files_that_are_too_large_are_refused(door: SyncDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "FILES_BYTES_MAX", 10)
    with pytest.raises(QueueFull, match="train on fewer jobs"):
        learning.publish(door, KEYS, made(1), files(10**9))
    assert learning.state(door, KEYS).version == ""


def test_traces_are_read_in_pages(door: SyncDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "PAGE", 3)
    for n in range(8):
        door.send([learning.add_trace(KEYS, json.dumps(n).encode(), 100)])
    assert [int(line) for line in learning.traces(door, KEYS)] == list(range(8))
    ids = [name for name, _ in learning.entries(door, KEYS)]
    assert [int(line) for line in learning.traces(door, KEYS, ids[4])] == [5, 6, 7]
    assert [int(line) for line in learning.traces(door, KEYS, limit=4)] == [0, 1, 2, 3]
    assert learning.last_trace(door, KEYS) == ids[-1] and learning.traces_held(door, KEYS) == 8


def test_one_steward_learns(door: SyncDoor, redis_client: redis.Redis) -> None:
    assert learning.hold_learner(door, KEYS, "a", 5_000) and learning.hold_learner(door, KEYS, "a", 60_000)
    assert not learning.hold_learner(door, KEYS, "b", 5_000)
    assert redis_client.pttl(KEYS.learner) > 5_000
    redis_client.delete(KEYS.learner)
    assert learning.hold_learner(door, KEYS, "b", 5_000)
