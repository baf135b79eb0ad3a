"""The failure table of the duration model, each row on real processes: no job lost, no worker dead or hung.

`tqe run` serves a lane in mode `sjf` with a small model; a fault is put in; everything that was submitted
must complete, by the workers that were there before.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.cli import Program
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.cli.learning import Queue
from tqe.client import Client
from tqe.ml import model, traces, trainer
from tqe.ml.model import Manifest
from tqe.ml.train import boost
from tqe.settings import Settings
from tqe.store import learning
from tqe.store.call import SyncDoor, connect
from tqe.store.keys import Keys
from tqe.store.learning import Files, ModelState, Published
from tqe.store.model import RUNG_OF

APP = """
import os, signal, time
from pathlib import Path
from tqe import App
from tqe.ml import score as scoring
from tqe.ml.score import Booster, Scorer

app = App()
here = Path(__file__).parent
if (here / "patient").exists():
    scoring.SLOW_BATCHES_MAX = 10**9
predict, score = Booster.predict, Scorer.score

def slow(self, flat, rows):
    if (here / "slow").exists():
        time.sleep(0.012)
    return predict(self, flat, rows)

def broken(self, jobs):
    if (here / "raise").exists():
        raise ValueError("a defect")
    if (here / "die").exists():
        os.kill(os.getpid(), signal.SIGSEGV)
    return score(self, jobs)

Booster.predict, Scorer.score = slow, broken

@app.task("NAP")
def nap(ms: float, user: str) -> None:
    time.sleep(ms / 1000)

def features(payload):
    if (here / "fatal").exists():
        os._exit(7)
    return {"user": payload["user"], "ms": payload["ms"], "more": 1 / payload["ms"]}

@app.task("ODD", features=features)
def odd(ms: float, user: str) -> None:
    time.sleep(ms / 1000)
"""
# Seen by every python that starts in the folder: makes a canary hang where the test asks for it.
SITE = """
import sys, time
from pathlib import Path
if "tqe.ml.canary" in " ".join(sys.orig_argv) and (Path(__file__).parent / "hang").exists():
    time.sleep(60)
"""
KEYS = Keys()


def one(draw: random.Random) -> tuple[float, str]:
    """How long a job takes, and whose it is: some users' jobs are longer, so that means predict as well."""
    user = draw.choice("abc")
    return round(min(8.0, draw.lognormvariate("abc".index(user) - 1.0, 0.8)), 3), user


