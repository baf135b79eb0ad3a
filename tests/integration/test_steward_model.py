"""The model duty: a version's way to this host, refusals, deaths, the watch, trainings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.fake_clock import FakeClock
from tests.support.housework import Scene
from tests.support.redis_server import RedisServer
from tqe.board import layout
from tqe.errors import RedisUnavailable
from tqe.steward.model import ModelDuty
from tqe.steward.recovery import Recovery
from tqe.store import learning
from tqe.store.learning import Files, ModelState, Published


@dataclass
class Verdict:
    rung: str
    changed: bool = True
    rank_correlation: float = 0.0
    regret: float = 1.0


@dataclass
class Models:
    """A folder that does as it is told."""

    answers: dict[str, tuple[str, str]] = field(default_factory=dict)
    installed: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    judged: list[dict[str, Any]] = field(default_factory=list)
    verdict: Verdict | None = None
    trainings: list[int] = field(default_factory=list)
    ended: str | None = None
    training: bool = False
    pending: Future[tuple[str, str]] | None = None

    def has(self, version: str) -> bool:
        return version in self.installed

    def install(self, version: str, files: Files) -> Future[tuple[str, str]]:
        self.asked.append(version)
        if self.pending is not None:
            return self.pending
        done: Future[tuple[str, str]] = Future()
        answer = self.answers.get(version, ("", ""))
        if not answer[0]:
            self.installed.append(version)
        done.set_result(answer)
        return done

    def watch(self, version: str, rung: str) -> Models:
        self.judged.append({"watch": version, "rung": rung})
        return self

    def completed(self, **run: Any) -> Verdict | None:
        self.judged.append(run)
        return self.verdict

    def train(self, *, servers: int) -> None:
        self.trainings.append(servers)
        self.training = True

    def trained(self) -> str | None:
        told, self.ended = self.ended, None
        if told is not None:
            self.training = False
        return told

    def close(self) -> None: ...


class Host(Scene):
    def __init__(self, server: RedisServer, clock: FakeClock, **settings: Any) -> None:
        super().__init__(server, clock, **settings)
        self.models = Models()
        self.duty = ModelDuty(self.context, self.models)

    @property
    def word(self) -> int:
        return self.board.get(layout.H_MODEL)

    def state(self) -> ModelState:
        return learning.state(self.context.door, self.keys)

    def publish(self, number: int, *, chosen: str = "model", trained_at: str = "") -> None:
        made = Published(
            version=f"v{number}",
            sha256=f"{number:08x}" + "0" * 56,
            bound_us=1000 * number,
            mean_us=7,
            trained_at=trained_at,
            chosen=chosen,
            rung="model",
        )
        files = Files(manifest=b"{}", history=b"h", model=b"m")
        learning.publish(self.context.door, self.keys, made, files)

    def settle(self) -> None:
        for _ in range(4):
            self.duty.run_once()

    def trace(self, **run: Any) -> None:
        told = {"version": "v1", "outcome": "done", "run_us": 1000, "model_s": 0.1, "mean_s": 0.2, **run}
        command = learning.add_trace(self.keys, json.dumps(told).encode(), 1000)
        self.context.door.send([command])


@pytest.fixture
def host(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Host]:
    made = Host(redis_server, fake_clock, learn=True, learn_jobs=100, learn_every_s=60)
    yield made
    made.close()


def test_a_version_is_told_only_after_it_was_vetted(host: Host) -> None:
    host.settle()
    before = host.word
    host.models.pending = Future()
    host.publish(1)
    host.settle()
    assert host.models.asked == ["v1"] and host.word == before and not host.models.judged
    host.models.installed.append("v1")
    host.models.pending.set_result(("", ""))
    host.settle()
    assert host.word == before + 1
    host.settle()
    assert host.word == before + 1 and host.models.asked == ["v1"]
    assert host.models.judged == [{"watch": "v1", "rung": "model"}]  # once, and only now


def test_modes_and_the_rung_are_told(host: Host) -> None:
    host.publish(1)
    host.settle()
    before = host.word
    learning.set_mode(host.context.door, host.keys, ["low"], "sjf")
    host.settle()
    assert host.word == before + 1
    learning.set_rung(host.context.door, host.keys, "v1", "mean")
    host.settle()
    assert host.word == before + 2


def test_a_refused_version_is_withdrawn_and_never_tried_again(host: Host) -> None:
    host.publish(1)
    host.settle()
    host.models.answers["v2"] = ("the canary was killed by signal 11", "model")
    host.publish(2)
    host.settle()
    state = host.state()
    assert state.version == "v1" and state.bound_us == 1000 and state.rung == "model"
    assert "signal 11" in state.refused["00000002" + "0" * 56]
    host.publish(2)
    host.settle()
    assert host.state().version == "v1" and host.models.asked == ["v1", "v2"]


def test_where_none_is_left_lanes_are_fifo(host: Host) -> None:
    host.models.answers["v1"] = ("damaged", "version")
    host.publish(1)
    host.settle()
    state = host.state()
    assert (state.version, state.sha256, state.rung, state.bound_us) == ("", "", "fifo", 0)


def test_what_only_this_host_cannot_use_stays_for_the_others(host: Host) -> None:
    host.models.answers["v1"] = ("the model is of format 2.1", "host")
    host.publish(1)
    host.settle()
    host.settle()
    assert host.state().version == "v1" and host.models.asked == ["v1"] and host.state().refused == {}


def test_what_a_host_lacked_may_be_there_a_minute_later(host: Host) -> None:
    host.models.answers["v1"] = ("the canary could not be started: Cannot allocate memory", "host")
    host.publish(1)
    host.settle()
    host.models.answers.clear()
    host.clock.advance(ms=61_000)
    host.settle()
    assert host.models.asked == ["v1", "v1"] and host.models.has("v1")


def test_a_death_is_not_forgotten_where_redis_cannot_be_asked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.publish(1)
    host.settle()
    host.context.scoring_deaths += [77, 1]

    def away(*_: Any) -> None:
        raise RedisUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(learning, "state", away)
        with pytest.raises(RedisUnavailable):
            host.duty.run_once()
    host.settle()
    assert host.state().bans == ({"00000001" + "0" * 56: 1}) and host.context.scoring_deaths == []


def test_a_death_of_which_redis_may_have_heard_is_not_told_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.publish(1)
    host.settle()
    host.context.scoring_deaths += [1]
    add = learning.add_death

    def lost(*given: Any) -> None:
        add(*given)
        raise RedisUnavailable("no reply")

    with monkeypatch.context() as patch:
        patch.setattr(learning, "add_death", lost)
        with pytest.raises(RedisUnavailable):
            host.duty.run_once()
    host.settle()
    assert host.state().bans == ({"00000001" + "0" * 56: 1})


def test_two_workers_that_die_while_scoring_ban_the_model(host: Host) -> None:
    host.publish(1)
    host.publish(2)
    host.settle()
    recovery = Recovery(host.context)
    for death in (1, 2):
        worker = host.worker(death)
        worker.view.set(layout.C_SCORING, 2)  # the first eight digits of its hash
        worker.dies(signal=11)
        recovery.run_once()
        host.settle()
        assert host.state().version == ("v2" if death == 1 else "v1")
    assert "2 workers died" in host.state().refused["00000002" + "0" * 56]


def test_a_death_elsewhere_or_of_our_own_hand_bans_nothing(host: Host) -> None:
    host.publish(1)
    host.settle()
    recovery = Recovery(host.context)
    for number, word in enumerate((0, 1, 77)):
        worker = host.worker(number)
        worker.view.set(layout.C_SCORING, word)
        worker.dies()
        recovery.run_once()
    worker = host.worker(9)
    worker.view.set(layout.C_SCORING, 1)
    worker.view.set(layout.C_KILL_KIND, layout.KILL_DRAIN)
    worker.dies()
    recovery.run_once()
    host.settle()
    assert host.state().bans == ({"00000001" + "0" * 56: 1})


def test_the_watch_sees_what_this_version_predicted_and_moves_the_rung(host: Host) -> None:
    host.publish(1)
    host.settle()
    host.trace(version="v0")
    host.trace(outcome="failed")
    host.trace(run_us=5000)
    host.context.door.send([learning.add_trace(host.keys, b"no json", 1000)])
    host.settle()
    runs = [run for run in host.models.judged if "duration_s" in run]
    assert runs == [{"model_s": 0.1, "mean_s": 0.2, "duration_s": 0.005}]
    before = host.word
    host.models.verdict = Verdict("mean")
    host.trace()
    host.settle()
    assert host.state().rung == "mean" and host.word == before + 1


def test_a_model_of_last_month_gives_way_to_the_mean(host: Host) -> None:
    host.publish(1, trained_at="1990-01-01T00:00:00+00:00")
    host.settle()
    assert host.state().rung == "mean"


def test_it_trains_when_enough_is_new_and_not_too_often(host: Host) -> None:
    host.settle()
    for _ in range(99):
        host.trace()
    host.settle()
    assert host.models.trainings == []
    host.trace()
    host.settle()
    assert host.models.trainings == [1]
    for _ in range(100):
        host.trace()
    host.models.ended = ""
    host.settle()
    assert host.models.trainings == [1] and not host.models.training
    host.clock.advance(ms=61_000)
    host.settle()
    assert host.models.trainings == [1, 1]


def test_only_one_host_watches_and_trains(host: Host) -> None:
    host.client.set(host.keys.learner, "another")
    host.settle()
    for _ in range(100):
        host.trace()
    host.settle()
    assert host.models.trainings == [] and host.models.judged == []


def test_what_workers_scored_is_added_up(host: Host) -> None:
    worker = host.worker(1)
    host.settle()
    worker.view.add("scored", 5)
    worker.view.put("fallback_slow", 2)
    host.settle()
    worker.view.add("scored", 1)
    host.settle()
    state = host.state()
    assert state.scored == 6 and state.fallbacks == {"slow": 2}
