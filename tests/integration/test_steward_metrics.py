"""What `/metrics` shows: the queue, the board over the deaths of workers, the steward, the watchdog."""

import contextlib
import re
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support.fake_clock import FakeClock
from tests.support.housework import T0_US, Scene, frame
from tests.support.redis_server import RedisServer
from tqe.board import layout
from tqe.board.board import Board
from tqe.job import IDS
from tqe.steward.backlog import BacklogReader
from tqe.steward.exporter import Climb, Exporter, TotalsReader
from tqe.steward.recovery import Recovery
from tqe.steward.watchdog import Watchdog
from tqe.telemetry import metrics


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


def exporter(scene: Scene) -> Exporter:
    reader = TotalsReader(scene.context)
    reader.run_once()
    BacklogReader(scene.context).run_once()
    return Exporter(scene.context, reader, lambda: {"promote": metrics.DutySample(3, 1, 0.25, 0.5)})


def page(made: Exporter) -> str:
    served = metrics.serve(made.sample, port=0, address="127.0.0.1")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text
    finally:
        served.close()


def test_the_page_shows_queue_board_and_steward(scene: Scene) -> None:
    scene.client.hset(scene.keys.depth, mapping={"high": 5, "high:sorted": 2, "delayed": 3, "theirs": 1})
    scene.client.hset(scene.keys.dlq, "x", "y")
    scene.client.hset(scene.keys.stats, mapping={"submitted": 100, "dead": 1})
    scene.client.hset(scene.keys.means, "EMAIL", 1_000)
    scene.client.rpush(scene.keys.queue("high"), frame(2))
    scene.client.zadd(scene.keys.sorted("high"), {frame(3): T0_US})
    scene.client.sadd(scene.keys.paused, "low")
    worker = scene.worker()
    worker.runs(worker.lease(frame(1)), 0)
    scene.hold(worker.incarnation, frame(1))
    worker.view.add("fetches", 4)
    worker.view.add("fetch_us", 2_000)
    scene.context.sightings.observe(scene.board, scene.clock.boottime_ns())
    scene.clock.advance(ms=2_000)
    start = layout.O_TASKS
    for word, value in (
        (layout.T_COMPLETED, 7),
        (layout.T_SUM_NS, 7_000_000),
        (layout.T_RUN_BINS + 8 * 9, 7),
    ):
        worker.view.set(start + word, value)
    lines = set(page(exporter(scene)).splitlines())
    assert {
        'taskqueue_queue_depth{priority="high"} 7.0',
        'taskqueue_queue_sorted{priority="high"} 2.0',
        'taskqueue_queue_depth{priority="low"} 0.0',
        'taskqueue_queue_depth{priority="other"} 1.0',  # never a name that only data brought
        'taskqueue_queue_paused{priority="low"} 1.0',
        'taskqueue_predicted_backlog_seconds{priority="high"} 0.007',  # seven jobs of a millisecond each
        'taskqueue_predicted_backlog_seconds{priority="low"} 0.0',
        "taskqueue_scheduled_jobs 3.0",
        "taskqueue_dlq_jobs 1.0",
        "taskqueue_redis_up 1.0",
        "taskqueue_jobs_submitted_total 100.0",
        "taskqueue_jobs_completed_total 0.0",
        'taskqueue_workers{state="busy"} 1.0',
        "taskqueue_workers_wanted 2.0",
        "taskqueue_processing_active 1.0",
        "taskqueue_leases 1.0",
        "taskqueue_not_consuming 0.0",
        "taskqueue_oldest_running_seconds 2.0",
        "taskqueue_fetch_round_trip_seconds_count 4.0",
        "taskqueue_fetch_round_trip_seconds_sum 0.002",
        'taskqueue_task_jobs_total{outcome="completed",type="EMAIL"} 7.0',
        'taskqueue_job_execution_duration_seconds_bucket{le="0.000512",type="EMAIL"} 0.0',
        'taskqueue_job_execution_duration_seconds_bucket{le="0.001024",type="EMAIL"} 7.0',
        'taskqueue_job_execution_duration_seconds_bucket{le="+Inf",type="EMAIL"} 7.0',
        'taskqueue_job_execution_duration_seconds_sum{type="EMAIL"} 0.007',
        'taskqueue_steward_runs_total{duty="promote"} 3.0',
        'taskqueue_steward_failures_total{duty="promote"} 1.0',
        "taskqueue_steward_lag_seconds 0.5",
    } <= lines