def runs(jobs: int = 1500) -> list[dict[str, Any]]:
    """As captured: how long a job takes stands in its payload."""
    draw = random.Random(3)
    found, now_us = [], 1.7e15
    for _ in range(jobs):
        now_us += draw.expovariate(1.0) * (20_000 if draw.random() < 0.05 else 600)
        ms, user = one(draw)
        found.append(
            {
                "type": "NAP", "lane": "normal", "payload_bytes": 30, "attempt": 1, "entered_us": now_us,
                "start_us": now_us, "run_us": ms * 1000, "outcome": "done",
                "fields": {"ms": ms, "user": user},
            }
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Made:
    manifest: Manifest
    files: Files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Made:
    trace = traces.trace_of("t", runs())
    at = datetime.now(UTC).replace(microsecond=0)
    folder, manifest = trainer.publish(trace, tmp_path_factory.mktemp("m"), servers=2, trained_at=at)
    assert manifest.chosen == "model", manifest.gate
    read = model.read(folder)
    assert read.model is not None
    files = Files(
        manifest=(folder / model.MANIFEST).read_bytes(),
        history=(folder / model.HISTORY).read_bytes(),
        model=read.model,
    )
    return Made(manifest, files)


def other(made: Made, number: int, text: bytes | None = None, **changes: Any) -> Made:
    """Another version of the same: with another text and its right hash, or with changes of the manifest."""
    at = datetime.fromisoformat(made.manifest.trained_at) + timedelta(seconds=number)
    text = made.files.model if text is None else text
    assert text is not None
    manifest = replace(
        made.manifest,
        version=f"{at:%Y%m%dT%H%M%S}-{number:012x}",
        sha256=hashlib.sha256(text).hexdigest(),
    )
    told = json.dumps(manifest.dump() | changes).encode()
    return Made(manifest, replace(made.files, manifest=told, model=text))


@dataclass
class Scene:
    """A `tqe run` of two workers, and a client."""

    folder: Path
    server: RedisServer
    client: Client
    redis: redis.Redis
    door: SyncDoor
    program: Program | None = None
    submitted: int = 0
    users: str = ""  # whose jobs all are; '' leaves them to chance

    def start(self, *, good: Made | None = None, **env: str) -> None:
        if good is not None:
            self.publish(good)
        learning.set_mode(self.door, KEYS, ["normal"], "sjf")
        told = {
            "TQE_REDIS_URL": self.server.url,
            "TQE_DATA_DIR": str(self.folder / "data"),
            "PYTHONPATH": str(self.folder),
            **env,
        }
        self.program = Program(self.folder, told, ("run", "jobs:app", "--procs", "2", "--no-pin"))
        wait_until(lambda: len(self.pids()) == 2, 20, "two workers")
        if good is not None:
            self.says(f"model {good.manifest.version} is installed")

    def publish(self, made: Made) -> None:
        manifest = made.manifest
        learning.publish(
            self.door,
            KEYS,
            Published(
                version=manifest.version,
                sha256=manifest.sha256,
                bound_us=200_000,
                mean_us=2_000,
                trained_at=manifest.trained_at,
                chosen=manifest.chosen,
                rung=RUNG_OF[manifest.chosen],
            ),
            made.files,
        )

    def flag(self, name: str, on: bool = True) -> None:
        path = self.folder / name
        path.touch() if on else path.unlink()

    def says(self, words: str) -> str:
        assert self.program is not None
        return self.program.says(words, 15)

    def pids(self) -> set[int]:
        return {worker.pid for worker in self.client.workers()}

    def state(self) -> ModelState:
        return learning.state(self.door, KEYS)

    def work(self, jobs: int = 120, kind: str = "NAP", ms: Callable[[int], float] | None = None) -> None:
        """A backlog of jobs of different length, and its end."""
        draw = random.Random(self.submitted)
        drawn = [one(draw) for _ in range(jobs)]
        payloads = [
            {"ms": ms(k) if ms else own, "user": self.users or user} for k, (own, user) in enumerate(drawn)
        ]
        self.client.submit_many([(kind, payload) for payload in payloads])
        self.submitted += jobs
        self.completed()

    def work_until(self, reached: Callable[[], bool], what: str) -> None:
        """Backlog after backlog, until it is so."""
        end = time.monotonic() + 40
        while not reached():
            assert time.monotonic() < end, f"not reached: {what}; {self.state()}"
            self.work(100)

    def completed(self) -> None:
        def done() -> bool:
            return self.client.status().totals.get("completed", 0) >= self.submitted

        wait_until(done, 20, "everything that was submitted has completed")

    def scored(self, more_than: int) -> int:
        wait_until(lambda: self.state().scored > more_than, 10, "the workers score")
        return self.state().scored

    def same(self, pids: set[int]) -> None:
        wait_until(lambda: self.pids() == pids, 6, "the workers that were there before")

    def close(self, *, deaths: int = 0) -> None:
        """Nothing is lost, and only those died that had to."""
        assert self.program is not None
        status = self.client.status()
        assert (status.totals["submitted"], status.totals["completed"]) == (self.submitted, self.submitted)
        assert status.dead == 0 and status.scheduled == 0
        self.program.signal(signal.SIGTERM)
        assert self.program.ended() == 0, self.program.text()
        text = self.program.text()
        assert len(re.findall("ended unexpectedly|loop stood still", text)) == deaths, text
        assert "Traceback" not in text, text


@pytest.fixture
def scene(redis_server: RedisServer, tmp_path: Path) -> Iterator[Scene]:
    (tmp_path / "jobs.py").write_text(APP)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    client = Client(Settings(redis_url=redis_server.url))
    door = SyncDoor(connect(redis_server.url))
    made = Scene(tmp_path, redis_server, client, redis_server.client(), door)
    yield made
    if made.program is not None:
        print(made.program.text())
        made.program.close()
    client.close()
    made.redis.close()


@pytest.mark.parametrize("library", ["none", "unloadable"])
def test_without_the_library_means_predict(scene: Scene, good: Made, library: str) -> None:
    """LightGBM is not installed; or it is, and the system has no libgomp: its library cannot be opened."""
    (scene.folder / "lightgbm" / "lib").mkdir(parents=True)
    (scene.folder / "lightgbm" / "__init__.py").touch()
    if library == "unloadable":
        (scene.folder / "lightgbm" / "lib" / "lib_lightgbm.so").write_text("not a library")
    scene.start(good=good)
    scene.work()
    scene.scored(0)
    text = scene.says("durations are predicted by means of past jobs, not by a model")
    assert text.count("predicted by means") == 1
    wait_until(lambda: scene.state().fallbacks.get("library", 0) > 0, 5, "the metric")
    scene.close()


def test_no_bad_version_reaches_a_worker(scene: Scene, good: Made) -> None:
    """Missing, empty, foreign, truncated and damaged files; other columns; a canary that dies or hangs."""
    scene.start(good=good)
    pids = scene.pids()
    text = good.files.model
    assert text is not None
    flipped = text[:2000] + bytes([text[2000] ^ 1]) + text[2001:]
    bad = {
        "missing": replace(other(good, 1), files=replace(other(good, 1).files, model=None)),
        "empty": replace(other(good, 2), files=replace(other(good, 2).files, model=b"")),
        "truncated": other(good, 3, text + b"\n"),
        "flipped": other(good, 4, text + b"\n\n"),
        "manifest": replace(other(good, 5), files=replace(other(good, 5).files, manifest=b'{"format": 1}')),
        "foreign": other(good, 6, b"tree\nversion=v4\nnum_class=1\n\nend of trees\n"),
        "cut": other(good, 7, text[: len(text) // 2]),
    }
    for name, changed in (("truncated", text[:500]), ("flipped", flipped)):
        bad[name] = replace(bad[name], files=replace(bad[name].files, model=changed))
    for made in bad.values():
        scene.publish(made)
        scene.says(f"model {made.manifest.version} is refused")
        wait_until(lambda: scene.state().version == good.manifest.version, 5, "the last good one orders")
    columns = list(reversed(good.manifest.columns))
    turned = other(good, 8, text + b"\n\n\n", columns=columns)
    scene.publish(turned)
    scene.says(f"model {turned.manifest.version} cannot be used on this host")
    scene.work()
    scene.flag("hang")
    hangs = other(good, 9, text + b"\n\n\n\n")
    scene.publish(hangs)
    scene.work(60)  # while the canary hangs
    scene.says(f"model {hangs.manifest.version} is refused")
    scene.same(pids)
    assert "had not finished after 2 s" in scene.state().refused[hangs.manifest.sha256]
    scene.publish(hangs)
    wait_until(lambda: scene.state().version != hangs.manifest.version, 5, "it is not tried again")
    scene.close()


def test_what_is_no_prediction_costs_a_job_its_place_and_nothing_else(scene: Scene, good: Made) -> None:
    """Infinite predictions; a task's own column function that raises, until it is turned off."""
    assert good.files.model is not None
    # Without the sizes of its trees, which hold no longer: the library reads one after the other then.
    text = re.sub(rb"(?m)^tree_sizes=.*\n", b"", good.files.model)
    text = re.sub(rb"(?m)^leaf_value=.*$", _infinite, text)
    endless = other(good, 1, text, reference_ratios=[float("inf")] * len(good.manifest.reference_rows))
    scene.start(good=endless)
    pids = scene.pids()
    scene.work_until(lambda: scene.state().fallbacks.get("value", 0) > 0, "they are counted")
    scene.publish(other(good, 2))
    scene.says(f"model {other(good, 2).manifest.version} is installed")
    scene.work(kind="ODD", ms=lambda k: 0.0 if k % 2 else 2.0)
    scene.work_until(lambda: scene.state().fallbacks.get("columns", 0) > 0, "they are counted")
    scene.work()
    scene.same(pids)
    scene.close()


def _infinite(line: re.Match[bytes]) -> bytes:
    return b"leaf_value=" + b" ".join(b"1e300" for _ in line[0].split())


@pytest.mark.parametrize(("flag", "reason"), [("slow", "slow"), ("raise", "error")])
def test_a_slow_or_raising_predictor_is_left_alone_for_a_minute(
    scene: Scene, good: Made, flag: str, reason: str
) -> None:
    scene.start(good=good)
    pids = scene.pids()
    scene.work_until(lambda: scene.state().scored > 0, "the model is in use")
    scene.flag(flag)
    scene.work_until(lambda: scene.state().fallbacks.get(reason, 0) > 0, "the breaker opens")
    scene.work()
    scene.same(pids)
    scene.close()


def test_the_second_worker_that_dies_while_scoring_ends_the_model(scene: Scene, good: Made) -> None:
    scene.start(good=good)
    assert good.files.model is not None
    first = other(good, 1, good.files.model + b"\n")
    scene.publish(first)
    scene.says(f"model {first.manifest.version} is installed")
    scene.work()
    scene.flag("die")
    scene.client.submit_many([("NAP", {"ms": 1.0 + k % 3, "user": "a"}) for k in range(100)])
    scene.submitted += 100
    scene.says("death 2")
    scene.flag("die", False)
    wait_until(lambda: first.manifest.sha256 in scene.state().refused, 10, "it is banned")
    wait_until(lambda: scene.state().version == good.manifest.version, 10, "the one before orders")
    scene.completed()
    assert scene.program is not None
    scene.close(deaths=len(re.findall("ended unexpectedly", scene.program.text())))


@pytest.mark.parametrize("mode", ["fifo", "sjf"])
def test_a_features_function_that_kills_is_turned_off_and_no_model_pays(
    scene: Scene, good: Made, mode: str
) -> None:
    """Asked by capture, or by a lane that is ordered by a mean, which has no hash to ban."""
    manifest = replace(other(good, 1).manifest, sha256="", chosen="hierarchical_mean")
    files = replace(good.files, model=None, manifest=json.dumps(manifest.dump()).encode())
    scene.start(good=Made(manifest, files))
    learning.set_mode(scene.door, KEYS, ["normal"], mode)
    scene.work()
    scene.flag("fatal")
    scene.work(40, kind="ODD", ms=lambda k: 1.0 + k % 9)  # and it stays fatal: all of them complete
    text = scene.says("it is not called any more on this host")
    assert "died in the features function of ODD" in text
    state = scene.state()
    assert state.refused == {} and state.bans == {} and state.version == manifest.version
    scene.close(deaths=len(re.findall("ended unexpectedly", scene.program.text())))  # type: ignore[union-attr]


def test_connections_that_break_while_scores_are_written_lose_nothing(scene: Scene, good: Made) -> None:
    scene.start(good=good)
    pids = scene.pids()
    scene.client.submit_many(
        [("NAP", {"ms": 0.5 + (k * 7 % 10) / 2, "user": "abc"[k % 3]}) for k in range(500)]
    )
    scene.submitted += 500
    for _ in range(5):
        before = scene.state().scored
        scene.redis.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda b=before: scene.state().scored > b or _done(scene), 10, "they go on")  # type: ignore[misc]
    scene.completed()
    scene.same(pids)
    scene.close()


@pytest.mark.parametrize(
    ("setting", "value"), [("maxmemory", "1"), ("min-replicas-to-write", "1")], ids=["full", "refuses"]
)
def test_a_redis_that_takes_no_writes_while_scores_are_given_back_loses_nothing(
    scene: Scene, good: Made, setting: str, value: str
) -> None:
    """A full one takes what ends and gives back all the same; one that refuses everything is waited for."""
    scene.start(good=good)
    pids = scene.pids()
    scene.client.submit_many(
        [("NAP", {"ms": 0.5 + (k * 7 % 10) / 2, "user": "abc"[k % 3]}) for k in range(800)]
    )
    scene.submitted += 800
    scene.scored(0)
    before = scene.client.status().totals.get("completed", 0)
    scene.redis.config_set(setting, value)
    try:
        if setting == "maxmemory":
            wait_until(lambda: scene.client.status().totals["completed"] > before + 100, 10, "jobs end")
        else:
            wait_until(lambda: "errorstat_NOREPLICAS" in scene.redis.info("errorstats"), 10, "refusals")
    finally:
        scene.redis.config_set(setting, "0")
    scene.completed()
    scene.same(pids)
    scene.work()
    scene.close()


def _done(scene: Scene) -> bool:
    return scene.client.status().totals.get("completed", 0) >= scene.submitted


def test_a_poisoned_model_gives_way_to_the_mean_and_then_to_fifo(scene: Scene, good: Made) -> None:
    """It passed the gate, by whatever way, and takes the longest for the shortest."""
    trace = traces.trace_of("t", runs())
    judged = trainer.judge(trace, servers=2)
    walk, split = judged.fitted.walk, judged.fitted.split
    turned = [judged.mean_s**2 / seconds for seconds in trace.duration_s]
    text, rounds = boost(walk.rows, walk.means, turned, walk.columns, stop=split.stop, end=split.gate)
    assert rounds
    booster = trainer.Booster(text, walk.columns.width)
    rows, ratios = model.reference(walk.rows[split.gate :], booster, walk.columns)
    rows = [[None if v != v else v for v in row] for row in rows]
    poisoned = other(good, 1, text, reference_rows=rows, reference_ratios=ratios, floor=0.3)
    # On a busy machine the breaker would open first, and leave the watch nothing of the model to judge.
    scene.flag("patient")
    scene.start(good=poisoned)
    scene.work_until(lambda: scene.state().rung != "model", "the watch lowers it")
    assert "now by" in scene.says("now by")
    scene.users = "a"  # means know nothing of these
    scene.work_until(lambda: scene.state().rung == "fifo", "the watch lowers the mean as well")
    scene.work()
    scene.close()


def test_nothing_of_it_is_left_behind(scene: Scene, good: Made) -> None:
    """A second start finds the version in its folder, and no half-written ones."""
    scene.start(good=good)
    scene.work(60)
    scene.close()
    folder = scene.folder / "data" / "models" / "tq"
    assert os.listdir(folder) == [good.manifest.version]
    assert scene.program is not None
    scene.program.close()
    scene.start()
    scene.work(60)
    scene.scored(0)
    assert "cannot be used" not in scene.program.text()
    scene.close()


def test_with_learn_it_trains_and_publishes_by_itself(scene: Scene) -> None:
    """Whatever the gate chooses: on a busy machine these jobs take as long as they please."""
    scene.start(TQE_LEARN="true", TQE_LEARN_JOBS="300")
    pids = scene.pids()
    assert scene.state().version == ""
    scene.work_until(lambda: learning.traces_held(scene.door, KEYS) >= 300, "enough is captured")
    wait_until(lambda: scene.state().version != "", 60, "a version is published")
    scene.says(f"model {scene.state().version} is installed")
    scene.says("a version was trained in the background and published")
    scene.work()
    scene.same(pids)
    scene.close()


def test_the_queue_of_the_command_line_is_the_one_that_stewards_read() -> None:
    assert Queue._fields == ("door", "keys")
