"""What a worker holds: its order, its sums, and that a row is freed exactly once."""

import random

import pytest

from tests.support.hotpath import BACKENDS, NAMES, Rig, frame
from tqe.board import layout
from tqe.codec import hot
from tqe.settings import Settings
from tqe.store.keys import Keys
from tqe.worker.hold import Hold
from tqe.worker.settler import Settler


@pytest.fixture(params=BACKENDS, ids=NAMES)
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rig:
    # Leases of one backend are nothing to the functions of the other.
    for module in ("hold", "settler"):
        monkeypatch.setattr(f"tqe.worker.{module}.hot", request.param)
    return Rig(request.param)


@pytest.fixture
def hold() -> Hold:
    return Hold(3)


def leases_of(rig: Rig, *ranks: int, n: int = 2, ns: float = 0.0) -> list[hot.Lease]:
    made = []
    for number, rank in enumerate(ranks):
        (lease,), _, _ = rig.backend.admit([frame(n, number=number)], rig.slot, {}, rank)
        lease.predicted_ns = ns
        made.append(lease)
    return made


def run_rest(lease: hot.Lease, runner: hot.Runner) -> None:
    while lease.next < lease.stop:
        runner.done(lease, runner.take(lease)[0])


def test_an_empty_hold_is_idle(hold: Hold) -> None:
    assert (len(hold), list(hold), hold.idle, hold.spot(), hold.held_ns, hold.bytes) == (
        0,
        [],
        True,
        None,
        0.0,
        0,
    )


def test_the_highest_lane_first_and_in_it_the_order_of_arrival(rig: Rig, hold: Hold) -> None:
    leases = leases_of(rig, 2, 1, 0, 1, 0, 2)
    for lease in leases:
        hold.add(lease)
    assert not hold.idle
    order = []
    runner = rig.runner()
    while (spot := hold.spot()) is not None:
        lease = spot.leases[spot.at]
        order.append(leases.index(lease))
        run_rest(lease, runner)
        hold.started(spot, spot.at + 1)
    assert order == [2, 4, 1, 3, 0, 5]
    assert hold.spot() is None
    assert [leases.index(lease) for lease in hold.ended] == order
    assert len(hold) == 6  # until their settle is answered


def test_what_has_nothing_to_start_has_ended(rig: Rig, hold: Hold) -> None:
    (lease,) = leases_of(rig, 0, ns=5.0)
    lease.give_back(0)
    hold.add(lease)
    assert (hold.idle, hold.ended, hold.held_ns, len(hold)) == (True, [lease], 0.0, 1)


def test_sums_of_time_and_bytes(rig: Rig, hold: Hold) -> None:
    leases = leases_of(rig, 0, 0, 1, n=4, ns=10.0)
    for lease in leases:
        hold.add(lease)
    assert (hold.held_ns, hold.bytes) == (30.0, sum(len(lease.frame) for lease in leases))
    hold.spent(hold.spot(), 4.0)
    assert (hold.held_ns, leases[0].predicted_ns) == (26.0, 6.0)
    hold.spent(hold.spot(), 100.0)  # it takes longer than predicted: the others are still ahead
    assert (hold.held_ns, leases[0].predicted_ns) == (20.0, 0.0)
    hold.spent(None, 5.0)
    assert hold.held_ns == 20.0
    spot = hold.spot()
    assert spot is not None
    hold.started(spot, 2)
    assert hold.held_ns == 10.0
    assert [lease.predicted_ns for lease in leases] == [0.0, 0.0, 10.0]
    hold.unready(leases[2])
    assert (hold.held_ns, hold.idle) == (0.0, True)
    hold.unready(leases[2])
    for lease in leases:
        assert hold.remove(lease)
    assert (len(hold), hold.bytes) == (0, 0)


def test_add_all_is_many_adds(rig: Rig) -> None:
    leases = leases_of(rig, 1, 0, 2, 1, n=3)
    one, other = Hold(3), Hold(3)
    other.add_all(leases, 7.0)
    assert [lease.predicted_ns for lease in leases] == [21.0] * 4
    for lease in leases:
        one.add(lease)
    assert (one.held_ns, one.bytes, list(one)) == (other.held_ns, other.bytes, list(other))
    assert one.spot() == other.spot()
    assert one.held_ns == 84.0


def test_a_lease_with_a_running_job_ends_later(rig: Rig, hold: Hold) -> None:
    (lease,) = leases_of(rig, 0)
    hold.add(lease)
    lease.running = 1
    run_rest(lease, rig.runner())
    spot = hold.spot()
    assert spot is not None
    hold.started(spot, 1)
    assert (hold.ended, hold.idle) == ([], True)


