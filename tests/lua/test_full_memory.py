"""Every script at maxmemory: it runs, or is refused and changes nothing, as its header says."""

import re
from collections.abc import Callable
from importlib import resources

import pytest

from tests.lua import frames
from tests.lua.world import World, done, group, part
from tqe.errors import QueueFull
from tqe.store.call import Call
from tqe.store.scripts import SCRIPTS

A, B, C, D = (frames.make(frames.frame_id(n)) for n in range(4))
AGAIN = frames.make(frames.frame_id(1), run=1)


def _settle(world: World) -> Call:
    # Everything that settle can do, so that each of its writes meets the full memory.
    leases = world.lease(A, B, C, D)
    world.snapshots(A, B, C, D)
    return world.settle_call(
        done(leases[0], bucket=1),
        part(leases[1], bucket=1, fields=[(f"{frames.frame_id(1)}.0", "{}")], parts=[("t", 5, AGAIN)]),
        part(leases[2], bucket=1, parts=[("r", "", C)]),
        part(leases[3], bucket=1, parts=[("d", "{}", D)]),
    )


def _fetch(world: World) -> Call:
    world.client.rpush(world.keys.queue("high"), A, B, b"junk", b"F2 newer")
    world.takeover()
    return world.fetch_call(count=3)


def _takeover(world: World) -> Call:
    world.lease(A)
    return world.takeover_call("W2", "W1")


def _renew(world: World) -> Call:
    world.lease(A)
    return world.renew_call("W1")


def _leave(world: World) -> Call:
    world.takeover()
    return world.leave_call()


def _promote(world: World) -> Call:
    world.client.zadd(world.keys.delayed, {A: 1, b"junk": 1})
    return world.promote_call("high")


def _unpark(world: World) -> Call:
    world.client.rpush(world.keys.parked, A)
    return world.unpark_call("high")


def _cancel(world: World) -> Call:
    world.snapshots(A)
    return world.cancel_call(frames.id_of(A))


def _replay(world: World) -> Call:
    (lease,) = world.lease(A)
    world.settle(part(lease, parts=[("d", "{}", A)]))
    return world.replay_call((f"{frames.frame_id(0)}.0", A))


def _purge(world: World) -> Call:
    (lease,) = world.lease(A)
    world.settle(part(lease, parts=[("d", "{}", A)]))
    return world.purge_call(f"{frames.frame_id(0)}.0")


def _resume(world: World) -> Call:
    world.client.rpush(world.keys.queue("high"), A)
    world.door.run(world.pause_call())
    return world.resume_call()


def _advance(world: World) -> Call:
    world.client.hset(world.keys.cron, "schedule:A", "{}")
    return Call("advance", (world.keys.void, world.keys.cron), ("A", 60_000, "x.0"))


def _trim(world: World) -> Call:
    world.client.hset(world.bucket, mapping={"open": 0, "x": "y"})
    world.client.expire(world.bucket, 100)
    world.client.zadd(world.keys.closed, {world.bucket: 1})
    return world.trim_call(world.bucket)


SAMPLES: dict[str, Callable[[World], Call]] = {
    "advance": _advance,
    "cancel": _cancel,
    "enqueue": lambda world: world.enqueue_call(group(A, bucket=1), group(B, due="+5")),
    "fetch": _fetch,
    "leave": _leave,
    "pause": lambda world: world.pause_call(),
    "promote": _promote,
    "purge": _purge,
    "renew": _renew,
    "replay": _replay,
    "resume": _resume,
    "settle": _settle,
    "takeover": _takeover,
    "trim": _trim,
    "unpark": _unpark,
}


def _without_time(state: dict[str, object]) -> str:
    """The state as text, all times replaced: two runs of one step differ in them only."""
    return re.sub(r"\b\d{13,16}\b", "TIME", repr(sorted(state.items())))


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_at_full_memory(world: World, name: str) -> None:
    text = resources.files("tqe.lua").joinpath(f"{name}.lua").read_text()
    said = re.search(r"^-- oom:\s+(runs|refused)", text, re.MULTILINE)
    assert said
    call = SAMPLES[name](world)
    before = world.state()
    world.client.config_set("maxmemory", "1")
    if said[1] == "refused":
        with pytest.raises(QueueFull):
            world.door.run(call)
        assert world.state() == before
        return
    world.door.run(call)
    full = _without_time(world.state())
    world.client.config_set("maxmemory", "0")
    world.client.flushall()
    world.door.run(SAMPLES[name](world))
    assert full == _without_time(world.state()), "at full memory it does what it does at other times"
    if name not in ("renew", "takeover"):
        assert full != _without_time(before)


def test_a_worker_starts_and_waits_at_full_memory(world: World) -> None:
    """Nothing to remove first: the growing write would be the first one."""
    world.client.config_set("maxmemory", "1")
    world.takeover()
    assert world.fetched() == []
    assert world.settle(done(frames.lease(A))) == "0"
    assert world.door.run(world.unpark_call("high")) == [0, 0]
    assert world.promote("high")[1:] == [0, 0, 0]
    assert world.door.run(world.resume_call()) == 0
    assert world.door.run(world.purge_call("x.0")) == 0
