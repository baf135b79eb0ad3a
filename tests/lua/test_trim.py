"""trim: closed buckets of snapshots are dropped before their time, and only those."""

from tests.lua.world import World


def test_trim(world: World) -> None:
    k = world.keys
    seconds, _ = world.client.time()
    old, young, open_again, gone = (k.bucket(n, "A") for n in range(4))
    for bucket, jobs in ((old, 0), (young, 0), (open_again, 1)):
        world.client.hset(bucket, mapping={"x": "C,1,0,0,0,high,E*1", "open": jobs})
        world.client.expire(bucket, 100)
    closed = {bucket: seconds * 1_000 - 120_000 for bucket in (old, open_again, gone)}
    world.client.zadd(k.closed, {**closed, young: seconds * 1_000})
    assert world.door.run(world.trim_call(old, young, open_again, gone)) == 2
    state = world.state()
    assert set(state) == {"job:1A", "job:2A", "closed"}
    assert set(state["closed"]) == {young}
    assert world.door.run(world.trim_call(young, age_ms=-10_000)) == 2


def test_a_bucket_that_nobody_closed(world: World) -> None:
    bucket = world.keys.bucket(1, "A")
    world.client.hset(bucket, mapping={"x": "C,1,0,0,0,high,E*1", "open": 0})
    world.client.expire(bucket, 100)
    before = world.state()
    assert world.door.run(world.trim_call(bucket)) == 0
    assert world.state() == before
