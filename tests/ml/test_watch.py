"""The watch: what it measures, when it falls, when it comes back, and what that saves."""

import random

import pytest

from tests.ml import made
from tqe.ml.gate import figures
from tqe.ml.order import Bound
from tqe.ml.predict import Ordered
from tqe.ml.simulate import Fifo, fifo_wait_s, replay, stretched
from tqe.ml.watch import WINDOW_JOBS, Report, Watch, floor_of, order_share, rank_correlation, ranks


def test_ranks_and_correlation_by_hand() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [9.0, 5.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 1.0, 1.0], [9.0, 5.0, 1.0]) == 0.0


def test_the_share_of_an_order_by_hand() -> None:
    durations = [1.0, 2.0, 3.0]
    assert order_share(durations, durations) == 1.0
    assert order_share([3.0, 2.0, 1.0], durations) == pytest.approx(-1.0)
    assert order_share([5.0, 5.0, 5.0], durations) == pytest.approx(0.0)
    assert order_share([1.0, 9.0, 4.0], [2.0, 2.0, 2.0]) == 1.0  # nothing to lose


def feed(watch: Watch, windows: int, model: str = "good", mean: str = "good", seed: int = 1) -> list[Report]:
    draw = random.Random(seed)

    def predict(how: str, duration_s: float) -> float:
        return {"good": duration_s * draw.lognormvariate(0, 0.3), "bad": 1 / duration_s}[how]

    found = []
    for _ in range(windows * WINDOW_JOBS):
        s = draw.lognormvariate(0, 1)
        report = watch.completed(model_s=predict(model, s), mean_s=predict(mean, s), duration_s=s)
        if report is not None:
            found.append(report)
    assert len(found) == windows
    return found


def test_two_bad_windows_in_a_row_and_only_these_take_a_rung_out() -> None:
    watch = Watch(floor=0.4)
    feed(watch, 3)
    feed(watch, 1, model="bad")
    assert watch.rung == "model"
    feed(watch, 1)
    feed(watch, 1, model="bad")
    assert watch.rung == "model"
    first, second = feed(watch, 1, model="bad") + feed(watch, 1, model="bad")
    assert first.changed and first.rung == "mean" and not second.changed
    assert first.regret > 1.5 and first.rank_correlation < -0.9


def test_down_to_fifo_and_back_only_after_two_good_windows() -> None:
    watch = Watch(floor=0.4)
    feed(watch, 2, model="bad", mean="bad")
    assert watch.rung == "fifo"
    feed(watch, 1)
    assert watch.rung == "fifo"
    feed(watch, 1, model="bad", mean="good")
    assert watch.rung == "mean"
    feed(watch, 2)
    assert watch.rung == "model"


def test_without_a_model_the_ladder_begins_at_the_mean() -> None:
    watch = Watch(floor=0.4, has_model=False)
    assert watch.rung == "mean"
    feed(watch, 2, model="good", mean="bad")
    assert watch.rung == "fifo"


def test_jobs_without_a_prediction_say_nothing() -> None:
    watch = Watch(floor=0.4)
    for _ in range(3 * WINDOW_JOBS):
        assert watch.completed(model_s=None, mean_s=None, duration_s=1.0) is None
    assert watch.completed(model_s=None, mean_s=2.0, duration_s=1.0) is None


def test_the_floor_is_half_of_the_worst_healthy_window() -> None:
    draw = random.Random(2)
    durations = [draw.lognormvariate(0, 1) for _ in range(5 * WINDOW_JOBS)]
    assert floor_of(durations, durations) == 0.5
    assert floor_of([1 / s for s in durations], durations) == 0.0
    assert floor_of(durations[:10], durations[:10]) == 0.0


def test_inverted_predictions_that_slipped_past_the_gate_are_ended_in_time() -> None:
    """Watch on: at most +5 % mean and +15 % p99 over the run; without it far more."""
    trace = made.trace(12_000)
    servers = 4
    durations = list(trace.duration_s)
    arrive_s = stretched(trace.submit_s, durations, servers, 0.9)

    def run(watched: bool) -> tuple[float, float, int]:
        watch, fell_after = Watch(floor=0.3), [0]

        def predict(job: int, now_s: float) -> float | None:
            return None if watched and watch.rung == "fifo" else 1.0 / durations[job]

        def completed(job: int) -> None:
            inverted = 1.0 / durations[job]
            watch.completed(model_s=inverted, mean_s=inverted, duration_s=durations[job])
            fell_after[0] += watch.rung != "fifo"

        policy = Ordered(
            predict,
            mode="bounded",
            scale_s=1.0,
            servers=servers,
            bound=Bound(factor=2.0, wait_s=fifo_wait_s(arrive_s, durations, servers)),
            work=lambda job: 1.0,
            on_completed=completed,
        )
        mean, _, p99, _ = figures(arrive_s, durations, replay(arrive_s, durations, servers, policy))
        return mean / fifo[0] - 1, p99 / fifo[2] - 1, fell_after[0]

    fifo = figures(arrive_s, durations, replay(arrive_s, durations, servers, Fifo()))
    mean, p99, after = run(watched=True)
    assert mean <= 0.05 and p99 <= 0.15 and after <= 500
    assert run(watched=False)[0] > 0.1
