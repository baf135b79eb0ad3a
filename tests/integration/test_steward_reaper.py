"""Reaping takes two facts: an end that lies in the past, and that very end watched for one full lease."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_clock import FakeClock
from tests.support.housework import LEASE_MS, Scene, frame
from tests.support.redis_server import RedisServer
from tqe.board import layout
from tqe.errors import RedisUnavailable
from tqe.steward.reaper import Reaper, ReaperReport
from tqe.store import housekeeping, working

GHOST = "GHOST".ljust(26, "-")


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


def past(scene: Scene, ago_ms: int = 1_000) -> int:
    return scene.redis_ms() - ago_ms


def watch(scene: Scene, reaper: Reaper, ms: int, each: Any = None) -> list[str]:
    """Look once a second for so long, as the loop does; answers with what was reaped."""
    reaped: list[str] = []
    for _ in range(ms // 1_000):
        scene.clock.advance(ms=1_000)
        if each is not None:
            each()
        reaped += reaper.run_once().reaped
    return reaped


def test_a_silent_host_is_reaped_after_one_lease_of_watching(scene: Scene) -> None:
    scene.register(GHOST, past(scene))
    scene.hold(GHOST, frame(1, 3), frame(2, reaps=1))
    reaper = Reaper(scene.context)
    assert reaper.run_once() == ReaperReport()  # seen for the first time
    assert watch(scene, reaper, LEASE_MS - 1_000) == []
    scene.clock.advance(ms=1_000)
    assert reaper.run_once() == ReaperReport((GHOST,), 2)
    assert scene.sorted() == ["1.0.3 reaps=1", "2.0.1 reaps=2 suspect"]
    assert scene.in_flight() == {}
    assert scene.incarnations() == []
    assert scene.depth() == {"high:sorted": 4}


def test_a_lease_that_has_not_ended_is_never_reaped(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor asked for: the script would refuse, but a second for each healthy worker."""
    monkeypatch.setattr(scene.context.door, "run", None)
    scene.register(GHOST, scene.redis_ms() + 3_600_000)
    reaper = Reaper(scene.context)
    reaper.run_once()
    assert watch(scene, reaper, 10 * LEASE_MS) == []


def test_an_end_that_moves_is_watched_anew(scene: Scene) -> None:
    """Another steward's clock may be wrong, or its renewals late: as long as they come nobody is reaped."""
    scene.register(GHOST, past(scene, 500_000))
    reaper = Reaper(scene.context)
    reaper.run_once()
    ends = iter(range(past(scene, 100_000), past(scene, 1)))

    def renewed_each_5_s() -> None:
        if scene.clock.monotonic_ns() // 1_000_000_000 % 5 == 0:
            scene.register(GHOST, next(ends))

    assert watch(scene, reaper, 10 * LEASE_MS, renewed_each_5_s) == []


