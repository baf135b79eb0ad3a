"""Recovery: hash and board of a dead worker, by hand; one run; the whole state."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_clock import FakeClock
from tests.support.housework import Scene, Worker, cut, frame, frame_id
from tests.support.redis_server import RedisServer
from tqe import codec
from tqe.board import layout
from tqe.errors import RedisUnavailable
from tqe.steward import recovery
from tqe.steward.recovery import Recovered, Recovery, RecoveryReport
from tqe.store import working
from tqe.store.settling import retry_rule


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


def record(worker: Worker, row: int, index: int, status: int, **told: Any) -> None:
    worker.hands.record(row, index, status, started_ms=1_000, finished_ms=2_000, **told)


def recover(scene: Scene) -> RecoveryReport:
    return Recovery(scene.context).run_once()


def assert_gone(scene: Scene, worker: Worker) -> None:
    """Nothing of the worker is left anywhere."""
    assert scene.in_flight() == {}
    assert scene.incarnations() == []
    assert scene.board.recovery_id(worker.view.number) == ""
    assert worker.view.get(layout.C_STATE) == layout.RECOVERED


def test_a_worker_that_held_nothing_is_recovered(scene: Scene) -> None:
    worker = scene.worker()
    worker.dies(signal=0)
    assert recover(scene) == RecoveryReport((Recovered(0, 0, "exit:0", 0),))
    assert_gone(scene, worker)


def test_a_worker_that_never_registered_is_recovered(scene: Scene) -> None:
    view = scene.board.slots[0]
    view.set(layout.C_EXIT, 1)
    view.set(layout.C_STATE, layout.DEAD)
    assert recover(scene) == RecoveryReport((Recovered(0, 0, "crash:exit 1", 0),))
    assert view.get(layout.C_STATE) == layout.RECOVERED
    assert scene.incarnations() == []


def test_live_workers_are_left_alone(scene: Scene) -> None:
    worker = scene.worker()
    scene.hold(worker.incarnation, frame(1, 4))
    assert recover(scene) == RecoveryReport()
    assert scene.in_flight() == {"WORKER-0": ["1.0.4"]}


def test_everything_goes_where_the_board_says(scene: Scene) -> None:
    """One worker, one lease of each kind."""
    worker = scene.worker()
    done, mixed, whole, unseen, returned, settled = (frame(k, 4) for k in range(1, 7))
    damaged, odd = frame(7, 2)[:-3] + b"xxx", b"no frame"
    scene.track(done, mixed, whole, unseen, returned)
    # 1: all done, its settle was never sent
    row = worker.lease(done)
    for k in range(4):
        worker.hands.set_state(row, k, layout.JOB_DONE)
    # 2: a result, a retry, the job that runs, one that waits
    row = worker.lease(mixed)
    record(worker, row, 0, layout.OUT_DONE, result=b'"the result"')
    record(worker, row, 1, layout.OUT_RETRY, delay_ms=5_000, error=b'{"reason":"failed","message":"x"}')
    worker.runs(row, 2)
    # 3: Redis has already cut it to its second half, whose reply nobody read; one done, one waits
    row = worker.lease(whole)
    for k in range(3):
        worker.hands.set_state(row, k, layout.JOB_DONE)
    # 5: to be given back
    row = worker.lease(returned)
    for k in range(4):
        worker.hands.set_state(row, k, layout.JOB_RETURNED)
    # 6: a row whose lease is settled; the reply was not read
    row = worker.lease(settled)
    worker.hands.set_state(row, 0, layout.JOB_DONE)
    scene.hold(worker.incarnation, done, mixed, cut(whole, 2, 2), unseen, returned, damaged)
    scene.client.hset(scene.keys.processing(worker.incarnation), "odd name", odd)
    worker.dies()

    assert recover(scene) == RecoveryReport((Recovered(0, 0, "crash:SIGKILL", 6),))

    assert_gone(scene, worker)
    # what was not started keeps its counters; what ran is charged and its run is raised
    assert scene.sorted() == ["2.3.1", "3.3.1", "4.0.4", "5.0.4"]
    assert scene.delayed() == ["2.1.1 run=1 attempts=1", "2.2.1 run=1 crashes=1 suspect"]
    assert sorted(scene.quarantine()) == [damaged, odd]
    assert scene.dlq() == {}
    assert [scene.snapshot(k) for k in (1, 2, 3, 4, 5, 6)] == ["C", "CRRQ", "QQCQ", "Q", "Q", ""]
    assert json.loads(scene.told(2, 0))["result"] == "the result"
    assert json.loads(scene.told(2, 2))["error"]["reason"] == "crash:SIGKILL"
    assert scene.depth() == {"high:sorted": 10, "delayed": 2}
    stats = scene.stats()
    assert (stats["completed"], stats["failed"], stats["retried"]) == (6, 1, 2)
    assert stats["quarantined"] == 3  # two jobs of a lease, and one that nobody can count
    assert "fenced" not in stats


def test_a_crash_is_redelivered_with_backoff(scene: Scene) -> None:
    worker = scene.worker()
    one = frame(1, crashes=1)
    scene.hold(worker.incarnation, one)
    worker.runs(worker.lease(one), 0)
    worker.dies(signal=11)
    before = scene.redis_ms()
    recover(scene)
    assert scene.delayed() == ["1.0.1 run=1 crashes=2 suspect"]
    (due,) = [score for _, score in scene.client.zrange(scene.keys.delayed, 0, -1, withscores=True)]
    assert 1_000 <= due - before <= 2_100  # the second crash: 2 s, half of it random


def test_the_last_crash_is_the_end_with_the_signals_name(scene: Scene) -> None:
    worker = scene.worker()
    one = frame(1, crashes=2)
    scene.track(one)
    scene.hold(worker.incarnation, one)
    worker.runs(worker.lease(one), 0)
    worker.dies(signal=11)
    recover(scene)
    assert_gone(scene, worker)
    meta = json.loads(scene.dlq()["1.0"])
    assert (meta["reason"], meta["crashes"], meta["type"], meta["lane"]) == (
        "crash:SIGSEGV",
        3,
        "EMAIL",
        "high",
    )
    assert scene.snapshot(1) == "D"
    assert scene.stats()["dead"] == 1


@pytest.mark.parametrize(("most", "where"), [(3, "delayed"), (0, "dead")])
def test_a_hard_limit_is_a_failed_attempt_not_a_crash(scene: Scene, most: int, where: str) -> None:
    worker = scene.worker()
    one = frame(1)
    scene.hold(worker.incarnation, one)
    worker.runs(worker.lease(one), 0, step=9, retries=retry_rule(most, 2_000, 60_000))
    worker.view.set(layout.C_KILL_STEP, 9)
    worker.view.set(layout.C_KILL_KIND, layout.KILL_HARD_LIMIT)
    worker.dies()
    assert recover(scene).recovered[0].reason == "hard_limit"
    if where == "delayed":
        assert scene.delayed() == ["1.0.1 run=1 attempts=1"]
    else:
        assert json.loads(scene.dlq()["1.0"])["reason"] == "hard_limit"


@pytest.mark.parametrize(
    ("kind", "step"),
    [(layout.KILL_DRAIN, 9), (layout.KILL_STUCK, 9), (layout.KILL_HARD_LIMIT, 8)],  # 8: the one before
)
def test_a_kill_that_was_not_meant_for_the_job_charges_nobody(scene: Scene, kind: int, step: int) -> None:
    worker = scene.worker()
    one = frame(1, 2)
    scene.hold(worker.incarnation, one)
    worker.runs(worker.lease(one), 0, step=9)
    worker.view.set(layout.C_KILL_STEP, step)
    worker.view.set(layout.C_KILL_KIND, kind)
    worker.dies()
    recover(scene)
    assert_gone(scene, worker)
    assert scene.sorted() == ["1.0.1 run=1", "1.1.1"]
    assert scene.delayed() == []


def test_beside_the_one_on_the_board_started_jobs_are_not_blamed(scene: Scene) -> None:
    worker = scene.worker()
    one = frame(1, 3)
    scene.hold(worker.incarnation, one)
    row = worker.lease(one)
    worker.hands.set_state(row, 0, layout.JOB_STARTED)  # coroutines that wait
    worker.hands.set_state(row, 1, layout.JOB_STARTED)
    worker.runs(row, 2)
    worker.dies()
    recover(scene)
    assert scene.sorted() == ["1.0.1 run=1", "1.1.1 run=1"]
    assert scene.delayed() == ["1.2.1 run=1 crashes=1 suspect"]


def test_who_dies_while_its_coroutines_wait_has_nobody_to_blame(scene: Scene) -> None:
    """The words of the step before still stand on the board: row 0, index 0."""
    worker = scene.worker()
    one = frame(1, 2)
    scene.hold(worker.incarnation, one)
    row = worker.lease(one)
    worker.runs(row, 0)
    worker.view.set(layout.C_IN_USER, 0)
    worker.view.set(layout.C_ASYNC, 1)
    worker.dies()
    recover(scene)
    assert scene.sorted() == ["1.1.1", "1.0.1 run=1 suspect"]
    assert scene.delayed() == []


@pytest.mark.parametrize("step", [0, 9])
def test_who_holds_up_the_loop_from_the_helper_thread_is_charged(scene: Scene, step: int) -> None:
    """Code that keeps the interpreter's lock for long stops the loop, and the worker is killed as stuck. If a
    step of a coroutine ran as well, nobody knows which of the two it was."""
    worker = scene.worker()
    one = frame(1, 2)
    scene.hold(worker.incarnation, one)
    row = worker.lease(one)
    worker.hands.set_state(row, 1, layout.JOB_STARTED)  # on the helper thread
    worker.runs(row, 0)
    worker.view.set(layout.C_IN_USER, step)
    worker.view.set(layout.C_ASYNC, 2)
    worker.view.set(layout.C_HELPER, (row + 1) << 32 | 1)
    worker.view.set(layout.C_KILL_KIND, layout.KILL_STUCK)
    worker.dies()
    recover(scene)
    assert scene.delayed() == ([] if step else ["1.1.1 run=1 crashes=1 suspect"])


def test_who_dies_between_a_jobs_return_and_its_record_is_charged(scene: Scene) -> None:
    """A result whose encoding kills the process would otherwise come back for ever."""
    worker = scene.worker()
    one = frame(1, 2)
    scene.hold(worker.incarnation, one)
    worker.runs(worker.lease(one), 0)
    worker.view.set(layout.C_IN_USER, 0)
    worker.dies()
    recover(scene)
    assert scene.delayed() == ["1.0.1 run=1 crashes=1 suspect"]
    assert scene.sorted() == ["1.1.1"]


def test_the_job_on_the_helper_thread_is_charged_when_no_coroutine_ran(scene: Scene) -> None:
    worker = scene.worker()
    one = frame(1, 3)
    scene.hold(worker.incarnation, one)
    row = worker.lease(one)
    worker.runs(row, 0)
    worker.hands.set_state(row, 1, layout.JOB_STARTED)
    worker.view.set(layout.C_IN_USER, 0)
    worker.view.set(layout.C_ASYNC, 2)
    worker.view.set(layout.C_HELPER, (row + 1) << 32 | 1)
    worker.dies()
    recover(scene)
    assert scene.delayed() == ["1.1.1 run=1 crashes=1 suspect"]
    assert scene.sorted() == ["1.0.1 run=1", "1.2.1"]


def test_a_worker_that_died_during_a_takeover_has_both_ids_recovered(scene: Scene) -> None:
    worker = scene.worker(name="OLD".ljust(26, "-"), next_name="NEW".ljust(26, "-"))
    scene.hold("OLD".ljust(26, "-"), frame(1))
    scene.hold("NEW".ljust(26, "-"), frame(2))
    scene.register("NEW".ljust(26, "-"))
    worker.dies()
    recover(scene)
    assert_gone(scene, worker)
    assert scene.sorted() == ["1.0.1", "2.0.1"]


def test_each_id_gets_a_fresh_recovery_id(scene: Scene) -> None:
    worker = scene.worker(next_name="NEXT".ljust(26, "-"))
    worker.dies()
    recover(scene)
    assert scene.new_id() == "STEWARD-3".ljust(26, "-")


@pytest.mark.parametrize("at", ["takeover", "settle", "leave"])
@pytest.mark.parametrize("applied", [True, False])
def test_a_steward_that_dies_on_the_way_is_continued_by_the_next(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, at: str, applied: bool
) -> None:
    worker = scene.worker()
    done, waits = frame(1, 2), frame(2, 2)
    scene.track(done)
    scene.hold(worker.incarnation, done, waits)
    row = worker.lease(done)
    for k in range(2):
        worker.hands.set_state(row, k, layout.JOB_DONE)
    worker.dies()
    run = scene.context.door.run

    def dies(call: Any) -> Any:
        if call.script != at:
            return run(call)
        if applied:
            run(call)
        raise RedisUnavailable("the steward is gone")

    monkeypatch.setattr(scene.context.door, "run", dies)
    with pytest.raises(RedisUnavailable):
        recover(scene)
    assert worker.view.get(layout.C_STATE) == layout.DEAD
    assert scene.board.recovery_id(0) == "STEWARD-1".ljust(26, "-")
    monkeypatch.undo()

    assert recover(scene).recovered[0].slot == 0
    assert_gone(scene, worker)
    assert scene.sorted() == ["2.0.2"]
    assert scene.snapshot(1) == "C"
    assert scene.stats()["completed"] == 2


def test_the_dead_workers_last_words_come_too_late(scene: Scene) -> None:
    """What it had sent under its old name is executed after the takeover."""
    worker = scene.worker()
    scene.client.rpush(scene.keys.queue("high"), frame(1))
    worker.dies()
    recover(scene)
    fetcher = working.Fetcher(scene.keys, worker.incarnation, [working.LaneRule("high")], 15_000)
    with pytest.raises(Exception, match="is not registered"):
        scene.context.door.run(fetcher.call(jobs_max=1, bytes_max=1000, frames_max=1))
    assert scene.queue() == ["1.0.1"]
    assert scene.in_flight() == {}


def test_one_slot_that_cannot_be_recovered_does_not_keep_the_others(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, other = scene.worker(0), scene.worker(1)
    for worker in (broken, other):
        worker.dies()

    def cannot(*args: object) -> Any:
        raise ValueError("odd board")

    monkeypatch.setattr(broken.view, "rows", cannot)
    scene.hold(broken.incarnation, frame(1))
    duty = Recovery(scene.context)
    report = duty.run_once()
    assert (report.failed, [r.slot for r in report.recovered]) == ((0,), [1])
    # after two tries the board is not read any more, and whole leases go back
    duty.run_once()
    assert duty.run_once() == RecoveryReport((Recovered(0, 0, "crash:SIGKILL", 1),))
    assert scene.sorted() == ["1.0.1"]
    assert_gone(scene, broken)


def test_what_settle_refuses_again_and_again_is_kept_in_quarantine(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = scene.worker()
    one = frame(1, 2)
    scene.hold(worker.incarnation, one)
    worker.dies()
    run, refused = scene.context.door.run, []

    def refuses(call: Any) -> Any:
        if call.script == "settle" and b"q" not in call.args:
            refused.append(call)
            return [0, b"b"]
        return run(call)

    monkeypatch.setattr(scene.context.door, "run", refuses)
    recover(scene)
    assert len(refused) == recovery.PASSES_MAX - 1
    assert_gone(scene, worker)
    assert scene.quarantine() == [one]


def test_a_recovery_that_fails_for_ever_leaves_the_leases_to_the_reaper(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = scene.worker()
    scene.hold(worker.incarnation, frame(1))
    worker.dies()
    run = scene.context.door.run

    def broken(call: Any) -> Any:
        if call.script == "settle":
            raise ValueError("a defect")
        return run(call)

    monkeypatch.setattr(scene.context.door, "run", broken)
    duty = Recovery(scene.context)
    for _ in range(recovery.TRIES_MAX):
        duty.run_once()
    assert worker.view.get(layout.C_STATE) == layout.RECOVERED
    assert scene.board.recovery_id(0) == ""  # nobody renews it any more
    assert scene.in_flight() == {"STEWARD-1": ["1.0.1"]}


def test_a_workers_counters_outlive_it(scene: Scene) -> None:
    worker = scene.worker()
    worker.view.add("completed", 5)
    worker.dies()
    recover(scene)
    assert worker.view.get(layout.C_STATE) == layout.RECOVERED
    assert worker.view.counters()["completed"] == 5  # for the supervisor, which adds them to the retired ones


def test_a_result_goes_to_the_job_that_made_it(scene: Scene) -> None:
    """Records of rows that are not leased any more must not be read into another lease of the same frame."""
    worker = scene.worker()
    whole = frame(1, 4)
    scene.track(whole)
    row = worker.lease(whole)
    for k in range(4):
        record(worker, row, k, layout.OUT_DONE, result=b"%d" % k)
    second_run = codec.single(whole, 1, run=1)
    scene.hold(worker.incarnation, cut(whole, 2, 2), second_run)
    worker.dies()
    recover(scene)
    assert scene.snapshot(1) == "QQCC"
    assert [json.loads(scene.told(1, k) or b"{}").get("result") for k in range(4)] == [None, None, 2, 3]
    assert scene.sorted() == ["1.1.1 run=1"]  # another run: the board knows nothing of it


def test_the_frame_ids_of_this_page_are_frame_ids() -> None:
    assert codec.parse(frame(1)).frame_id == frame_id(1)
