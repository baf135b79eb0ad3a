"""The other duties of the steward, each run by hand against a real Redis: seed, run once, compare."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.fake_clock import FakeClock
from tests.support.housework import Scene, Worker, frame, frame_id
from tests.support.redis_server import RedisServer
from tqe.board import layout
from tqe.client import Client
from tqe.settings import Settings
from tqe.steward import delayed
from tqe.steward.auditor import Auditor, AuditReport
from tqe.steward.burst import Burst
from tqe.steward.canceller import Canceller, CancelReport
from tqe.steward.delayed import Delayed, PromoteReport, Unparker, UnparkReport
from tqe.steward.publisher import MEAN_CHANGE, TTL_MS, Publisher
from tqe.steward.trimmer import Trimmer
from tqe.store import housekeeping
from tqe.telemetry.metrics import TaskSample


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


MakeScene = Callable[..., Scene]


@pytest.fixture
def make_scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[MakeScene]:
    """A scene with other settings."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            contextlib.closing(Scene(redis_server, fake_clock, **settings))
        )


# ------------------------------------------------------------------ promote and unpark


def later(scene: Scene, due_in_ms: int, *frames: bytes) -> None:
    due = scene.redis_ms() + due_in_ms
    scene.client.zadd(scene.keys.delayed, dict.fromkeys(frames, due))
    scene.client.hincrby(scene.keys.depth, "delayed", sum(int(one[35:39]) for one in frames))


def test_what_is_due_enters_its_lane_at_the_tail(scene: Scene) -> None:
    scene.client.rpush(scene.keys.queue("high"), frame(9))
    scene.client.hset(scene.keys.depth, "high", 1)
    later(scene, -10, frame(1, 3, attempts=1))
    later(scene, 60_000, frame(2))
    duty = Delayed(scene.context)
    assert duty.run_once() == PromoteReport(3, 1)
    assert scene.queue() == ["9.0.1", "1.0.3 attempts=1"]
    assert scene.delayed() == ["2.0.1"]
    assert scene.depth() == {"high": 4, "delayed": 1}
    assert scene.client.llen(scene.keys.wake("high")) == 1


def test_the_next_look_is_when_the_next_one_is_due(scene: Scene) -> None:
    duty = Delayed(scene.context)
    later(scene, 60_000, frame(2))
    duty.run_once()
    assert duty.next_in_s == delayed.LATEST_S  # something may become due before it
    scene.client.delete(scene.keys.delayed)
    later(scene, 100, frame(2))
    duty.run_once()
    assert duty.next_in_s is not None and duty.next_in_s <= 0.1
    scene.client.delete(scene.keys.delayed)
    duty.run_once()
    assert duty.next_in_s is None


def test_lanes_of_others_are_promoted_too(scene: Scene) -> None:
    later(scene, -10, frame(1, lane="bulk"), frame(2, lane="high"))
    assert Delayed(scene.context).run_once() == PromoteReport(2, 2)
    assert scene.queue("bulk") == ["1.0.1"]
    assert "bulk" in scene.context.lanes


def test_a_storm_is_promoted_in_bounded_batches(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delayed, "BATCHES_MAX", 2)
    later(scene, -10, *(frame(k) for k in range(600)))
    duty = Delayed(scene.context)
    assert duty.run_once() == PromoteReport(512, 512)
    assert duty.next_in_s == 0.0  # at once again, after the other duties had their turn
    assert duty.run_once() == PromoteReport(88, 88)
    assert len(scene.queue()) == 600


def test_parked_frames_return_to_the_lanes_part_that_is_ordered(scene: Scene) -> None:
    newer = b"F2" + frame(3)[2:]
    scene.client.rpush(scene.keys.parked, newer, frame(1, 2), frame(2, lane="bulk"))
    duty = Unparker(scene.context)
    assert duty.run_once() == UnparkReport(2, 1)
    assert (scene.sorted(), scene.sorted("bulk")) == (["1.0.2"], ["2.0.1"])
    assert scene.client.lrange(scene.keys.parked, 0, -1) == [newer]