def test_the_page_shows_how_lanes_are_ordered_and_that_the_watch_has_stepped_down(scene: Scene) -> None:
    def lines() -> set[str]:
        found = set(page(exporter(scene)).splitlines())
        return {line for line in found if line.startswith(("taskqueue_ordering_mode", "taskqueue_model_"))}

    before = lines()
    assert {
        'taskqueue_ordering_mode{mode="bounded",priority="high"} 1.0',
        'taskqueue_ordering_mode{mode="sjf",priority="high"} 0.0',
        'taskqueue_model_rung{rung="fifo"} 1.0',
        'taskqueue_model_chosen_rung{rung="fifo"} 1.0',
    } <= before
    scene.client.hset(
        scene.keys.model, mapping={"version": "v1", "chosen": "model", "rung": "mean", "mode:high": "sjf"}
    )
    assert {
        'taskqueue_ordering_mode{mode="sjf",priority="high"} 1.0',
        'taskqueue_ordering_mode{mode="bounded",priority="low"} 1.0',
        'taskqueue_model_rung{rung="mean"} 1.0',
        'taskqueue_model_rung{rung="model"} 0.0',
        'taskqueue_model_chosen_rung{rung="model"} 1.0',
    } <= lines()
    scene.client.hset(scene.keys.model, mapping={"chosen": "hierarchical_mean", "rung": b"\xff"})
    assert {
        'taskqueue_model_rung{rung="mean"} 1.0',
        'taskqueue_model_chosen_rung{rung="mean"} 1.0',
    } <= lines(), "what makes no sense counts as the gate's choice"


def test_before_redis_was_read_the_page_says_nothing_of_the_queue(scene: Scene) -> None:
    text = page(Exporter(scene.context, TotalsReader(scene.context)))
    assert "taskqueue_redis_up 0.0" in text
    assert "taskqueue_jobs_submitted" not in text and "taskqueue_dlq" not in text


def test_the_oldest_job_is_found_in_both_parts_of_a_lane(scene: Scene) -> None:
    now_us = scene.redis_ms() * 1000
    scene.client.rpush(scene.keys.queue("high"), frame(1, enqueued_us=now_us - 5_000_000), frame(2))
    scene.client.zadd(scene.keys.sorted("high"), {frame(3, enqueued_us=now_us - 60_000_000): T0_US})
    scene.client.rpush(scene.keys.queue("low"), b"no frame")
    queue = exporter(scene).sample().queue
    assert queue is not None
    lanes = queue.lanes
    assert 60 <= lanes["high"].oldest_s < 120
    assert (lanes["normal"].oldest_s, lanes["low"].oldest_s) == (0, 0)


def test_counters_climb_through_deaths_recoveries_and_new_lives(scene: Scene) -> None:
    """At each moment of a worker's end the sums are those of before: a slot that is dead still counts."""
    made = exporter(scene)

    def completed() -> tuple[int, int]:
        sample = made.sample()
        return sample.counters["completed"], sample.tasks["EMAIL"].outcomes["completed"]

    first = scene.worker(0)
    first.view.add("completed", 7)
    first.view.add("loop_lag_us", 9_000)
    first.runs(first.lease(frame(1)), 0)
    first.view.set(layout.O_TASKS + layout.T_COMPLETED, 7)
    assert completed() == (7, 7)
    first.dies()
    assert completed() == (7, 7)
    Recovery(scene.context).run_once()
    assert completed() == (7, 7)
    scene.board.retire(first.view)
    assert completed() == (7, 7)
    assert first.view.get(layout.C_STATE) == layout.FREE
    second = scene.worker(1)
    second.view.add("completed", 1)
    second.runs(second.lease(frame(2)), 0)
    second.view.set(layout.O_TASKS + layout.T_COMPLETED, 1)
    assert completed() == (8, 8)
    # They are on the board, so the next steward goes on with them.
    assert exporter(scene).sample().counters["completed"] == 8
    assert scene.board.retired.counters()["loop_lag_us"] == 0
    assert scene.board.counted()["recovered"] == 1


def test_no_sum_is_taken_while_the_supervisor_moves_counters(scene: Scene) -> None:
    worker = scene.worker()
    worker.view.add("completed", 7)
    made = exporter(scene)
    assert made.sample().counters["completed"] == 7
    scene.board.set(layout.H_RETIRING, 1)
    scene.board.retired.add("completed", 7)  # added, and not yet wiped
    assert made.sample().counters["completed"] == 7
    worker.view.wipe()
    scene.board.set(layout.H_RETIRING, 2)
    assert made.sample().counters["completed"] == 7


