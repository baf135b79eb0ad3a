"""Renewal: who deserves it, what the board is told, and who is sent to take itself over."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_clock import FakeClock
from tests.support.housework import LEASE_MS, Scene, Worker, frame
from tests.support.redis_server import RedisServer
from tqe.board import layout
from tqe.steward.renewal import Renewal, RenewalReport

MS = 1_000_000


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


def ends_in_ms(scene: Scene, incarnation: str) -> int:
    score = scene.client.zscore(scene.keys.incarnations, incarnation)
    assert score is not None
    return int(score) - scene.redis_ms()


def nearly_over(scene: Scene, *workers: Worker) -> None:
    for worker in workers:
        scene.register(worker.incarnation, scene.redis_ms() + 100)


def test_live_workers_and_recoveries_are_renewed_and_the_board_says_until_when(scene: Scene) -> None:
    worker = scene.worker()
    nearly_over(scene, worker)
    recovery = "RECOVERY".ljust(26, "-")
    scene.register(recovery, scene.redis_ms() + 100)
    scene.board.set_recovery_id(3, recovery)
    report = Renewal(scene.context).run_once()
    assert report == RenewalReport(renewed=(worker.incarnation, recovery))
    for one in (worker.incarnation, recovery):
        assert LEASE_MS - 2_000 < ends_in_ms(scene, one) <= LEASE_MS
    assert worker.view.get(layout.C_LEASE_UNTIL) == scene.clock.boottime_ns() + LEASE_MS * MS
    assert worker.view.get(layout.C_STOP) == layout.STOP_NONE


def test_the_lease_on_the_board_counts_from_before_the_send(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = scene.worker()
    run = scene.context.door.run
    sent_ns = scene.clock.boottime_ns()

    def slow(call: Any) -> Any:
        scene.clock.advance(ms=900)
        return run(call)

    monkeypatch.setattr(scene.context.door, "run", slow)
    Renewal(scene.context).run_once()
    assert worker.view.get(layout.C_LEASE_UNTIL) == sent_ns + LEASE_MS * MS


def test_an_end_on_the_board_is_never_lowered(scene: Scene) -> None:
    worker = scene.worker()
    worker.view.set(layout.C_LEASE_UNTIL, 1 << 62)
    Renewal(scene.context).run_once()
    assert worker.view.get(layout.C_LEASE_UNTIL) == 1 << 62


@pytest.mark.parametrize("state", ["T", "t", "Z", "X", ""])
def test_a_process_that_cannot_work_is_not_renewed(scene: Scene, state: str) -> None:
    worker = scene.worker()
    nearly_over(scene, worker)
    scene.states[1000] = state
    report = Renewal(scene.context).run_once()
    assert report.renewed == () and list(report.withheld) == [0]
    assert ends_in_ms(scene, worker.incarnation) <= 100
    assert worker.view.get(layout.C_LEASE_UNTIL) == 0


def test_a_loop_that_stands_still_is_not_renewed(scene: Scene) -> None:
    worker = scene.worker()
    renewal = Renewal(scene.context)
    scene.clock.advance(ms=LEASE_MS // 3)
    assert renewal.run_once().renewed == (worker.incarnation,)
    scene.clock.advance(ms=1)
    assert renewal.run_once().withheld == {0: "its loop stands still"}
    assert renewal.next_in_s is not None and renewal.next_in_s <= 1.0  # looked at again soon
    worker.view.set(layout.C_BEAT, scene.clock.boottime_ns())
    assert renewal.run_once().renewed == (worker.incarnation,)


@pytest.mark.parametrize(("hard_ms", "renewed"), [(0, True), (120_000, True), (60_000, False)])
def test_a_long_job_is_renewed_within_its_hard_limit(scene: Scene, hard_ms: int, renewed: bool) -> None:
    worker = scene.worker()
    row = worker.lease(frame(1))
    worker.runs(row, 0)
    worker.view.set(layout.C_HARD_MS, hard_ms)
    scene.context.sightings.observe(scene.board, scene.clock.boottime_ns())
    scene.clock.advance(ms=61_000)
    report = Renewal(scene.context).run_once()
    assert bool(report.renewed) is renewed


def test_both_ids_of_a_takeover_are_renewed(scene: Scene) -> None:
    worker = scene.worker(next_name="NEXT".ljust(26, "-"))
    nearly_over(scene, worker)
    report = Renewal(scene.context).run_once()
    assert (report.renewed, report.gone) == ((worker.incarnation,), ("NEXT".ljust(26, "-"),))
    assert report.resynced == ()  # one of the two is there


def test_who_lost_its_lease_is_sent_to_take_itself_over_and_never_revived(scene: Scene) -> None:
    worker = scene.worker()
    scene.client.delete(scene.keys.incarnations)
    report = Renewal(scene.context).run_once()
    assert (report.gone, report.resynced) == ((worker.incarnation,), (0,))
    assert worker.view.get(layout.C_STOP) == layout.STOP_RESYNC
    assert scene.incarnations() == []


def test_a_worker_that_drains_is_not_told_anything_else(scene: Scene) -> None:
    worker = scene.worker()
    worker.view.set(layout.C_STOP, layout.STOP_DRAIN)
    scene.client.delete(scene.keys.incarnations)
    assert Renewal(scene.context).run_once().resynced == ()
    assert worker.view.get(layout.C_STOP) == layout.STOP_DRAIN


def test_a_takeover_in_between_is_no_loss(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = scene.worker()
    scene.client.delete(scene.keys.incarnations)
    run = scene.context.door.run

    def takes_over(call: Any) -> Any:
        worker.view.set_text(layout.C_INCARNATION, "NEXT")
        return run(call)

    monkeypatch.setattr(scene.context.door, "run", takes_over)
    report = Renewal(scene.context).run_once()
    assert report.resynced == ()
    assert worker.view.get(layout.C_LEASE_UNTIL) == 0


def test_a_frame_planted_in_an_idle_workers_hash_is_found_within_two_renewals(scene: Scene) -> None:
    worker = scene.worker()
    worker.view.set(layout.C_PHASE, layout.PHASE_IDLE)
    scene.hold(worker.incarnation, frame(1))
    renewal = Renewal(scene.context)
    assert renewal.run_once().resynced == ()  # a fetch may just have been applied
    assert renewal.run_once().resynced == (0,)
    assert worker.view.get(layout.C_STOP) == layout.STOP_RESYNC


@pytest.mark.parametrize("why", ["busy", "knows it"])
def test_a_worker_that_knows_its_leases_is_left_alone(scene: Scene, why: str) -> None:
    worker = scene.worker()
    one = frame(1)
    if why == "knows it":
        worker.view.set(layout.C_PHASE, layout.PHASE_IDLE)
        worker.lease(one)
    scene.hold(worker.incarnation, one)
    renewal = Renewal(scene.context)
    assert [renewal.run_once().resynced for _ in range(3)] == [(), (), ()]


def test_dead_and_unregistered_workers_are_not_renewed(scene: Scene) -> None:
    dead, starting = scene.worker(0), scene.worker(1)
    dead.dies()
    starting.view.set_text(layout.C_INCARNATION, "")
    nearly_over(scene, dead)
    assert Renewal(scene.context).run_once() == RenewalReport()
    assert ends_in_ms(scene, dead.incarnation) <= 100
