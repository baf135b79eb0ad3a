"""`tqe ml` against a real Redis: from captured runs to a published version and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.ml.conftest import AT
from tests.ml.made import trace as trace_of
from tests.ml.test_traces import lines
from tests.support.cli import Cli
from tests.support.redis_server import RedisServer
from tqe.board.board import Board
from tqe.cli.learning import Queue, publish
from tqe.cli.predictor import ModelPredictor
from tqe.errors import QueueFull
from tqe.ml import ModelError, evaluate, trainer
from tqe.ml.order import Bound
from tqe.store import learning
from tqe.store.call import SyncDoor, connect
from tqe.store.housekeeping import ask
from tqe.store.keys import Keys
from tqe.store.learning import Files, Published
from tqe.store.model import order_command, read_order
from tqe.worker.admission import Admission
from tqe.worker.ordering import Ordering

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


@pytest.mark.parametrize(("mode", "policy"), [("bounded", "bounded"), ("sjf", "sjf_model")])
def test_the_engine_boosts_by_the_rule_that_was_evaluated(
    door: SyncDoor, tmp_path: Path, mode: str, policy: str
) -> None:
    """What is published, read by a worker, gives each prediction the boost that `tqe ml evaluate` replays."""
    trace, bound_s = trace_of(900), 60.0
    path, manifest = trainer.publish(trace, tmp_path, servers=4, trained_at=AT)
    publish(Queue(door, KEYS), path, manifest)
    learning.set_mode(door, KEYS, ["low"], mode)
    door.send([("HSET", KEYS.model, "bound_us", int(bound_s * 1e6))])
    order = read_order(ask(door, order_command(KEYS, ["low"]))[0], ["low"])
    replays = evaluate._Replays(trace, 600, trainer.judge(trace.part(0, 600), servers=4), 4)
    replayed: Any = replays._policy(policy, bound_s, 0.9)
    if mode == "bounded":
        replayed._bound = Bound(factor=1.0, wait_s=bound_s, prior_jobs=math.inf)
    replayed._scale_s *= manifest.mean_s / replays._judged.mean_s  # it learnt from a part
    worker = Ordering(
        ModelPredictor(tmp_path, library=False), Board(1).slots[0], {}, Admission({}, quantum_ns=1), 1
    )
    worker.follow(order)
    for share in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0, 25.0):
        predicted_s = share * manifest.mean_s
        replayed._predict = lambda job, now_s, p=predicted_s: p
        ours_us = worker._boost(worker._lanes["low"], predicted_s, order.scale_of("low"))
        assert ours_us / 1e6 == pytest.approx(-replayed.score(0, 0.0), rel=1e-3, abs=2e-6)
        if ours_us:
            found_s = worker.predicted_s("low", ours_us)
            assert found_s == pytest.approx(predicted_s, rel=1e-2, abs=1e-2 * manifest.mean_s)


def test_servers_are_those_that_live_unless_one_says_otherwise(
    cli: Cli, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def judge(trace: Any, *, servers: int) -> Any:
        asked.append(servers)
        raise ModelError("enough")

    monkeypatch.setattr(trainer, "judge", judge)
    capture(redis_client, 10)
    seconds, _ = redis_client.time()
    redis_client.zadd(KEYS.incarnations, {"dead": (seconds - 9) * 1000})
    cli.fails(1, "ml", "train")
    redis_client.zadd(KEYS.incarnations, {name: (seconds + 90) * 1000 for name in ("a", "b", "c")})
    cli.fails(1, "ml", "train")
    cli.fails(1, "ml", "train", "--servers", "5")
    assert asked == [8, 3, 5]
