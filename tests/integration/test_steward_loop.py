"""The steward's loop: beats, jitter, failures of one duty, Redis away and back, the stop word, metrics."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.fake_clock import FakeClock
from tests.support.housework import LEASE_MS, Scene, frame
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe import clock
from tqe.board import layout
from tqe.board.board import Board
from tqe.errors import RedisUnavailable
from tqe.settings import Settings
from tqe.steward import steward
from tqe.steward.exporter import TotalsReader
from tqe.steward.steward import JITTER, Steward, make_duties
from tqe.steward.takeback import TakeBack
from tqe.store import housekeeping
from tqe.store.keys import Keys


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


class Spy:
    """A duty that counts and does what it is told."""

    def __init__(self, name: str = "spy", period_s: float = 1.0) -> None:
        self.name = name
        self.period_s = period_s
        self.next_in_s: float | None = None
        self.runs = 0
        self.error: Exception | None = None

    def run_once(self) -> None:
        self.runs += 1
        if self.error is not None:
            raise self.error


def loop(scene: Scene, *duties: Any) -> Steward:
    return Steward(scene.context, duties, clock=scene.clock)


def turns(scene: Scene, steward: Steward, ms: int, step_ms: int = 10) -> None:
    for _ in range(ms // step_ms):
        steward.turn()
        scene.clock.advance(ms=step_ms)


def test_each_duty_runs_by_its_period_with_jitter_that_is_not_zero(scene: Scene) -> None:
    quick, slow = Spy("quick", 0.1), Spy("slow", 1.0)
    turns(scene, loop(scene, quick, slow), 60_000)
    assert 60 <= slow.runs <= 60 / (1 - JITTER) + 1
    assert slow.runs > 61  # on average a tenth earlier
    assert 600 * 0.9 <= quick.runs <= 600 / (1 - JITTER) + 1


def test_a_duty_may_ask_for_its_next_run(scene: Scene) -> None:
    spy = Spy("spy", 10.0)
    spy.next_in_s = 0.05
    turns(scene, loop(scene, spy), 1_000)
    assert spy.runs >= 15


@pytest.mark.parametrize("error", [ValueError("a defect"), RedisUnavailable("away"), KeyError("odd")])
def test_one_duty_that_fails_does_not_stop_the_others(scene: Scene, error: Exception) -> None:
    bad, good = Spy("bad", 1.0), Spy("good", 1.0)
    bad.error = error
    steward = loop(scene, bad, good)
    turns(scene, steward, 20_000)
    assert good.runs >= 20
    assert bad.runs >= 19  # retried with a backoff, never given up
    assert steward.duties()["bad"].failures == bad.runs
    assert steward.redis_up() is not isinstance(error, RedisUnavailable) or good.runs > 0
    bad.error = None
    turns(scene, steward, 2_000)
    assert steward.duties()["bad"].failures < bad.runs


def test_only_an_answer_says_that_redis_is_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most duties ask nothing as long as there is nothing to do."""
    away, quiet = Spy("away", 1.0), Spy("quiet", 0.05)
    away.error = RedisUnavailable("away")
    steward = loop(scene, away, quiet, TakeBack(scene.context))
    turns(scene, steward, 2_000)
    assert quiet.runs > 10 and not steward.redis_up()
    away.error = None
    turns(scene, steward, 2_000)
    assert not steward.redis_up(), "it had nothing to ask"
    monkeypatch.setattr(quiet, "run_once", lambda: housekeeping.ask(scene.context.door, ("PING",)))
    turns(scene, steward, 100)
    assert steward.redis_up()


def test_retries_back_off_but_stay_well_below_a_lease(scene: Scene) -> None:
    bad = Spy("bad", 5.0)
    bad.error = RedisUnavailable("away")
    turns(scene, loop(scene, bad), 10_000)
    assert 10 <= bad.runs <= 25  # 0.1, 0.2, 0.4, 0.8, 1, 1, …: an ordinary period would be two runs


def test_an_embedded_server_that_stays_away_is_asked_back_without_stopping_the_loop(scene: Scene) -> None:
    asked: list[str] = []
    free = threading.Event()

    def revive() -> None:
        asked.append(threading.current_thread().name)
        free.wait(10)
        raise RedisUnavailable("it loads its data")

    bad, good = Spy("bad", 0.1), Spy("good", 0.1)
    bad.error = RedisUnavailable("away")
    steward = Steward(scene.context, [bad, good], clock=scene.clock, revive=revive)
    turns(scene, steward, 100)
    assert asked == []  # a lost connection heals by itself
    turns(scene, steward, 20_000)
    assert asked == ["revive"]  # one at a time
    assert good.runs > 150
    free.set()
    wait_until(
        lambda: threading.active_count() == 1 or "revive" not in [t.name for t in threading.enumerate()]
    )
    turns(scene, steward, 5_000)
    assert len(asked) >= 2


