"""How many workers autoscaling wants: the decision as a table, and over time."""

from collections.abc import Iterable

import pytest

from tqe.steward.scaling import Bounds, Decision, Load, decide
from tqe.telemetry import metrics

BOUNDS = Bounds(fewest=1, most=8, target_s=30)


def after(
    loads: Iterable[Load], *, workers: int = 1, bounds: Bounds = BOUNDS, step_s: float = 1.0
) -> list[Decision]:
    """The decisions for one load each `step_s`."""
    made = [Decision(workers)]
    for at, load in enumerate(loads):
        made.append(decide(load, bounds, made[-1], at * step_s))
        assert bounds.fewest <= made[-1].workers <= bounds.most
        assert made[-1].reason in metrics.SCALE_REASONS
    return made[1:]


@pytest.mark.parametrize(
    ("load", "have", "workers", "reason"),
    [
        # nothing to do
        (Load(0, 0), 1, 1, "least"),
        (Load(29, 1), 1, 1, "least"),
        (Load(30, 1), 1, 1, "least"),
        # so many as finish it in 30 s, at once
        (Load(30.1, 1), 1, 2, "backlog"),
        (Load(150, 1), 1, 5, "backlog"),
        (Load(150, 4), 4, 5, "backlog"),
        (Load(150, 5), 5, 5, "backlog"),
        # never more than MAX
        (Load(240, 1), 1, 8, "backlog"),
        (Load(241, 1), 1, 8, "most"),
        (Load(1e9, 8), 8, 8, "most"),
        # fewer would do: not yet
        (Load(0, 0), 8, 8, "calm"),
        (Load(100, 4.1), 8, 8, "calm"),
        # fewer would be busy for more than 80 % of their time
        (Load(0, 6.5), 8, 8, "busy"),
        (Load(0, 5.6), 8, 8, "calm"),
        (Load(0, 0.5), 1, 1, "least"),
        # the part of this host: 2 of the 8 workers that there are
        (Load(480, 2, here=2, everywhere=8), 2, 4, "backlog"),
        (Load(240, 2, here=2, everywhere=8), 2, 2, "backlog"),
        # its own are not registered yet, those of others are
        (Load(150, 0, here=0, everywhere=5), 1, 1, "least"),
        (Load(150, 0, here=0, everywhere=0), 1, 5, "backlog"),
    ],
)
def test_decisions(load: Load, have: int, workers: int, reason: str) -> None:
    made = decide(load, BOUNDS, Decision(have), 1000.0)
    assert (made.workers, made.reason) == (workers, reason), made.text


def test_an_empty_queue_lets_a_quarter_go_after_each_target_time() -> None:
    made = after([Load(0, 0)] * 300, workers=8)
    changes = [(at, one.workers) for at, one in enumerate(made) if one.reason == "idle"]
    assert changes == [(30, 6), (60, 5), (90, 4), (120, 3), (150, 2), (180, 1)]
    assert made[-1].workers == 1 and made[-1].reason == "least"


def test_a_backlog_that_comes_and_goes_changes_nothing_after_the_first_rise() -> None:
    loads = [Load(200 if at % 25 == 0 else 0, 0) for at in range(200)]
    assert {one.workers for one in after(loads)} == {7}


def test_a_noisy_backlog_only_climbs_to_its_peak() -> None:
    made = after([Load(90 + 30 * (at % 2), 3) for at in range(100)])
    assert [one.workers for one in made[:3]] == [3, 4, 4] and made[-1].workers == 4


@pytest.mark.parametrize("offered", [0.5, 2.5, 5.4, 7.6])
def test_a_steady_load_finds_a_number_and_stays_there(offered: float) -> None:
    """Work comes in at a rate that keeps `offered` workers busy; what they do not manage piles up."""
    backlog_s, last, changes = 0.0, Decision(8), []
    for at in range(3_000):
        backlog_s = max(0.0, backlog_s + offered - last.workers)
        made = decide(Load(backlog_s, min(offered, last.workers)), BOUNDS, last, float(at))
        if made.workers != last.workers:
            changes.append(at)
        last = made
    assert changes == sorted(changes) and (not changes or changes[-1] < 300), "it goes on changing"
    assert last.workers >= offered


def test_hosts_that_share_a_queue_start_together_what_is_needed() -> None:
    hosts = [Decision(1), Decision(1), Decision(1)]
    for at in range(20):
        everywhere = sum(host.workers for host in hosts)
        hosts = [
            decide(Load(300, host.workers, host.workers, everywhere), BOUNDS, host, at) for host in hosts
        ]
    assert 10 <= sum(host.workers for host in hosts) <= 12


def test_bounds_that_are_equal_never_change() -> None:
    bounds = Bounds(3, 3, 30)
    made = after([Load(1e6, 3)] * 5 + [Load(0, 0)] * 100, workers=3, bounds=bounds)
    assert {one.workers for one in made} == {3}
