"""enqueue: accepts submitted frames, each exactly once."""

import pytest

from tests.lua import frames
from tests.lua.world import OPEN_TTL_S, World, group, keyed
from tqe.errors import QueueFull, ScriptError
from tqe.store.call import Call

A, B, C = (frames.make(frames.frame_id(n)) for n in range(3))


def test_frames_enter_the_tail_of_their_lane(world: World) -> None:
    world.client.rpush(world.keys.queue("high"), b"older")
    now, *answers = world.enqueue(group(A, B, bucket=1))
    assert answers == [1]
    assert world.state() == {
        "queue:high": [b"older", frames.at(A, now), frames.at(B, now)],
        "wake:high": [b"w", b"w"],
        "depth": {b"high": b"2"},
        "stats": {b"submitted": b"2"},
        "job:1700000000A": {
            frames.id_of(A): b"Q,1,0,0,0,high,EMAIL*1",
            frames.id_of(B): b"Q,1,0,0,0,high,EMAIL*1",
            b"open": b"2",
        },
    }
    assert world.client.ttl(world.bucket) == OPEN_TTL_S


def test_several_lanes_and_buckets_in_one_call(world: World) -> None:
    other = world.keys.bucket(1_700_000_001, "B")
    big = frames.make(frames.frame_id(9), n=300, lane="low")
    now, *answers = world.enqueue(
        group(A, bucket=2),
        group(big, lane=2, bucket=1, value="Q,300,0,0,0,low,EMAIL*300"),
        group(B),
        lanes=("high", "low"),
        buckets=(world.bucket, other),
    )
    assert answers == [1, 1, 1]
    state = world.state()
    assert state["queue:high"] == [frames.at(A, now), frames.at(B, now)]
    assert state["queue:low"] == [frames.at(big, now)]
    assert state["depth"] == {b"high": b"2", b"low": b"300"}
    assert state["stats"] == {b"submitted": b"302"}
    assert state["job:1700000000A"][b"open"] == b"300"
    assert state["job:1700000001B"] == {frames.id_of(A): b"Q,1,0,0,0,high,EMAIL*1", b"open": b"1"}


@pytest.mark.parametrize("due", ["+5000", "=+5000"])
def test_a_delayed_frame_waits_outside_of_its_lane(world: World, due: str) -> None:
    if due.startswith("="):
        seconds, us = world.client.time()
        due = f"={seconds * 1000 + us // 1000 + 5000}"
    now, *_ = world.enqueue(group(A, bucket=1, due=due))
    at_ms = int(due[1:]) if due[0] == "=" else now // 1000 + 5000
    assert world.state() == {
        "delayed": {frames.at(A, now): at_ms},
        "depth": {b"delayed": b"1"},
        "stats": {b"submitted": b"1"},
        "job:1700000000A": {frames.id_of(A): f"Q,1,{at_ms},0,0,high,EMAIL*1".encode(), b"open": b"1"},
    }
    # The record of a job that waits must outlive the wait.
    assert OPEN_TTL_S + 4 <= world.client.ttl(world.bucket) <= OPEN_TTL_S + 5


def test_a_time_that_is_past_is_no_delay(world: World) -> None:
    world.enqueue(group(A, bucket=1, due="=1000"), group(B, bucket=1, due="+0"))
    assert world.depth() == {"high": 2}
    assert world.snapshot(A) == "Q,1,1000,0,0,high,EMAIL*1"


def test_the_same_bytes_again_change_nothing(world: World) -> None:
    groups = (group(A, B, bucket=1), group(C, bucket=1, due="+60000"))
    world.enqueue(*groups)
    before = world.state()
    assert world.enqueue(*groups)[1:] == [1, 1]
    assert world.state() == before


def test_the_first_copy_applied_late_after_the_jobs_have_ended_changes_nothing(world: World) -> None:
    world.enqueue(group(A, bucket=1))
    world.takeover()
    world.fetch()
    world.settle(("C", 1, "C,1,0,5,6,high,EMAIL*1", 1, frames.lease(A)))
    before = world.state()
    assert world.enqueue(group(A, bucket=1))[1:] == [1]
    assert world.state() == before


def test_of_a_group_that_was_half_there_only_the_rest_enters(world: World) -> None:
    world.enqueue(group(A, bucket=1))
    now, *_ = world.enqueue(group(A, B, bucket=1))
    assert world.state()["queue:high"][1:] == [frames.at(B, now)]
    assert world.stats() == {"submitted": 2}
    assert world.open_jobs() == 2


def test_untracked_frames_leave_no_record(world: World) -> None:
    world.enqueue(group(A))
    assert set(world.state()) == {"queue:high", "wake:high", "depth", "stats"}


def test_a_key_is_accepted_once(world: World) -> None:
    assert world.enqueue(keyed(A))[1:] == [1]
    holder = f"{frames.id_of(A).decode()}.0 0123456789abcdef".encode()
    assert world.client.get(world.keys.idem("k1")) == holder
    assert world.enqueue(keyed(B, body="f" * 16))[1:] == [holder]
    assert world.depth() == {"high": 1}
    assert world.stats() == {"submitted": 1, "duplicate": 1}
    assert world.open_jobs() == 1


def test_a_key_that_holds_my_own_job_means_created(world: World) -> None:
    """The reply was lost, the job has ended, its record has expired: the repeat is still no duplicate."""
    world.enqueue(keyed(A))
    world.client.delete(world.bucket)
    assert world.enqueue(keyed(A))[1:] == [1]
    assert world.depth() == {"high": 1}
    assert world.stats() == {"submitted": 1}


