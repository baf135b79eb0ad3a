"""Lanes' weights are shares of time, not of counts (PROTOCOL F3)."""

from __future__ import annotations

import pytest

from tqe.worker.shares import Shares


def served(shares: Shares, cost_ns: list[int], steps: int) -> list[int]:
    """Time that each lane got, all of them busy, one job a step."""
    spent = [0] * len(cost_ns)
    for _ in range(steps):
        rank = shares.order[0]
        shares.fetched(shares.order, [rank])
        shares.charge(rank, cost_ns[rank])
        spent[rank] += cost_ns[rank]
    return spent


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 4)])
def test_long_and_short_jobs_get_the_time_of_their_weights(weights: tuple[int, int]) -> None:
    long, short = served(Shares(weights), [1_000, 10], 20_000)
    assert long / short == pytest.approx(weights[0] / weights[1], rel=0.05)


def test_an_idle_lane_saves_up_no_credit() -> None:
    shares = Shares((1, 1))
    for _ in range(1_000):  # lane 0 is asked first and is empty
        shares.fetched(shares.order, [1])
        shares.charge(1, 100)
    first, second = served(shares, [100, 100], 100)
    assert abs(first - second) <= 200


def test_no_lane_starves() -> None:
    spent = served(Shares((100, 1, 1)), [10, 1_000, 10], 5_000)
    assert all(spent)


def test_lanes_that_are_level_are_served_by_rank() -> None:
    assert Shares((1, 5, 2)).order == (0, 1, 2)


def test_what_runs_beside_is_charged_while_it_runs_by_its_part() -> None:
    shares = Shares((1, 1, 1))
    shares.charge_beside([(0, 1.0)], now_ns=1_000)  # since when is not known
    assert shares.order == (0, 1, 2)
    shares.charge_beside([(0, 1.0), (1, 0.5)], now_ns=1_100)
    assert shares.order == (2, 1, 0)


def test_jobs_of_a_lane_that_was_not_asked_leave_all_as_it_is() -> None:
    shares = Shares((1, 1, 1))
    shares.charge(0, 10)
    shares.fetched((1, 0), [2])
    assert shares.order == (1, 2, 0)


def test_a_lane_that_is_never_asked_for_saves_no_credit() -> None:
    shares = Shares((1, 1, 1))
    for _ in range(100):
        for rank in (0, 1):
            shares.charge(rank, 1_000_000)
            shares.fetched((0, 1), [0, 1])
    first = served(shares, [1_000_000, 1_000_000, 1_000_000], 9)
    assert max(first) <= 4_000_000
