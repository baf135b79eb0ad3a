"""Ordering in real workers: shorter jobs first, within the bound, and FIFO whenever anything is wrong."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.predictors import Slow, Told, set_order
from tests.support.waiting import wait_until
from tests.support.worker import Rig, WorkerProcess
from tqe.board import layout
from tqe.worker.ordering import Waiting


def define(rig: Rig) -> None:
    @rig.app.task("JOB")
    def job(n: int, ms: float) -> None:
        rig.journal("began", n)
        time.sleep(ms / 1000)

    @rig.app.task("PLUG")
    def plug() -> None:
        """Keeps a worker busy until a file is there."""
        rig.journal("plugged", os.getpid())
        wait_until(lambda: (rig.folder / "go").exists(), 20, "the plug is pulled")


def start(rig: Rig, *, workers: int = 1) -> list[WorkerProcess]:
    """Workers that are all held up by a plug, so that what is submitted next waits."""
    made = [rig.worker() for _ in range(workers)]
    for _ in made:
        rig.submit("PLUG", priority="high")
    wait_until(lambda: len(rig.journal.notes("plugged")) == workers, 10, "the workers are busy")
    return made


def go(rig: Rig) -> None:
    (rig.folder / "go").touch()


def began(rig: Rig) -> list[int]:
    return [note.words[1] for note in rig.journal.notes("began")]


def finish(rig: Rig) -> None:
    for worker in rig.workers:
        if worker.running:
            assert worker.drain() == 0, worker.told()
    assert rig.books().problems() == []


MS = [40, 3, 12, 30, 1, 8, 25, 2, 18, 5]


def submit_all(rig: Rig, ms: list[Any], *, frames_of: int = 1, **options: Any) -> None:
    jobs = [{"n": n, "ms": m} for n, m in enumerate(ms)]
    for start_at in range(0, len(jobs), frames_of):
        rig.frame("JOB", jobs[start_at : start_at + frames_of], **options)


def by_ms(ms: list[Any]) -> list[int]:
    return sorted(range(len(ms)), key=lambda n: ms[n])


@pytest.mark.parametrize("frames_of", [1, 4, 10])
def test_shorter_jobs_go_first(rig: Rig, frames_of: int) -> None:
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    submit_all(rig, MS, frames_of=frames_of)
    go(rig)
    rig.wait_ended()
    assert began(rig) == by_ms(MS)
    assert worker.counter("scored") == len(MS)  # each once
    entered = [n // frames_of for n in by_ms(MS)]
    assert worker.counter("overtakes") == sum(max(entered[: at + 1]) > e for at, e in enumerate(entered))
    assert worker.counter("bound_hits") == 0  # nobody has waited for a month
    finish(rig)


def test_equal_predictions_stay_in_the_order_of_entry(rig: Rig) -> None:
    """What goes back and comes again keeps its place among its like, between longer and shorter ones."""
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "sjf"})
    start(rig)
    ms = [10, 2, 30] * 8
    submit_all(rig, ms, frames_of=5)
    go(rig)
    rig.wait_ended()
    assert began(rig) == by_ms(ms)
    finish(rig)


def test_a_large_frame_is_cut_and_then_ordered(rig: Rig) -> None:
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    ms = random.Random(5).choices([1, 2, 3, 4, 8], k=300)
    submit_all(rig, ms, frames_of=300)
    go(rig)
    rig.wait_ended(timeout=20)
    assert [ms[n] for n in began(rig)] == sorted(ms)
    assert worker.counter("reordered") >= 290
    finish(rig)


def test_in_a_bounded_lane_nobody_waits_for_those_who_come_later_than_T(rig: Rig) -> None:
    """With T = 0.2 s the long ones run before what entered 0.3 s later, however short that is."""
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "bounded"}, bound_s=0.2)
    (worker,) = start(rig)
    submit_all(rig, [60, 60, 1, 2])
    entered = time.monotonic()
    wait_until(lambda: time.monotonic() > entered + 0.3, 5)
    rig.frame("JOB", [{"n": 10 + n, "ms": 1} for n in range(4)])
    go(rig)
    rig.wait_ended()
    order = began(rig)
    assert order[:2] == [2, 3], "the shorter ones of the first four go first"
    assert set(order[2:4]) == {0, 1} and set(order[4:]) == {10, 11, 12, 13}
    assert worker.counter("bound_hits") >= 4, "the first four had waited for T"
    assert worker.counter("overtakes") >= 2, "the long two among them"
    finish(rig)


@pytest.mark.parametrize(("rung", "least_us", "most_us"), [("model", 4e6, 5e6), ("mean", 2e4, 3e6)])
def test_how_far_the_predictor_in_use_was_off_is_counted(
    rig: Rig, rung: str, least_us: float, most_us: float
) -> None:
    class Both(Told):
        def rungs(self, job: Waiting) -> tuple[float | None, float | None]:
            return 5.0, 0.0

    define(rig)
    rig.predictor = Both()
    set_order(rig, {"normal": "bounded"}, bound_s=10, rung=rung)
    worker = rig.worker()
    submit_all(rig, [20])
    rig.wait_ended()
    wait_until(lambda: worker.counter("predictions") == 1, 10, "the run is judged")
    assert least_us <= worker.counter("prediction_off_us") <= most_us
    finish(rig)


@pytest.mark.parametrize("mode", ["fifo", "shadow"])
def test_a_lane_that_is_not_ordered_is_fifo(rig: Rig, mode: Any) -> None:
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": mode}, bound_s=10)
    (worker,) = start(rig)
    submit_all(rig, MS)
    go(rig)
    rig.wait_ended()
    assert began(rig) == list(range(len(MS)))
    assert worker.counter("reordered") == 0
    finish(rig)


def test_a_mode_is_switched_while_workers_run(rig: Rig) -> None:
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "fifo"})
    start(rig)
    set_order(rig, {"normal": "sjf"})
    submit_all(rig, MS)
    go(rig)
    rig.wait_ended()
    # What the plug held up was asked for before the worker could look at its board.
    assert began(rig)[1:] == [n for n in by_ms(MS) if n != began(rig)[0]]
    finish(rig)


def test_a_job_that_finds_an_idle_worker_is_never_scored(rig: Rig) -> None:
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "sjf"})
    worker = rig.worker()
    for n in range(20):
        rig.submit("JOB", {"n": n, "ms": n % 3}).result(timeout=5)
    assert worker.counter("scored") == 0
    finish(rig)


def test_a_lane_of_jobs_that_are_alike_is_left_in_the_order_of_entry(rig: Rig) -> None:
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    submit_all(rig, [1] * 600, frames_of=600)
    go(rig)
    rig.wait_ended()
    assert began(rig) == list(range(600))
    assert worker.counter("reordered") == 0
    assert worker.counter("scored") < 600  # a sample of each look
    finish(rig)


def test_a_lane_of_jobs_too_short_to_be_worth_it_is_not_scored(rig: Rig) -> None:
    rig.predictor = Told()
    set_order(rig, {"normal": "sjf"})

    @rig.app.task("JOB")
    def job(n: int, ms: float) -> None: ...

    worker = rig.worker()
    rig.frame("JOB", [{"n": n, "ms": 1} for n in range(1_000)])
    rig.wait_ended()
    scored = worker.counter("scored")
    rig.frame("JOB", [{"n": n, "ms": n % 50} for n in range(5_000)])
    rig.wait_ended()
    assert worker.counter("scored") == scored
    assert worker.counter("reordered") == 0
    finish(rig)


def test_a_retried_job_is_scored_again(rig: Rig) -> None:
    @rig.app.task("FLAKY", max_retries=2)
    def flaky(n: int, ms: float) -> None:
        rig.journal("began", n)
        time.sleep(ms / 1000)
        if rig.journal.count("began")[n] == 1:
            raise ValueError("once")

    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    rig.steward()
    rig.frame("FLAKY", [{"n": n, "ms": ms} for n, ms in enumerate((20, 5, 40, 9))])
    go(rig)
    rig.wait_ended()
    assert began(rig)[:2] == [1, 3]
    assert worker.counter("scored") >= 5
    assert set(rig.journal.count("began").values()) == {2}
    finish(rig)


# ------------------------------------------------------------------ what can go wrong


def boom(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no idea")


@pytest.mark.parametrize(
    ("change", "counter"),
    [
        (boom, "fallback_error"),
        (lambda _: math.nan, ""),
        (lambda _: math.inf, ""),
        (lambda _: -1.0, ""),
        (lambda _: None, ""),
        (lambda _: "soon", "fallback_error"),
    ],
    ids=["raises", "nan", "infinite", "negative", "none", "text"],
)
def test_a_broken_predictor_leaves_the_order_of_entry(
    rig: Rig, change: Callable[[float], Any], counter: str
) -> None:
    define(rig)
    rig.predictor = Told(change)
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    submit_all(rig, [3] * 40, frames_of=4)
    go(rig)
    rig.wait_ended()
    assert began(rig) == list(range(40))
    assert not counter or worker.counter(counter) >= 1
    assert worker.view.get(layout.C_SCORING) == 0
    finish(rig)


@pytest.mark.parametrize(
    ("method", "answer"),
    [("boost_us", boom), ("boost_us", lambda *_, **__: math.nan), ("use", boom), ("rungs", boom),
     ("rungs", lambda _: "soon"), ("fallbacks", property(boom))],
    ids=["boost raises", "boost is nan", "use raises", "rungs raise", "rungs are text", "fallbacks raise"],
)  # fmt: skip
def test_a_predictor_that_fails_beside_its_predictions_ends_no_worker(
    rig: Rig, method: str, answer: Any
) -> None:
    define(rig)
    broken = type(
        "Broken", (Told,), {method: answer if isinstance(answer, property) else staticmethod(answer)}
    )
    rig.predictor = broken.__new__(broken)
    vars(rig.predictor).update({k: v for k, v in vars(Told()).items() if k != method})
    set_order(rig, {"normal": "sjf"}, rung="model")
    (worker,) = start(rig)
    submit_all(rig, [3] * 20, frames_of=4)
    go(rig)
    rig.wait_ended()
    assert sorted(began(rig)) == list(range(20)) and worker.running, worker.told()
    finish(rig)


def test_a_version_that_cannot_be_loaded_leaves_the_order_of_entry(rig: Rig) -> None:
    define(rig)
    rig.predictor = Told(fails_to_load=True)
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    submit_all(rig, MS)
    go(rig)
    rig.wait_ended()
    assert began(rig) == list(range(len(MS)))
    assert (worker.counter("fallback_load"), worker.counter("scored")) == (1, 0)
    finish(rig)


def test_a_predictor_that_is_slow_is_not_asked_for_a_while(rig: Rig) -> None:
    define(rig)
    rig.predictor = Slow()
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    submit_all(rig, [n % 3 + 1 for n in range(800)], frames_of=100)
    go(rig)
    rig.wait_ended(timeout=20)
    scored = worker.counter("scored")
    assert worker.counter("fallback_slow") >= 3 and "not scored for a minute" in worker.told()
    rig.frame("JOB", [{"n": 1_000 + n, "ms": m} for n, m in enumerate(MS)])
    rig.wait_ended()
    assert [n for n in began(rig) if n >= 1_000] == list(range(1_000, 1_000 + len(MS)))
    assert worker.counter("scored") == scored
    finish(rig)


def test_a_worker_that_dies_while_it_scores_names_the_model_and_loses_nothing(rig: Rig) -> None:
    def die(seconds: float) -> float:
        if not rig.journal.notes("died"):
            rig.journal("died", 1)
            os.kill(os.getpid(), signal.SIGSEGV)
        return seconds

    define(rig)
    rig.predictor = Told(die)
    set_order(rig, {"normal": "sjf"})
    (worker,) = start(rig)
    submit_all(rig, MS, frames_of=5)
    go(rig)
    assert worker.wait() == -signal.SIGSEGV
    assert worker.view.get(layout.C_SCORING) == 0x00C0FFEE
    worker.bury()
    rig.steward()
    rig.worker()
    rig.wait_ended()
    assert sorted(began(rig)) == list(range(len(MS)))
    assert rig.stats().get("retried", 0) == 0, "nobody is charged"
    finish(rig)


def test_workers_that_die_and_share_a_lane_lose_and_repeat_nothing(rig: Rig) -> None:
    """Three workers take windows apart while two of them are killed."""
    define(rig)
    rig.predictor = Told()
    set_order(rig, {"normal": "bounded"}, bound_s=1.0)
    made = start(rig, workers=3)
    rig.steward()
    ms = random.Random(7).choices([1, 2, 4, 12], k=400)
    submit_all(rig, ms, frames_of=7)
    go(rig)
    for worker, ended in zip(made[:2], (80, 160), strict=True):
        wait_until(lambda least=ended: len(set(began(rig))) >= least, 20)
        worker.kill()
        worker.bury()
    rig.worker()
    rig.wait_ended(timeout=30)
    # Both were recovered: one that held nothing any more is not waited for by its jobs.
    wait_until(lambda: all(dead.view.get(layout.C_STATE) == layout.RECOVERED for dead in made[:2]), 20)
    assert set(began(rig)) == set(range(400))
    assert len(began(rig)) <= 402, "only what ran is repeated"
    finish(rig)


@pytest.mark.alone
def test_what_goes_back_does_not_wait_for_the_long_job_that_is_kept(rig: Rig) -> None:
    """One worker takes all and keeps a long job; the other must get the rest while it runs."""
    define(rig)
    rig.redis.script_flush()  # as if it was the first worker that this Redis has ever seen
    first = rig.worker()
    rig.frame("JOB", [{"n": n, "ms": 1_500 if n == 0 else 1} for n in range(10)])
    wait_until(lambda: 0 in began(rig), 5)
    second = rig.worker()
    wait_until(lambda: len(began(rig)) == 10, 1.3, "the other nine run beside the long one")
    rig.wait_ended()
    assert (first.counter("completed"), second.counter("completed")) == (1, 9)
    finish(rig)


def test_a_features_function_that_hangs_costs_one_worker_and_no_job_its_attempt(rig: Rig) -> None:
    """The supervisor kills a worker whose loop stands still; the next one does not call that function."""

    def hangs(payload: dict[str, Any]) -> dict[str, Any]:
        rig.journal("hangs", 1)
        while True:
            time.sleep(1)

    @rig.app.task("HANGS", features=hangs)
    def job() -> None:
        rig.journal("began", 1)

    worker = rig.worker()
    rig.steward()
    rig.submit("HANGS")
    wait_until(lambda: rig.journal.notes("hangs"), 10, "it is in the function")
    wait_until(lambda: worker.view.get(layout.C_FEATURES) == 1, 5, "the board says so")
    worker.view.set(layout.C_KILL_KIND, layout.KILL_STUCK)  # what the supervisor does after ten seconds
    worker.kill()
    worker.bury()
    rig.worker()
    rig.wait_ended()
    assert len(rig.journal.notes("hangs")) == 1 and began(rig) == [1]
    assert rig.stats().get("retried", 0) == 0 and rig.board.features_off("HANGS")
    finish(rig)
