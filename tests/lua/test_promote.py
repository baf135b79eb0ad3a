"""promote and unpark: what waited outside of the lanes comes in."""

from tests.lua import frames
from tests.lua.world import World, group


def one(number: int, **fields: object) -> bytes:
    return frames.make(frames.frame_id(number), **fields)  # type: ignore[arg-type]


A, B, C = one(1), one(2, n=5), one(3)
FAR = 4_000_000_000_000


def test_due_frames_enter_the_tail_in_order(world: World) -> None:
    world.client.rpush(world.keys.queue("high"), b"older")
    world.client.zadd(world.keys.delayed, {B: 2_000, A: 1_000, C: FAR})
    world.client.hset(world.keys.depth, mapping={"delayed": 7, "high": 1})
    now, jobs, count, next_due = world.promote("high")
    assert (jobs, count, next_due) == (6, 2, FAR)
    assert world.state() == {
        "queue:high": [b"older", frames.at(A, now), frames.at(B, now)],
        "wake:high": [b"w", b"w"],
        "delayed": {C: FAR},
        "depth": {b"delayed": b"1", b"high": b"7"},
    }


def test_nothing_is_due(world: World) -> None:
    assert world.promote("high")[1:] == [0, 0, 0]
    world.client.zadd(world.keys.delayed, {A: FAR})
    before = world.state()
    assert world.promote("high")[1:] == [0, 0, FAR]
    assert world.state() == before


def test_the_last_one_takes_the_depth_with_it(world: World) -> None:
    world.client.zadd(world.keys.delayed, {A: 1})
    world.client.hset(world.keys.depth, "delayed", 99)
    world.promote("high")
    assert world.depth() == {"high": 1}


def test_frames_of_other_lanes_stay_and_are_named(world: World) -> None:
    others = {one(n, lane=f"lane{n % 3}"): n for n in range(40)}
    world.client.zadd(world.keys.delayed, {**others, A: 100, B: 200})
    reply = world.promote("high")
    assert reply[1:4] == [6, 2, 0]
    assert sorted(reply[4:]) == [b"lane0", b"lane1", b"lane2"]
    assert world.state()["delayed"] == others
    reply = world.promote("lane1", "lane2")
    assert reply[1:3] == [26, 26]
    assert reply[4:] == [b"lane0"]


def test_many_frames_of_other_lanes_do_not_block_the_rest(world: World) -> None:
    world.client.zadd(world.keys.delayed, {**{one(n, lane="other"): n for n in range(700)}, A: 1_000})
    assert world.promote("high")[1:] == [1, 1, 0, b"other"]


def test_budgets(world: World) -> None:
    data = {one(n): n + 1 for n in range(100)}
    world.client.zadd(world.keys.delayed, data)
    assert world.promote("high", count=7)[1:] == [7, 7, 8]
    assert world.promote("high", size=1)[1:] == [1, 1, 9], "a first frame is always taken"
    assert world.promote("high", size=400)[1:] == [2, 2, 11]
    assert world.promote("high")[1:] == [90, 90, 0]
    got = [f[4:30] for f in world.client.lrange(world.keys.queue("high"), 0, -1)]
    assert got == [f[4:30] for f in data]


def test_what_is_no_frame_leaves_the_set(world: World) -> None:
    newer = b"F2" + A[2:]
    nameless = A[:79] + b"?" * 16 + A[95:]
    world.client.zadd(world.keys.delayed, {b"junk": 1, newer: 2, nameless: 3, A: 4})
    world.client.hset(world.keys.depth, "delayed", 1)
    now, *rest = world.promote("high")
    assert rest == [1, 1, 0]
    assert world.state() == {
        "queue:high": [frames.at(A, now)],
        "wake:high": [b"w"],
        "quarantine": [b"junk", nameless],
        "parked": [newer],
        "depth": {b"high": b"1"},
        "stats": {b"quarantined": b"2", b"parked": b"1"},
    }


def test_a_submission_that_waited_runs(world: World) -> None:
    world.enqueue(group(A, B, due="+1"))
    while world.client.exists(world.keys.delayed):
        world.promote("high")
    world.takeover()
    assert [frames.lease(f) for f in world.fetched()] == [frames.lease(A), frames.lease(B)]


def test_a_storm_that_is_due_at_once(world: World) -> None:
    world.client.zadd(world.keys.delayed, {one(n): 5 for n in range(3_000)})
    assert world.promote("high", count=5_000, size=1 << 30)[1:] == [3_000, 3_000, 0]
    assert world.tokens() == 16


# -- unpark


def test_frames_that_are_understood_return_in_order_of_entry(world: World) -> None:
    old = one(4, enqueued_us=500, boost_us=100)
    newer = b"F2" + A[2:]
    low = one(5, lane="low")
    world.client.rpush(world.keys.parked, newer, old, b"junk", low, B)
    assert world.door.run(world.unpark_call("high")) == [2, 3]
    assert world.state() == {
        "sorted:high": {old: 400, B: 0},
        "wake:high": [b"w", b"w"],
        "parked": [newer, b"junk", low],
        "depth": {b"high:sorted": b"6"},
    }


def test_each_call_looks_at_others(world: World) -> None:
    newer = [b"F2 %d" % n for n in range(150)]
    world.client.rpush(world.keys.parked, *newer, A)
    assert world.door.run(world.unpark_call("high", count=100)) == [0, 151]
    assert world.door.run(world.unpark_call("high", count=100)) == [1, 150]
    assert sorted(world.client.lrange(world.keys.parked, 0, -1)) == sorted(newer)


def test_nothing_is_parked(world: World) -> None:
    assert world.door.run(world.unpark_call("high")) == [0, 0]
    assert world.state() == {}