def test_giving_back_all(rig: Rig, hold: Hold) -> None:
    fresh, begun, running = leases_of(rig, 0, 1, 2, n=3, ns=5.0)
    for lease in (fresh, begun, running):
        hold.add(lease)
    runner = rig.runner()
    runner.done(begun, runner.take(begun)[0])
    runner.started(running, runner.take(running)[0])
    running.running = 1
    hold.give_back_all()
    assert [rig.states(lease) for lease in (fresh, begun, running)] == ["444", "244", "144"]
    assert (hold.ended, hold.cut) == ([fresh, begun], [running])
    assert (hold.idle, hold.held_ns, len(hold)) == (True, 0.0, 3)
    hold.give_back_all()
    assert (hold.ended, hold.cut) == ([fresh, begun], [running])


def test_a_row_may_be_another_lease_s_by_now(rig: Rig, hold: Hold) -> None:
    (old,) = leases_of(rig, 0)
    hold.add(old)
    assert old in hold
    assert hold.remove(old)
    rig.slot.close_row(old.row)
    new = rig.lease(number=9)
    assert new.row == old.row
    hold.add(new)
    assert old not in hold
    assert new in hold
    assert not hold.remove(old)
    assert (list(hold), hold.bytes) == ([new], len(new.frame))
    assert hold.remove(new)
    assert not hold.remove(new)


def test_the_sums_never_drift_below_zero(rig: Rig, hold: Hold) -> None:
    rng = random.Random(5)
    leases = leases_of(rig, *[rng.randrange(3) for _ in range(200)])
    for lease in leases:
        lease.predicted_ns = rng.random() * 1e6
        hold.add(lease)
    while (spot := hold.spot()) is not None:
        if rng.random() < 0.5:
            hold.spent(spot, rng.random() * 1e6)
        if rng.random() < 0.2:
            hold.unready(spot.leases[-1])
        elif spot.leases:
            hold.started(spot, min(len(spot.leases), 1 + rng.randrange(3)))
        assert hold.held_ns >= -1e-6
    assert hold.held_ns == 0.0


# --- who frees a row ---


@pytest.fixture
def settler(rig: Rig, hold: Hold) -> Settler:
    return Settler(Settings(), Keys(), rig.slot, rig.view, hold)


def test_a_row_is_freed_once_though_its_lease_ends_twice(rig: Rig, hold: Hold, settler: Settler) -> None:
    """A lease is lost while its last coroutine ends: it stands among the ended ones, and is dropped too.
    Freed twice, its row would be given to two leases, and each would write the other's states."""
    (lease,) = leases_of(rig, 0)
    hold.add(lease)
    free = rig.slot.free_rows()
    run_rest(lease, rig.runner())
    hold.unready(lease)
    hold.ended.append(lease)
    settler.drop(lease)
    assert settler.due(0, partial=True) == []
    assert rig.slot.free_rows() == (free[0] + 1, free[1])
    settler.drop(lease)
    assert rig.slot.free_rows() == (free[0] + 1, free[1])


def test_a_lease_that_is_gone_is_not_settled_in_place_of_the_one_that_has_its_row(
    rig: Rig, hold: Hold, settler: Settler
) -> None:
    (old,) = leases_of(rig, 0)
    hold.add(old)
    hold.ended.append(old)
    settler.drop(old)
    (new,) = leases_of(rig, 0)
    assert new.row == old.row
    hold.add(new)
    run_rest(new, rig.runner())
    hold.unready(new)
    hold.ended += [new, old]
    assert settler.due(0, partial=False) == [new]


def test_a_lost_lease_keeps_its_row_while_a_job_of_it_runs(rig: Rig, hold: Hold, settler: Settler) -> None:
    (lease,) = leases_of(rig, 0)
    hold.add(lease)
    free = rig.slot.free_rows()
    lease.running = 1
    settler.drop(lease)
    assert (lease.lost, lease.claims, hold.idle) == (True, [], True)
    assert rig.slot.free_rows() == free
    lease.running = 0
    hold.ended.append(lease)
    assert settler.due(0, partial=False) == []
    assert rig.slot.free_rows() == (free[0] + 1, free[1])
    assert [row for row in rig.view.rows() if row.number == lease.row] == []


def test_a_lease_that_waits_for_its_slowest_job_tells_after_a_while(
    rig: Rig, hold: Hold, settler: Settler
) -> None:
    slow, untouched = leases_of(rig, 0, 0)
    for lease in (slow, untouched):
        hold.add(lease)
    rig.slot.set_state(slow.row, 0, layout.JOB_DONE)
    slow.first_done_ns = 1_000
    assert settler.due(2_000, partial=False) == []
    assert settler.due(1_000 + 50_000_001, partial=False) == [slow]
    assert settler.due(2_000, partial=True) == [slow]
    slow.settling = True
    assert settler.due(2_000, partial=True) == []
