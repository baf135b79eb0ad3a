"""What came of an order, counted: overtakes, the bound, and how far predictions were off."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest

from tqe import codec
from tqe.worker.tally import Tally

T_US = 10_000_000
NOW_US = 1_764_000_000_000_000


class View:
    """The counters of a slot."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()

    def add(self, counter: str, by: int = 1) -> None:
        self.counted[counter] += by


@pytest.fixture
def view() -> View:
    return View()


@pytest.fixture
def tally(view: View) -> Tally:
    return Tally(cast(Any, view))


def job(age_us: int, *, lane: str = "normal", scored: bool = True) -> bytes:
    return codec.pack(
        [(b"JOB", b"{}", b"", False)],
        frame_id=b"01JD8Z3V7Q8K2M4N6P8R0T%04d" % (age_us % 10_000),
        lane=lane,
        tracked=True,
        flags=codec.SCORED if scored else 0,
        enqueued_us=NOW_US - age_us,
    )


def test_who_is_taken_after_a_later_one_was_overtaken(tally: Tally, view: View) -> None:
    tally.taken([job(5), job(3), job(4), job(1)], (), {"normal": T_US}, NOW_US)
    assert view.counted == {"overtakes": 1}
    tally.taken([job(2), job(1), job(9, lane="low")], (), {"normal": T_US}, NOW_US)
    assert view.counted == {"overtakes": 2}, "over fetches, by lane, and of equal ages none"


def test_a_job_that_was_scored_now_counts_and_one_of_a_fifo_lane_does_not(tally: Tally, view: View) -> None:
    now, never = job(4, scored=False), job(3, scored=False)
    tally.taken([job(1), now, never, b"", never[:60]], {now}, {"normal": T_US}, NOW_US)
    assert view.counted == {"overtakes": 1}


def test_jobs_that_waited_for_the_bound_are_counted(tally: Tally, view: View) -> None:
    waiting = [job(T_US + 1), job(T_US), job(T_US - 1)]
    tally.taken(waiting, (), {"normal": T_US}, NOW_US)
    assert view.counted == {"bound_hits": 2}
    tally.taken([job(T_US)], (), {"normal": 0}, NOW_US)
    assert view.counted == {"bound_hits": 2, "overtakes": 1}, "without a bound nobody meets it"


def test_how_far_predictions_were_off(tally: Tally, view: View) -> None:
    for predicted_s, run_s in ((1.0, 1.5), (1.0, 0.25), (None, 9.0)):
        tally.ran(predicted_s, run_s)
    assert view.counted == {"predictions": 2, "prediction_off_us": 1_250_000}