def test_scrapes_beside_a_thousand_deaths_never_fall(scene: Scene) -> None:
    made = exporter(scene)
    stop = threading.Event()
    seen: list[int] = [0]
    fell: list[tuple[int, int]] = []

    def scrape() -> None:
        while not stop.is_set():
            value = made.sample().counters.get("completed", 0)
            if value < seen[0]:
                fell.append((seen[0], value))
            seen[0] = value

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for number in range(1000):
            slot = scene.board.slots[number % 2]
            slot.set(layout.C_STATE, layout.LIVE)
            slot.bind(0, "EMAIL")[layout.T_COMPLETED // layout.WORD] = 1
            slot.add("completed")
            slot.set(layout.C_STATE, layout.RECOVERED)
            scene.board.retire(slot)
    finally:
        stop.set()
        thread.join()
    assert not fell
    sample = made.sample()
    assert sample.counters["completed"] == 1000
    assert sample.tasks["EMAIL"].outcomes["completed"] == 1000


def test_more_task_names_than_blocks_are_added_up_in_the_last() -> None:
    board = Board(1)
    for number in range(2):
        slot = board.slots[0]
        for k in range(layout.TASKS_MAX):
            slot.bind(k, f"T{number}-{k}")[layout.T_COMPLETED // layout.WORD] = 1
        board.retire(slot)
    counted = {name: words[layout.T_COMPLETED // layout.WORD] for name, words in board.retired.tasks()}
    assert len(counted) == layout.TASKS_MAX
    assert sum(counted.values()) == 2 * layout.TASKS_MAX


def test_totals_of_a_redis_that_forgot_go_on_from_where_they_were() -> None:
    board = Board(1)

    def shown(**read: int) -> tuple[int, int]:
        """As the next steward shows it, which knows no more than the board."""
        told = Climb(board).take(read)
        return told["completed"], told["dead"]

    assert shown(completed=1000, dead=7) == (1000, 7)
    assert shown(completed=990, dead=7) == (1000, 7)
    assert shown(completed=995, dead=8) == (1005, 8)
    assert shown() == (1005, 8)
    assert shown(completed=3, unknown=9) == (1008, 8)


def test_the_series_of_one_metric_are_capped_and_stay_where_they_are() -> None:
    def task(jobs: int) -> metrics.TaskSample:
        return metrics.TaskSample({"completed": jobs}, [jobs] * 24, 0.5, [0] * 24, 0.0)

    tasks = {f"T{k}": task(k) for k in range(512)}
    shown = metrics.capped(tasks)
    series = [sum(1 for one in family.samples) for family in metrics.families(metrics.Sample(tasks=tasks))]
    assert max(series) <= metrics.SERIES_MAX
    assert list(shown)[:3] == ["T0", "T1", "T2"] and list(shown)[-1] == metrics.OTHER
    assert sum(one.outcomes["completed"] for one in shown.values()) == sum(range(512))
    assert metrics.capped({"A": task(1)}) == {"A": task(1)}
    assert metrics.capped({}) == {}


# ------------------------------------------------------------------ the watchdog


def waits(scene: Scene) -> None:
    scene.client.rpush(scene.keys.queue("high"), frame(1))


def look(scene: Scene, dog: Watchdog, seconds: int) -> bool:
    for _ in range(seconds):
        dog.run_once()
        scene.clock.advance(ms=1000)
    return scene.context.not_consuming


def test_jobs_that_nobody_takes_are_noticed(scene: Scene) -> None:
    worker, dog = scene.worker(), Watchdog(scene.context)
    assert not look(scene, dog, 30)
    waits(scene)
    assert not look(scene, dog, 10)
    assert look(scene, dog, 2)
    assert exporter(scene).sample().not_consuming
    worker.view.add("fetched")
    assert not look(scene, dog, 1)


@pytest.mark.parametrize("why", ["busy", "async", "paused", "draining", "other lane"])
def test_what_looks_like_it_and_is_not(scene: Scene, why: str) -> None:
    worker, dog = scene.worker(), Watchdog(scene.context)
    if why == "other lane":
        scene.client.rpush(scene.keys.queue("theirs"), frame(1))
    else:
        waits(scene)
    if why == "busy":
        worker.runs(worker.lease(frame(2)), 0)
    elif why == "async":
        worker.view.set(layout.C_ASYNC, 3)
    elif why == "paused":
        scene.client.sadd(scene.keys.paused, "high")
    elif why == "draining":
        worker.view.set(layout.C_STOP, layout.STOP_DRAIN)
    assert not look(scene, dog, 30)


def test_jobs_that_wait_without_any_worker_are_noticed_too(scene: Scene) -> None:
    waits(scene)
    assert look(scene, Watchdog(scene.context), 12)


def test_a_frame_id_never_becomes_a_label(scene: Scene) -> None:
    worker = scene.worker()
    worker.runs(worker.lease(frame(1)), 0)
    text = page(exporter(scene))
    assert not re.search(r"[0-9A-HJKMNP-TV-Z]{26}", text)
    assert IDS.frame_id().decode() not in text