# ------------------------------------------------------------------ publish


def published(scene: Scene, incarnation: str) -> Any:
    text = scene.client.get(scene.keys.worker(incarnation))
    return json.loads(text) if text else None


def test_a_running_job_is_published_with_when_it_was_first_seen(scene: Scene) -> None:
    worker = scene.worker(number=3)
    worker.view.set(layout.C_CPU, 2)
    worker.view.add("completed", 41)
    row = worker.lease(frame(1, 4))
    worker.runs(row, 2)
    scene.context.note_redis_ms(scene.redis_ms())
    scene.context.sightings.observe(scene.board, scene.clock.boottime_ns())
    scene.clock.advance(ms=700)
    Publisher(scene.context).run_once()
    told = published(scene, worker.incarnation)
    since_ms = told["jobs"][0].pop("since_ms")
    assert abs(scene.redis_ms() - since_ms) < 5_000
    counters = told.pop("counters")
    assert counters["completed"] == 41
    assert scene.client.exists(scene.keys.tasks(told.pop("steward")))
    assert told.pop("scaling") is None
    assert told == {
        "worker": 3,
        "pid": 1003,
        "cpu": 1,
        "state": "busy",
        "host": "here",
        "lanes": ["high", "normal", "low"],
        "jobs": [{"id": f"{frame_id(1).decode()}.2", "type": "EMAIL"}],
    }
    assert 0 < scene.client.pttl(scene.keys.worker(worker.incarnation)) <= TTL_MS


def test_coroutines_are_published_from_the_rows(scene: Scene) -> None:
    worker = scene.worker()
    worker.view.set(layout.C_ASYNC, 2)
    row = worker.lease(frame(1, 10))
    for index in (1, 8):
        worker.hands.set_state(row, index, layout.JOB_STARTED)
    worker.hands.set_state(row, 0, layout.JOB_DONE)
    publisher = Publisher(scene.context)
    publisher.run_once()
    scene.clock.advance(ms=3_000)
    publisher.run_once()
    jobs = published(scene, worker.incarnation)["jobs"]
    assert [job["id"].split(".")[1] for job in jobs] == ["1", "8"]
    # first seen three seconds ago
    assert all(
        abs(scene.context.redis_ms(scene.clock.boottime_ns()) - 3_000 - j["since_ms"]) < 5 for j in jobs
    )


def test_an_idle_worker_is_published_without_jobs(scene: Scene) -> None:
    worker = scene.worker()
    worker.view.set(layout.C_PHASE, layout.PHASE_IDLE)
    Publisher(scene.context).run_once()
    told = published(scene, worker.incarnation)
    assert (told["state"], told["jobs"], told["cpu"]) == ("idle", [], None)


def test_dead_workers_are_not_published(scene: Scene) -> None:
    worker = scene.worker()
    worker.dies()
    Publisher(scene.context).run_once()
    assert published(scene, worker.incarnation) is None


def measured(worker: Worker, name: str, mean_ns: int, jobs: int, number: int = 0) -> None:
    start = layout.O_TASKS + number * layout.TASK_BYTES
    worker.view._bytes[start : start + 64] = name.encode().ljust(64, b"\0")
    worker.view.set(start + layout.T_MEAN_NS, mean_ns)
    worker.view.set(start + layout.T_TIMED, jobs)


def test_means_are_published_over_all_workers_when_they_have_changed(scene: Scene) -> None:
    one, two = scene.worker(0), scene.worker(1)
    measured(one, "EMAIL", 2_000_000, 1)
    measured(two, "EMAIL", 6_000_000, 3)
    measured(two, "NEVER", 0, 0, number=1)
    publisher = Publisher(scene.context)
    assert publisher.run_once().means == {"EMAIL": 5_000}
    assert scene.client.hgetall(scene.keys.means) == {b"EMAIL": b"5000"}
    assert publisher.run_once().means == {}
    measured(two, "EMAIL", int(6_000_000 * (1 + 4 * MEAN_CHANGE)), 3)
    assert publisher.run_once().means == {"EMAIL": 5_900}