def test_one_key_twice_in_a_call(world: World) -> None:
    _, first, second = world.enqueue(keyed(A), keyed(B))
    assert first == 1
    assert second.startswith(frames.id_of(A) + b".0 ")
    assert world.depth() == {"high": 1}
    assert world.stats() == {"submitted": 1, "duplicate": 1}


def test_a_key_outlives_the_wait_of_its_job(world: World) -> None:
    """Else a second job would be accepted while the first one still waits."""
    world.enqueue(keyed(A, ttl_s=60, due="+7200000"))
    assert 7259 <= world.client.ttl(world.keys.idem("k1")) <= 7260


def test_an_untracked_job_with_a_key(world: World) -> None:
    assert world.enqueue(keyed(A, bucket=0), buckets=())[1:] == [1]
    assert world.enqueue(keyed(A, bucket=0), buckets=())[1:] == [1]
    assert world.depth() == {"high": 1}


def test_tokens_stop_at_sixteen(world: World) -> None:
    world.enqueue(group(*(frames.make(frames.frame_id(n)) for n in range(40))))
    assert world.tokens() == 16
    world.client.ltrim(world.keys.wake("high"), 0, 13)
    world.enqueue(group(A, B, C))
    assert world.tokens() == 16


def test_more_frames_than_one_command_takes(world: World) -> None:
    many = [frames.make(frames.frame_id(n)) for n in range(4500)]
    world.enqueue(group(*many, bucket=1))
    assert world.depth() == {"high": 4500}
    assert world.open_jobs() == 4500
    before = world.frames()
    world.enqueue(group(*many, bucket=1))
    assert world.frames() == before


def test_a_stamp_by_a_sender_who_knows_the_time_stays(world: World) -> None:
    seconds, us = world.client.time()
    stamp = seconds * 1_000_000 + us
    world.enqueue(group(frames.at(A, stamp)))
    assert world.client.lrange(world.keys.queue("high"), 0, -1) == [frames.at(A, stamp)]


@pytest.mark.parametrize("shift_us", [-150_000, 60_000_000])
def test_a_stamp_that_is_old_or_in_the_future_is_replaced(world: World, shift_us: int) -> None:
    seconds, us = world.client.time()
    now, *_ = world.enqueue(group(frames.at(A, seconds * 1_000_000 + us + shift_us)))
    assert world.client.lrange(world.keys.queue("high"), 0, -1) == [frames.at(A, now)]


def test_a_stamp_that_is_no_number_is_replaced(world: World) -> None:
    damaged = A[:111] + b" 0x1p+5 nonsense" + A[127:]
    now, *_ = world.enqueue(group(damaged))
    assert world.client.lrange(world.keys.queue("high"), 0, -1) == [frames.at(A, now)]


def test_a_bucket_of_many_fields_becomes_a_table(world: World) -> None:
    """As a packed list of up to 512 fields each look-up would walk it from the start."""
    world.enqueue(group(*(frames.make(frames.frame_id(n)) for n in range(32)), bucket=1))
    assert world.client.object("encoding", world.bucket) == b"hashtable"


@pytest.mark.parametrize(
    "change",
    [
        lambda call: Call(
            call.script, call.keys, (*call.args[:3], "G", 1, 1, "0", "Q,1,0,0,0,high,E*1", 1, b"junk")
        ),
        lambda call: Call(call.script, call.keys, (*call.args[:3], "G", 1, 1, "soon", *call.args[7:])),
        lambda call: Call(call.script, call.keys, (*call.args[:3], "G", 2, *call.args[5:])),
        lambda call: Call(call.script, call.keys, (*call.args[:3], "G", 1, 2, *call.args[6:])),
        lambda call: Call(call.script, call.keys, call.args[:-1]),
        lambda call: Call(call.script, call.keys, (*call.args, "X")),
        lambda call: Call(call.script, call.keys[:3], call.args),
        lambda call: Call(call.script, call.keys, (*call.args, *keyed(B, key=2))),
        lambda call: Call(call.script, call.keys, (*call.args, *keyed(B, ttl_s=0))),
        lambda call: Call(
            call.script, call.keys, (*call.args, *group(frames.make(frames.frame_id(5), lane="low")))
        ),
        lambda call: Call(
            call.script, call.keys, (*call.args, *group(frames.make(frames.frame_id(5), base=3, total=9)))
        ),
    ],
    ids=["frame", "due", "lane", "bucket", "short", "tag", "keys", "key", "ttl", "other lane", "not whole"],
)
def test_what_makes_no_sense_is_refused_before_the_first_write(world: World, change) -> None:  # type: ignore[no-untyped-def]
    call = world.enqueue_call(group(A, bucket=1))
    with pytest.raises(ScriptError) as caught:
        world.door.run(change(call))
    assert caught.value.code == "BAD"
    assert world.state() == {}


def test_a_full_redis_refuses_and_changes_nothing(world: World) -> None:
    world.enqueue(group(A, bucket=1), keyed(B))
    before = world.state()
    world.client.config_set("maxmemory", "1")
    with pytest.raises(QueueFull):
        world.enqueue(group(C, bucket=1), keyed(C))
    # What needs no memory is answered all the same: a repeat, and a duplicate.
    assert world.enqueue(group(A, bucket=1))[1:] == [1]
    assert world.enqueue(keyed(C))[1].startswith(frames.id_of(B))
    world.client.config_set("maxmemory", "0")
    assert world.state() == before
