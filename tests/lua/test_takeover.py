"""takeover, renew, leave: an incarnation begins, is continued under a new name, lives, and ends."""

import pytest

from tests.lua import frames
from tests.lua.world import LEASE_MS, World, done
from tqe.errors import LeaseLost, ScriptError

A, B = (frames.make(frames.frame_id(n)) for n in range(2))


def test_a_worker_starts(world: World) -> None:
    now, lease_end, *held = world.takeover("W1")
    assert held == []
    assert lease_end == now // 1000 + LEASE_MS
    assert world.state() == {"incarnations": {b"W1": lease_end}}


def test_all_leases_move_to_the_new_incarnation(world: World) -> None:
    world.lease(A, B)
    now, _, *held = world.takeover("W2", "W1")
    assert dict(zip(held[::2], held[1::2], strict=True)) == {frames.lease(A): A, frames.lease(B): B}
    assert world.state() == {
        "incarnations": {b"W2": now // 1000 + LEASE_MS},
        "processing:W2": {frames.lease(A): A, frames.lease(B): B},
    }


def test_the_same_pair_again_gets_the_same_answer(world: World) -> None:
    world.lease(A)
    first = world.takeover("W2", "W1")
    again = world.takeover("W2", "W1")
    assert again[2:] == first[2:]
    assert set(world.state()) == {"incarnations", "processing:W2"}


def test_both_hold_leases(world: World) -> None:
    """A new incarnation has a fresh name, so this cannot be; if it is, nobody's leases may be overwritten."""
    world.lease(A)
    world.lease(B, incarnation="W2")
    before = world.state()
    with pytest.raises(ScriptError) as caught:
        world.takeover("W2", "W1")
    assert caught.value.code == "BOTH"
    assert world.state() == before


def test_what_is_on_the_wire_under_the_old_name_does_nothing(world: World) -> None:
    (lease,) = world.lease(A)
    world.client.rpush(world.keys.queue("high"), B)
    world.takeover("W2", "W1")
    before = world.state()
    assert world.settle(done(lease), incarnation="W1") == "0"
    with pytest.raises(LeaseLost):
        world.fetch("W1")
    assert world.door.run(world.renew_call("W1"))[3:] == [0, 0]
    after = world.state()
    assert after.pop("stats") == {b"fenced": b"1"}
    assert after == before


def test_a_late_takeover_leaves_a_ghost_without_leases(world: World) -> None:
    """Its first copy is applied after the worker has moved on: it must not take anything from the third."""
    world.lease(A)
    world.takeover("W2", "W1")
    world.takeover("W3", "W2")
    world.takeover("W2", "W1")
    state = world.state()
    assert state["processing:W3"] == {frames.lease(A): A}
    assert set(state["incarnations"]) == {b"W2", b"W3"}
    assert "processing:W2" not in state


def reaped(world: World, guard: int) -> list[object]:
    return world.takeover("R1", "W1", guard=str(guard))


def test_reap_needs_the_lease_end_that_was_seen(world: World) -> None:
    world.lease(A)
    world.client.zadd(world.keys.incarnations, {"W1": 1_000})
    with pytest.raises(ScriptError) as caught:
        reaped(world, 999)
    assert caught.value.code == "LIVE"
    assert "processing:W1" in world.state()
    assert reaped(world, 1_000)[2:] == [frames.lease(A), A]
    assert set(world.state()["incarnations"]) == {b"R1"}
    assert reaped(world, 1_000)[2:] == [frames.lease(A), A], "the same reap again"


def test_reap_of_a_lease_that_has_not_ended(world: World) -> None:
    world.lease(A)
    (end,) = (int(score) for _, score in world.client.zrange(world.keys.incarnations, 0, -1, withscores=True))
    with pytest.raises(ScriptError) as caught:
        reaped(world, end)
    assert caught.value.code == "LIVE"


def test_reap_of_what_another_one_has_reaped(world: World) -> None:
    world.lease(A)
    world.client.zadd(world.keys.incarnations, {"W1": 1_000})
    world.takeover("R2", "W1", guard="1000")
    before = world.state()
    with pytest.raises(ScriptError) as caught:
        reaped(world, 1_000)
    assert caught.value.code == "LIVE"
    assert world.state() == before


def test_renew_extends_the_living_and_revives_nobody(world: World) -> None:
    world.lease(A)
    world.takeover("W2", lease_ms=1)
    world.client.zadd(world.keys.incarnations, {"W2": 1_000})
    now, cancels, lease_end, *each = world.door.run(world.renew_call("W1", "W2", "W3"))
    assert cancels == 0
    assert lease_end == now // 1000 + LEASE_MS
    assert each == [1, 1, 1, 0, 0, 0], "one that has ended and was not reaped is extended"
    assert world.state()["incarnations"] == {b"W1": lease_end, b"W2": lease_end}


def test_renew_tells_that_somebody_wants_a_cancel(world: World) -> None:
    world.takeover()
    world.client.hset(world.keys.cancel, "x", "0")
    assert world.door.run(world.renew_call("W1"))[1] == 1
    assert world.door.run(world.renew_call())[1] == 1


def test_leave(world: World) -> None:
    world.lease(A)
    assert world.door.run(world.leave_call()) == 0
    assert b"W1" in world.state()["incarnations"]
    world.settle(done(frames.lease(A)))
    assert world.door.run(world.leave_call()) == 1
    assert world.door.run(world.leave_call()) == 1
    assert set(world.state()) == {"stats"}