def test_after_a_pause_of_redis_nobody_healthy_is_reaped(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All leases are past when it answers again; the time in which it did not is no time of watching."""
    fleet = [f"WORKER-{k}".ljust(26, "-") for k in range(8)]
    for one in fleet:
        scene.register(one, scene.redis_ms() + 5)
    reaper = Reaper(scene.context)
    watch(scene, reaper, 5_000)
    send = scene.context.door.send
    monkeypatch.setattr(scene.context.door, "send", lambda *args: [RedisUnavailable("paused")])
    for _ in range(2 * LEASE_MS // 1_000):
        scene.clock.advance(ms=1_000)
        with pytest.raises(RedisUnavailable):
            reaper.run_once()
    monkeypatch.setattr(scene.context.door, "send", send)
    assert reaper.run_once() == ReaperReport()
    call = housekeeping.renew(scene.keys, fleet, LEASE_MS)
    scene.context.door.run(call)  # their steward is back as well
    assert watch(scene, reaper, 2 * LEASE_MS) == []


def test_a_reaper_that_was_stopped_itself_starts_over(scene: Scene) -> None:
    scene.register(GHOST, past(scene))
    reaper = Reaper(scene.context)
    reaper.run_once()
    scene.clock.advance(ms=10 * LEASE_MS)
    assert reaper.run_once() == ReaperReport()


def test_the_wall_clock_means_nothing(scene: Scene) -> None:
    scene.register(GHOST, past(scene))
    reaper = Reaper(scene.context)
    reaper.run_once()
    scene.clock.step_wall(ms=10 * LEASE_MS)
    scene.clock.suspend(ms=10 * LEASE_MS)
    assert reaper.run_once() == ReaperReport()


def test_who_is_renewed_in_the_last_moment_lives(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.register(GHOST, past(scene))
    scene.hold(GHOST, frame(1))
    reaper = Reaper(scene.context)
    reaper.run_once()
    watch(scene, reaper, LEASE_MS - 1_000)
    run = scene.context.door.run

    def renewed_first(call: Any) -> Any:
        if call.script == "takeover":
            run(housekeeping.renew(scene.keys, [GHOST], LEASE_MS))
        return run(call)

    monkeypatch.setattr(scene.context.door, "run", renewed_first)
    scene.clock.advance(ms=1_000)
    assert reaper.run_once() == ReaperReport()
    assert scene.in_flight() == {"GHOST": ["1.0.1"]}


def test_two_reapers_reap_once(scene: Scene) -> None:
    scene.register(GHOST, past(scene))
    scene.hold(GHOST, frame(1))
    reapers = [Reaper(scene.context), Reaper(scene.context)]
    for reaper in reapers:
        reaper.run_once()
    reaped = []
    for _ in range(LEASE_MS // 1_000 + 1):
        scene.clock.advance(ms=1_000)
        reaped += [one for reaper in reapers for one in reaper.run_once().reaped]
    assert reaped == [GHOST]
    assert scene.sorted() == ["1.0.1 reaps=1"]


def test_a_reaper_that_dies_on_the_way_is_reaped_itself(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.register(GHOST, past(scene))
    scene.hold(GHOST, frame(1))
    first = Reaper(scene.context)
    first.run_once()
    watch(scene, first, LEASE_MS - 1_000)
    run = scene.context.door.run

    def dies(call: Any) -> Any:
        if call.script == "settle":
            raise RedisUnavailable("the host is gone")
        return run(call)

    monkeypatch.setattr(scene.context.door, "run", dies)
    scene.clock.advance(ms=1_000)
    with pytest.raises(RedisUnavailable):
        first.run_once()
    monkeypatch.undo()
    assert scene.in_flight() == {"STEWARD-1": ["1.0.1"]}
    scene.register("STEWARD-1".ljust(26, "-"), past(scene))  # a lease later
    second = Reaper(scene.context)
    second.run_once()
    assert watch(scene, second, LEASE_MS) == ["STEWARD-1".ljust(26, "-")]
    assert scene.sorted() == ["1.0.1 reaps=1"]  # counted once


def test_what_our_own_recovery_is_about_to_settle_is_left_to_it(scene: Scene) -> None:
    """Recovery is exact, reaping is not: a dead worker's lease may have ended long ago."""
    worker = scene.worker()
    scene.register(worker.incarnation, past(scene))
    scene.register("RECOVERY".ljust(26, "-"), past(scene))
    scene.board.set_recovery_id(3, "RECOVERY".ljust(26, "-"))
    worker.dies()
    reaper = Reaper(scene.context)
    reaper.run_once()
    assert watch(scene, reaper, 2 * LEASE_MS) == []


def test_a_worker_of_ours_that_is_not_renewed_any_more_is_reaped(scene: Scene) -> None:
    """One that hangs keeps its jobs from everybody; should it go on, it is refused."""
    worker = scene.worker()
    scene.register(worker.incarnation, past(scene))
    scene.hold(worker.incarnation, frame(1))
    reaper = Reaper(scene.context)
    reaper.run_once()
    assert watch(scene, reaper, LEASE_MS) == [worker.incarnation]
    assert worker.view.get(layout.C_STATE) == layout.LIVE
    fetcher = working.Fetcher(scene.keys, worker.incarnation, [working.LaneRule("high")], LEASE_MS)
    with pytest.raises(Exception, match="is not registered"):
        scene.context.door.run(fetcher.call(jobs_max=1, bytes_max=1000, frames_max=1))


def test_odd_names_in_a_silent_hash_go_to_quarantine(scene: Scene) -> None:
    scene.register(GHOST, past(scene))
    scene.client.hset(scene.keys.processing(GHOST), "odd", b"bytes")
    reaper = Reaper(scene.context)
    reaper.run_once()
    assert watch(scene, reaper, LEASE_MS) == [GHOST]
    assert scene.quarantine() == [b"bytes"]
    assert scene.in_flight() == {}
