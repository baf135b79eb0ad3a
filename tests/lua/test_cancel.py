"""cancel: an end if the job was still in our hands, else a request."""

import contextlib

import pytest

from tests.lua import frames
from tests.lua.world import RESULT_TTL_S, World, group
from tests.support.waiting import wait_until

A = frames.make(frames.frame_id(1))
BIG = frames.make(frames.frame_id(2), n=10)
DUE = 4_000_000_000_000


def test_a_delayed_job_is_cancelled_at_once(world: World) -> None:
    other = frames.make(frames.frame_id(3))
    world.enqueue(group(A, other, bucket=1, due=f"={DUE}"))
    assert world.cancel(frames.id_of(A)) == "cancelled"
    state = world.state()
    assert [frames.lease(f) for f in state["delayed"]] == [frames.lease(other)]
    assert state["depth"] == {b"delayed": b"1"}
    assert world.stats() == {"submitted": 2, "cancelled": 1}
    states, _, due, started, finished, _ = world.snapshot(A).split(",", 5)
    assert (states, due, started) == ("X", str(DUE), "0")
    assert abs(int(finished) - world.client.time()[0] * 1_000) < 10_000
    assert world.open_jobs() == 1
    assert "cancel" not in state


def test_the_last_open_job_closes_its_bucket(world: World) -> None:
    world.enqueue(group(A, bucket=1, due=f"={DUE}"))
    assert world.cancel(frames.id_of(A)) == "cancelled"
    assert world.client.ttl(world.bucket) == RESULT_TTL_S
    assert list(world.state()["closed"]) == [world.bucket]
    assert world.depth() == {}
    assert world.cancel(frames.id_of(A)) == "too_late:X"


def test_who_waits_is_told_of_an_end_and_of_nothing_else(world: World) -> None:
    other, queued = frames.make(frames.frame_id(3)), frames.make(frames.frame_id(4))
    world.enqueue(group(A, other, bucket=1, due=f"={DUE}"), group(queued, bucket=1))
    world.client.zadd(world.keys.waiting, {frames.id_of(A): 1, frames.id_of(queued): 1})
    with contextlib.closing(world.client.pubsub()) as listener:
        listener.psubscribe(world.keys.done("*"))
        wait_until(lambda: listener.get_message(timeout=1))
        assert world.cancel(frames.id_of(queued)) == "requested"
        assert world.cancel(frames.id_of(other)) == "cancelled"
        assert world.cancel(frames.id_of(A)) == "cancelled"
        heard = wait_until(lambda: listener.get_message(timeout=1))
        assert heard["channel"] == world.keys.done(frames.id_of(A))
        assert listener.get_message(timeout=0.01) is None


def test_a_queued_job_is_asked_for(world: World) -> None:
    world.enqueue(group(BIG, bucket=1, value="Q,10,0,0,0,high,EMAIL*10"))
    before = world.state()
    for index in (7, 3, 7, 0, 3):
        assert world.cancel(frames.id_of(BIG), index) == "requested"
    assert world.state() == {**before, "cancel": {frames.id_of(BIG): b"7,3,0"}}


def test_a_delayed_frame_of_many_is_asked_for(world: World) -> None:
    world.enqueue(group(BIG, bucket=1, value="Q,10,0,0,0,high,EMAIL*10", due=f"={DUE}"))
    assert world.cancel(frames.id_of(BIG), 3) == "requested"
    assert len(world.state()["delayed"]) == 1


def test_a_delayed_job_that_was_promoted_is_asked_for(world: World) -> None:
    world.enqueue(group(A, bucket=1, due=f"={DUE}"))
    world.client.delete(world.keys.delayed)
    assert world.cancel(frames.id_of(A)) == "requested"


def test_a_job_beyond_the_64_that_are_looked_at(world: World) -> None:
    """Bounded: a storm that is due in one millisecond must not be walked for each cancel."""
    many = [frames.make(frames.frame_id(n)) for n in range(100)]
    world.enqueue(group(*many, bucket=1, due=f"={DUE}"))
    answers = [world.cancel(frames.id_of(frame)) for frame in reversed(many)]
    assert answers[:36] == ["requested"] * 36
    assert answers[36:] == ["cancelled"] * 64


@pytest.mark.parametrize("state", "CDXEB")
def test_a_job_that_has_ended(world: World, state: str) -> None:
    world.snapshots(BIG, value=f"QRQ{state}QQQQQQ,10,0,0,0,high,EMAIL*10")
    before = world.state()
    assert world.cancel(frames.id_of(BIG), 3) == f"too_late:{state}"
    assert world.state() == before
    assert world.cancel(frames.id_of(BIG), 1) == "requested"


@pytest.mark.parametrize("index", [10, -1, 1_000_000])
def test_a_job_that_is_not_in_the_frame(world: World, index: int) -> None:
    world.snapshots(BIG, value="Q,10,0,0,0,high,EMAIL*10")
    before = world.state()
    assert world.cancel(frames.id_of(BIG), index) == "unknown"
    assert world.state() == before


def test_a_job_of_which_nothing_is_known(world: World) -> None:
    assert world.cancel(frames.id_of(A)) == "unknown"
    world.snapshots(A, value="nonsense")
    assert world.cancel(frames.id_of(A)) == "unknown"
    assert "cancel" not in world.state()