def test_every_turn_beats(scene: Scene) -> None:
    steward = loop(scene, Spy())
    scene.clock.advance(ms=1234)
    steward.turn()
    assert scene.board.get(layout.H_STEWARD_BEAT) == scene.clock.boottime_ns()


def test_every_exchange_with_redis_beats(redis_server: RedisServer) -> None:
    beats: list[int] = []
    door = housekeeping.Door(redis_server.url, timeout_s=1, beat=lambda: beats.append(1))
    with contextlib.closing(door):
        housekeeping.ask(door, ("PING",), ("PING",))
    assert len(beats) == 2


def test_a_redis_that_hangs_costs_one_timeout_at_a_time(make_redis: Callable[..., RedisServer]) -> None:
    """The supervisor kills a steward whose beat is a third of a lease old: each wait has to be shorter."""
    server = make_redis()
    longest: list[int] = [0]
    last = [clock.monotonic_ns()]

    def beat() -> None:
        now = clock.monotonic_ns()
        longest[0] = max(longest[0], now - last[0])
        last[0] = now

    board = Board(2)
    settings = Settings(lease_ms=1_000, procs=1)
    door = steward.open_door(settings, server.url, beat)
    context = steward.Context(settings, board, door, Keys(), "here")
    slot = board.slots[0]
    slot.set(layout.C_STATE, layout.LIVE)
    slot.set(layout.C_PID, os.getpid())
    slot.set(layout.C_BEAT, clock.boottime_ns() + 10**12)
    slot.set_text(layout.C_INCARNATION, "A" * 26)
    runner = Steward(context, make_duties(context, TotalsReader(context)))
    runner.turn()
    server.pause()
    try:
        begun = clock.monotonic_ns()
        while clock.monotonic_ns() - begun < 2_000_000_000:
            beat()
            runner.turn()
    finally:
        server.resume()
    assert not runner.redis_up()
    # a connection that breaks is opened and asked again within one exchange: two waits at most
    assert longest[0] < settings.lease_ms * 1_000_000 / 3

    def back() -> bool:
        runner.turn()
        return runner.redis_up()

    wait_until(back, what="the steward has found Redis again")
    door.close()


def test_it_stops_by_the_boards_word_and_recovers_the_dead_first(redis_server: RedisServer) -> None:
    board = Board(4)
    settings = Settings(lease_ms=LEASE_MS, procs=1)
    keys = Keys()
    with contextlib.closing(redis_server.client()) as client:
        client.zadd(keys.incarnations, {"W" * 26: 2**52})
        one = frame(1)
        client.hset(keys.processing("W" * 26), one[4:45], one)
        slot = board.slots[0]
        slot.set_text(layout.C_INCARNATION, "W" * 26)
        slot.set(layout.C_STATE, layout.DEAD)
        board.set(layout.H_STEWARD_STOP, 1)
        begun_ns = clock.monotonic_ns()
        assert steward.run_steward(settings, board, redis_server.url) == 0
        assert clock.monotonic_ns() - begun_ns < steward.STOP_S * 1e9 / 2  # no longer than it takes
        assert slot.get(layout.C_STATE) == layout.RECOVERED
        assert client.zcard(keys.sorted("high")) == 1


def test_a_stop_without_redis_is_bounded(
    make_redis: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_redis()
    server.kill()
    monkeypatch.setattr(steward, "STOP_S", 0.3)
    board = Board(2)
    board.slots[0].set_text(layout.C_INCARNATION, "W" * 26)
    board.slots[0].set(layout.C_STATE, layout.DEAD)
    board.set(layout.H_STEWARD_STOP, 1)
    assert steward.run_steward(Settings(procs=1), board, server.url) == 0
    assert board.slots[0].get(layout.C_STATE) == layout.DEAD


def test_a_whole_steward_does_its_work(redis_server: RedisServer) -> None:
    """All duties together, on a real clock: renewed, promoted, published, exported, reaped not."""
    board = Board(4)
    settings = Settings(lease_ms=2_000, procs=1, metrics_port=0)
    keys = Keys()
    slot = board.slots[0]
    slot.set(layout.C_PID, os.getpid())
    slot.set(layout.C_BEAT, clock.boottime_ns() + 10**12)
    slot.set_text(layout.C_INCARNATION, "W" * 26)
    slot.set(layout.C_STATE, layout.LIVE)
    thread = threading.Thread(target=steward.run_steward, args=(settings, board, redis_server.url))
    with contextlib.closing(redis_server.client()) as client:
        client.zadd(keys.incarnations, {"W" * 26: 1})
        client.zadd(keys.delayed, {frame(1): 1})
        thread.start()
        try:
            wait_until(lambda: slot.get(layout.C_LEASE_UNTIL), what="renewed")
            wait_until(lambda: client.llen(keys.queue("high")), what="promoted")
            wait_until(lambda: client.get(keys.worker("W" * 26)), what="published")
            assert board.get(layout.H_STEWARD_BEAT)
        finally:
            board.set(layout.H_STEWARD_STOP, 1)
            thread.join(10)
    assert not thread.is_alive()
