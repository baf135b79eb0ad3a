"""replay and purge: what happens to the dead."""

from typing import Any

import pytest

from tests.lua import frames
from tests.lua.world import OPEN_TTL_S, World, done, part
from tqe.errors import ScriptError
from tqe.store.call import Call

A, B = (frames.make(frames.frame_id(n), run=2, attempts=4) for n in range(2))
FRESH_A = frames.make(frames.frame_id(0), run=3)
FRESH_B = frames.make(frames.frame_id(1), run=3)
JOB_A, JOB_B = (f"{frames.id_of(f).decode()}.0" for f in (A, B))


def bury(world: World, *data: bytes) -> None:
    leases = world.lease(*data)
    world.snapshots(*data)
    world.settle(*(part(one, bucket=1, parts=[("d", "{}", f)]) for one, f in zip(leases, data, strict=True)))


def replay(world: World, *jobs: tuple[str, bytes], **options: Any) -> tuple[int, str]:
    now, marks = world.door.run(world.replay_call(*jobs, **options))
    return now, marks.decode()


def test_a_dead_job_returns_to_its_lane(world: World) -> None:
    bury(world, A, B)
    now, marks = replay(world, (JOB_A, FRESH_A))
    assert marks == "1"
    state = world.state()
    assert state["queue:high"] == [frames.at(FRESH_A, now)]
    assert state["wake:high"] == [b"w"]
    assert set(state["dlq"]) == set(state["dlq_meta"]) == set(state["dlq_index"]) == {JOB_B.encode()}
    assert world.snapshot(A).startswith("Q,1,0,")
    assert world.depth() == {"high": 1}
    assert world.stats() == {"failed": 2, "dead": 2, "replayed": 1}
    assert world.open_jobs() == 1
    assert "closed" not in state, "the bucket is open again"
    assert world.client.ttl(world.bucket) == OPEN_TTL_S


def test_a_replay_happens_once(world: World) -> None:
    bury(world, A)
    assert replay(world, (JOB_A, FRESH_A), (JOB_A, FRESH_A))[1] == "10"
    before = world.state()
    assert replay(world, (JOB_A, FRESH_A))[1] == "0"
    assert world.state() == before


def test_a_replayed_job_ends_like_any_other(world: World) -> None:
    bury(world, A)
    replay(world, (JOB_A, FRESH_A))
    (got,) = world.fetched()
    assert world.settle(done(frames.lease(got), bucket=1)) == "1"
    assert world.snapshot(A) == "C,1,0,5,6,high,EMAIL*1"
    assert world.open_jobs() == 0


def test_one_job_of_a_frame(world: World) -> None:
    fid = frames.frame_id(7)
    big = frames.make(fid, n=10)
    dead = frames.make(fid, base=4, n=1, total=10, run=1)
    (lease,) = world.lease(big)
    world.snapshots(big, value="Q,10,0,0,0,high,EMAIL*10")
    world.settle(part(lease, bucket=1, ranges=[(0, 4, "C"), (5, 5, "C")], parts=[("d", "{}", dead)]))
    assert world.snapshot(big) == "CCCCDCCCCC,10,0,0,0,high,EMAIL*10"
    fresh = frames.make(fid, base=4, n=1, total=10, run=2)
    assert replay(world, (f"{fid}.4", fresh))[1] == "1"
    assert world.snapshot(big) == "CCCCQCCCCC,10,0,0,0,high,EMAIL*10"
    assert world.open_jobs() == 1


def test_a_job_whose_record_has_expired(world: World) -> None:
    bury(world, A)
    world.client.delete(world.bucket)
    assert replay(world, (JOB_A, FRESH_A))[1] == "1"
    assert "job:1700000000A" not in world.state(), "a record without its rest would say nothing"


def test_an_untracked_job(world: World) -> None:
    (lease,) = world.lease(A)
    world.settle(part(lease, parts=[("d", "{}", A)]))
    assert replay(world, (JOB_A, FRESH_A), bucket=0)[1] == "1"
    assert world.depth() == {"high": 1}


def test_frames_that_are_not_that_job(world: World) -> None:
    bury(world, A)
    before = world.state()
    two = frames.make(frames.frame_id(0), n=2, run=3)
    assert (
        replay(world, (JOB_A, FRESH_B), (JOB_A, b"junk"), (JOB_A, two), (JOB_A + "1", FRESH_A))[1] == "bbbb"
    )
    assert world.state() == before


def test_arguments_that_cannot_be_read(world: World) -> None:
    bury(world, A)
    before = world.state()
    call = world.replay_call((JOB_A, FRESH_A))
    for bad in (Call("replay", call.keys[:-1], call.args), Call("replay", call.keys, call.args[:-1])):
        with pytest.raises(ScriptError) as caught:
            world.door.run(bad)
        assert caught.value.code == "BAD"
    assert world.state() == before


def test_purge(world: World) -> None:
    bury(world, A, B)
    assert world.door.run(world.purge_call(JOB_A, JOB_A, "unknown.0")) == 1
    state = world.state()
    assert set(state["dlq"]) == set(state["dlq_meta"]) == set(state["dlq_index"]) == {JOB_B.encode()}
    assert world.stats() == {"failed": 2, "dead": 2, "purged": 1}
    assert world.snapshot(A).startswith("D,"), "a job that is dead stays dead"
    assert world.door.run(world.purge_call(JOB_A)) == 0