def told_tasks(server: RedisServer) -> dict[str, TaskSample]:
    with Client(Settings(redis_url=server.url)) as client:
        return client.tasks()


def test_what_tasks_did_is_published_over_all_lives_and_hosts(
    scene: Scene, redis_server: RedisServer
) -> None:
    gone, here = scene.worker(0), scene.worker(1)
    for worker, jobs in ((gone, 2), (here, 3)):
        words = worker.view.bind(0, "EMAIL")
        words[layout.T_COMPLETED // layout.WORD] = jobs
        words[layout.T_RUN_BINS // layout.WORD + 5] = jobs
        words[layout.T_SUM_NS // layout.WORD] = jobs * 40_000
    scene.board.retire(gone.view)
    Publisher(scene.context).run_once()
    told = told_tasks(redis_server)["EMAIL"]
    assert (told.outcomes["completed"], told.run_bins[5], sum(told.run_bins)) == (5, 5, 5)
    assert told.run_sum_s == pytest.approx(200e-6)
    # Another host's record, and one that nobody can read.
    name = scene.context.new_id()
    scene.client.zadd(scene.keys.incarnations, {name: 1, "damaged": 2})
    scene.client.set(scene.keys.worker(name), b'{"worker": 0, "pid": 1, "steward": "other"}')
    scene.client.set(scene.keys.worker("damaged"), b'{"worker": 0, "pid": 1, "steward": "damaged"}')
    (steward,) = {one.decode() for one in scene.client.keys("*tasks:*")}
    scene.client.copy(steward, scene.keys.tasks("other"))
    scene.client.set(scene.keys.tasks("damaged"), b'{"EMAIL": {"outcomes": {}}}')
    assert told_tasks(redis_server)["EMAIL"].outcomes["completed"] == 10


def test_a_steward_that_follows_counts_in_place_of_the_one_before(
    scene: Scene, redis_server: RedisServer
) -> None:
    worker = scene.worker()
    worker.view.bind(0, "EMAIL")[layout.T_COMPLETED // layout.WORD] = 7
    Publisher(scene.context).run_once()
    Publisher(scene.context).run_once()
    assert told_tasks(redis_server)["EMAIL"].outcomes["completed"] == 7


def test_a_full_redis_only_costs_the_news(scene: Scene) -> None:
    worker = scene.worker()
    scene.client.config_set("maxmemory", 1)
    publisher = Publisher(scene.context)
    assert publisher.run_once().full
    scene.client.config_set("maxmemory", 0)
    assert not publisher.run_once().full
    assert published(scene, worker.incarnation)


# ------------------------------------------------------------------ cancel


def wants_cancelled(scene: Scene, number: int, *indexes: int) -> None:
    scene.client.hset(scene.keys.cancel, frame_id(number), ",".join(map(str, indexes)))


def mark(worker: Worker) -> tuple[int, int, int, str]:
    word = worker.view.get(layout.C_CANCEL_ROW)
    return (
        (word >> 32) - 1,
        word & 0xFFFFFFFF,
        worker.view.get(layout.C_CANCEL_STEP),
        worker.view.text(layout.C_CANCEL_ID),
    )


def test_the_job_in_user_code_is_marked_with_its_step(scene: Scene) -> None:
    worker = scene.worker()
    worker.lease(frame(7))
    row = worker.lease(frame(1, 4))
    worker.runs(row, 2, step=99)
    wants_cancelled(scene, 1, 1, 2)
    assert Canceller(scene.context).run_once() == CancelReport({0: f"{frame_id(1).decode()}.2"})
    assert mark(worker) == (row, 2, 99, frame_id(1).decode())


def test_coroutines_are_marked_one_after_the_other(scene: Scene) -> None:
    worker = scene.worker()
    row = worker.lease(frame(1, 4))
    for index in range(3):
        worker.hands.set_state(row, index, layout.JOB_STARTED)
    wants_cancelled(scene, 1, 0, 1, 3)
    duty = Canceller(scene.context)
    marked = []
    for _ in range(4):
        duty.run_once()
        marked.append(mark(worker)[:3])
        assert duty.next_in_s is not None and duty.next_in_s < 1
    assert marked == [(row, 0, 0), (row, 1, 0), (row, 0, 0), (row, 1, 0)]


def test_a_mark_whose_job_is_over_is_taken_back(scene: Scene) -> None:
    worker = scene.worker()
    row = worker.lease(frame(1))
    worker.runs(row, 0)
    wants_cancelled(scene, 1, 0)
    duty = Canceller(scene.context)
    duty.run_once()
    worker.hands.set_state(row, 0, layout.JOB_DONE)
    duty.run_once()
    assert worker.view.get(layout.C_CANCEL_ROW) == 0


def test_without_requests_nothing_is_read_from_the_board(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = scene.worker()
    monkeypatch.setattr(worker.view, "rows", None)
    assert Canceller(scene.context).run_once() == CancelReport({})


# ------------------------------------------------------------------ audit


def auditor(scene: Scene) -> Auditor:
    return Auditor(scene.context, after_s=600, again_s=600)


def ten_minutes(scene: Scene, duty: Auditor) -> AuditReport:
    duty.run_once()
    scene.clock.advance(ms=600_000)
    return duty.run_once()


def test_a_depth_that_drifted_is_counted_again(scene: Scene) -> None:
    scene.client.rpush(scene.keys.queue("high"), frame(1, 3), frame(2, 2))
    scene.client.zadd(scene.keys.sorted("low"), {frame(3, 4, lane="low"): 1})
    later(scene, 60_000, frame(4, 6))
    scene.client.delete(scene.keys.depth)
    scene.client.hset(scene.keys.depth, mapping={"high": 7, "low:sorted": 4})
    duty = auditor(scene)
    assert duty.run_once() == AuditReport()
    scene.clock.advance(ms=599_000)
    assert duty.run_once() == AuditReport()
    scene.clock.advance(ms=1_000)
    corrected: dict[str, int] = {}
    for _ in range(3):  # one part a pass
        corrected |= duty.run_once().corrected
    assert corrected == {"high": 5, "delayed": 6}
    assert scene.depth() == {"high": 5, "low:sorted": 4, "delayed": 6}


def test_a_long_lane_is_counted_in_slices(scene: Scene) -> None:
    scene.client.rpush(scene.keys.queue("high"), *(frame(k, 2) for k in range(400)))
    scene.client.hset(scene.keys.depth, "high", 1)
    duty = auditor(scene)
    assert ten_minutes(scene, duty) == AuditReport()
    assert duty.next_in_s is not None and duty.next_in_s < 1  # it goes on soon
    assert duty.run_once() == AuditReport({"high": 800})
    assert scene.depth()["high"] == 800


def test_a_lane_that_moves_is_not_corrected(scene: Scene) -> None:
    scene.client.rpush(scene.keys.queue("high"), *(frame(k, 2) for k in range(400)))
    scene.client.hset(scene.keys.depth, "high", 1)
    duty = auditor(scene)
    ten_minutes(scene, duty)
    scene.client.rpush(scene.keys.queue("high"), frame(999))
    scene.client.hincrby(scene.keys.depth, "high", 1)
    assert duty.run_once() == AuditReport()
    assert scene.depth()["high"] == 2


def test_a_change_in_the_last_moment_wins(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.client.rpush(scene.keys.queue("high"), frame(1, 3))
    scene.client.hset(scene.keys.depth, "high", 7)
    duty = auditor(scene)
    duty.run_once()
    scene.clock.advance(ms=600_000)
    client = scene.context.door.client
    pipeline = client.pipeline

    def moved_first(**options: Any) -> Any:
        pipe = pipeline(**options)
        execute = pipe.execute

        def late(*args: Any, **kwargs: Any) -> Any:
            scene.client.hincrby(scene.keys.depth, "high", 1)
            return execute(*args, **kwargs)

        pipe.execute = late
        return pipe

    monkeypatch.setattr(client, "pipeline", moved_first)
    # through another client, as the change comes from another process
    assert duty.run_once() == AuditReport()
    assert scene.depth() == {"high": 8}


def test_a_change_after_the_count_wins(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.client.rpush(scene.keys.queue("high"), frame(1, 3))
    scene.client.hset(scene.keys.depth, "high", 7)
    duty = auditor(scene)
    duty.run_once()
    scene.clock.advance(ms=600_000)
    correct = housekeeping.correct_depth

    def late(*args: Any) -> bool:
        scene.client.hincrby(scene.keys.depth, "high", 1)
        return correct(*args)

    monkeypatch.setattr(housekeeping, "correct_depth", late)
    assert duty.run_once() == AuditReport()
    assert scene.depth() == {"high": 8}


def test_an_empty_lane_has_no_depth(scene: Scene) -> None:
    scene.client.hset(scene.keys.depth, mapping={"gone": 4, "gone:sorted": -3})
    assert auditor(scene).run_once() == AuditReport({"gone": 0, "gone:sorted": 0})
    assert scene.depth() == {}


def test_a_hash_that_nobody_answers_for_is_given_to_the_reaper(scene: Scene) -> None:
    worker = scene.worker()
    scene.hold(worker.incarnation, frame(2))
    scene.client.delete(scene.keys.incarnations)  # the worker of this host: renewal sends it to take over
    scene.hold("ORPHAN".ljust(26, "-"), frame(1))
    duty = auditor(scene)
    assert duty.run_once() == AuditReport()  # a takeover may be under way
    assert duty.run_once() == AuditReport({}, ("ORPHAN".ljust(26, "-"),))
    assert scene.incarnations() == ["ORPHAN"]
    assert duty.run_once() == AuditReport()


def test_an_orphan_that_is_gone_at_the_second_look_stays_gone(scene: Scene) -> None:
    scene.hold("ORPHAN".ljust(26, "-"), frame(1))
    duty = auditor(scene)
    duty.run_once()
    scene.client.delete(scene.keys.processing("ORPHAN".ljust(26, "-")))
    assert duty.run_once() == AuditReport()
    assert scene.incarnations() == []


# ------------------------------------------------------------------ trim


def bucket(scene: Scene, name: str, fields: int, *, closed_ago_ms: int, opened: int = 0) -> bytes:
    key = scene.keys.bucket(1_700_000_000, name)
    scene.client.hset(key, mapping={f"{k:026d}": "C,1,0,0,0,high,EMAIL*1" for k in range(fields)})
    scene.client.hset(key, "open", opened)
    scene.client.zadd(scene.keys.closed, {key: scene.redis_ms() - closed_ago_ms})
    return key


def test_beyond_the_limit_the_oldest_closed_snapshots_go(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(snapshots_max=1_000)
    oldest = bucket(scene, "A", 600, closed_ago_ms=300_000)
    again = bucket(scene, "B", 600, closed_ago_ms=290_000, opened=1)  # a replay opened it again
    older = bucket(scene, "C", 300, closed_ago_ms=280_000)
    newer = bucket(scene, "D", 300, closed_ago_ms=270_000)
    fresh = bucket(scene, "E", 600, closed_ago_ms=1_000)
    report = Trimmer(scene.context).run_once()
    left = {key for key in (oldest, again, older, newer, fresh) if scene.client.exists(key)}
    assert left == {again, newer, fresh}
    assert (report.dropped, report.fields) == (902, 902)  # with their counts of open jobs
    assert set(scene.client.zrange(scene.keys.closed, 0, -1)) == {newer, fresh}


def test_what_closed_within_the_last_minute_stays_whatever_the_limit(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(snapshots_max=1_000)
    fresh = bucket(scene, "A", 1_500, closed_ago_ms=50_000)
    assert Trimmer(scene.context).run_once().dropped == 0
    assert scene.client.exists(fresh)


def test_below_the_limit_nothing_goes(scene: Scene) -> None:
    bucket(scene, "A", 500, closed_ago_ms=300_000)
    trimmer = Trimmer(scene.context)
    assert (trimmer.run_once().dropped, trimmer.run_once().fields) == (0, 501)


def test_names_of_buckets_that_redis_expired_are_forgotten(scene: Scene) -> None:
    gone = bucket(scene, "A", 1, closed_ago_ms=4_000_000)
    there = bucket(scene, "B", 1, closed_ago_ms=4_000_000)
    recent = bucket(scene, "C", 1, closed_ago_ms=3_000_000)
    scene.client.delete(gone)
    Trimmer(scene.context).run_once()
    assert set(scene.client.zrange(scene.keys.closed, 0, -1)) == {there, recent}
    assert scene.client.exists(there)


def test_waiters_whose_time_is_over_are_removed(scene: Scene) -> None:
    now = scene.redis_ms()
    scene.client.zadd(scene.keys.waiting, {"old": now - 1, "new": now + 60_000})
    assert Trimmer(scene.context).run_once().waiters == 1
    assert scene.client.zrange(scene.keys.waiting, 0, -1) == [b"new"]


def test_cancel_requests_of_jobs_that_have_ended_are_swept(scene: Scene) -> None:
    scene.track(frame(1, 3), frame(2), frame(3))
    states = {1: "CQD", 2: "X", 3: "Q"}
    for number, value in states.items():
        total = len(value)
        text = f"{value},{total},0,0,0,high,EMAIL*{total}"
        scene.client.hset(scene.bucket(frame(number)), frame_id(number), text)
    wants_cancelled(scene, 1, 0, 2)  # both have ended, the one in the middle has not
    wants_cancelled(scene, 2, 0)
    wants_cancelled(scene, 3, 0)
    wants_cancelled(scene, 4, 0)  # unknown
    scene.client.hset(scene.keys.cancel, "no id", "1")
    trimmer = Trimmer(scene.context)
    assert trimmer.run_once().cancels == 0
    scene.client.hset(scene.keys.cancel, frame_id(1), "0,1,2")  # somebody wants one more
    assert trimmer.run_once().cancels == 3
    assert scene.client.hgetall(scene.keys.cancel) == {frame_id(1): b"0,1,2", frame_id(3): b"0"}


# ------------------------------------------------------------------ burst


@pytest.mark.parametrize("where", ["queue", "sorted", "delayed", "processing"])
def test_burst_waits_for_every_place_where_a_job_can_be(scene: Scene, where: str) -> None:
    burst = Burst(scene.context)
    worker = scene.worker()
    key = {
        "queue": scene.keys.queue("low"),
        "sorted": scene.keys.sorted("low"),
        "delayed": scene.keys.delayed,
        "processing": scene.keys.processing(worker.incarnation),
    }[where]
    if where == "queue":
        scene.client.rpush(key, frame(1))
    elif where == "processing":
        scene.hold(worker.incarnation, frame(1))
    else:
        scene.client.zadd(key, {frame(1): 1})
    assert [burst.run_once().done for _ in range(3)] == [False] * 3
    scene.client.delete(key)
    assert [burst.run_once().done for _ in range(2)] == [False, True]  # two looks in a row
    assert scene.board.get(layout.H_BURST_DONE) == 1


def test_a_job_between_two_looks_starts_burst_over(scene: Scene) -> None:
    burst = Burst(scene.context)
    assert burst.run_once().quiet
    scene.client.rpush(scene.keys.queue("low"), frame(1))
    assert not burst.run_once().quiet
    scene.client.delete(scene.keys.queue("low"))
    assert not burst.run_once().done
    assert scene.board.get(layout.H_BURST_DONE) == 0
