"""Scripts are total: whatever bytes lie in Redis, no frame is lost or doubled and no script raises."""

import random

import pytest

from tests.lua import frames
from tests.lua.world import World, group, part
from tqe.errors import QueueFull, ScriptError

LANES = ("high", "normal", "low")


def _mutated(rnd: random.Random, frame: bytes) -> bytes:
    data = bytearray(frame)
    for _ in range(rnd.choice((0, 1, 1, 1, 3))):
        kind = rnd.randrange(5)
        at = rnd.randrange(min(len(data), 140)) if data else 0
        if kind == 0 and data:
            data[at] ^= 1 << rnd.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rnd.randint(1, 5)]
        elif kind == 3:
            data[at:at] = rnd.randbytes(rnd.randint(1, 5))
        elif data:
            data[at] = rnd.choice(b" .0123456789F\n\x00\xff")
    return bytes(data)


def _junk(rnd: random.Random) -> bytes:
    if rnd.random() < 0.5:
        return rnd.choice((b"", b"F", b"F1", b"F2", b"F1@ ")) + rnd.randbytes(rnd.randint(1, 300))
    return bytes(rnd.choice(b"F1@AZ09. \n") for _ in range(rnd.randint(1, 300)))


def _some(rnd: random.Random, number: int) -> bytes:
    if rnd.random() < 0.3:
        return _junk(rnd)
    total = rnd.choice((1, 1, 1, 5, 1000))
    base = rnd.choice((0, 0, total // 2))
    frame = frames.make(
        frames.frame_id(number, rnd.choice(frames.ALPHABET)),
        n=total - base,
        base=base,
        total=total,
        lane=rnd.choice((*LANES, "other")),
        payload=b"{}",
        enqueued_us=rnd.randrange(10**6),
        boost_us=rnd.randrange(10**6),
    )
    return frame if rnd.random() < 0.4 else _mutated(rnd, frame)


def _place(rnd: random.Random, world: World, frame: bytes) -> None:
    where = rnd.randrange(4)
    lane = rnd.choice(LANES)
    if where == 0:
        world.client.rpush(world.keys.queue(lane), frame)
    elif where == 1:
        world.client.zadd(world.keys.sorted(lane), {frame: rnd.randrange(-(10**6), 10**6)})
    elif where == 2:
        world.client.zadd(world.keys.delayed, {frame: rnd.randrange(10**6)})
    else:
        world.client.rpush(world.keys.parked, frame)


def _settle_all(rnd: random.Random, world: World) -> None:
    """Return, retry, bury, keep or quarantine what is held, whatever it is; some under a wrong name."""
    held = world.client.hgetall(world.keys.processing("W1"))
    groups = []
    for lease, frame in held.items():
        kind = rnd.choice("krtcudq")
        name = lease if rnd.random() < 0.9 else _mutated(rnd, lease)
        groups.append(part(name, parts=[(kind, "0" if kind in "tcu" else "", frame)]))
    world.settle(*groups, lanes=LANES, recovered=1)


def test_no_frame_is_lost_or_doubled(world: World) -> None:
    seed = random.randrange(1 << 32)
    rnd = random.Random(seed)
    world.takeover()
    number = 0
    for round_ in range(12):
        for _ in range(250):
            number += 1
            _place(rnd, world, _some(rnd, number))
        before = world.frames()
        for step in ("fetch", "promote", "unpark", "settle", "fetch", "promote"):
            if step == "fetch":
                bounds = [(lane, rnd.choice((0, 1_000, 10**9))) for lane in LANES]
                budgets = {"jobs": rnd.choice((1, 50, 10_000)), "count": rnd.choice((7, 1_000))}
                world.fetch(lanes=bounds, size=rnd.choice((1, 5_000, 1 << 20)), **budgets)
            elif step == "promote":
                world.promote(*rnd.sample(LANES, 2), count=rnd.choice((5, 1_000)))
            elif step == "unpark":
                world.door.run(world.unpark_call(*rnd.sample(LANES, 2)))
            else:
                _settle_all(rnd, world)
            assert world.frames() == before, f"seed {seed}, round {round_}, {step}"


def test_what_is_leased_is_a_frame(world: World) -> None:
    """A worker slices the header of what it gets before it can check it."""
    rnd = random.Random(11)
    world.client.rpush(world.keys.queue("high"), *[_some(rnd, n) for n in range(2_000)])
    world.takeover()
    leased = 0
    while some := world.fetched(jobs=10**9):
        leased += len(some)
        for frame in some:
            _, base, n, run = frame[4:45].split(b".")[-4:]
            assert int(n) >= 1 and int(base) + int(n) <= int(frame[46:50]) <= 1_000 and int(run) >= 0
            assert frame[:2] == b"F1" and frame[127:128] == b"\n"
    assert leased > 500


@pytest.mark.parametrize("script", ["settle", "enqueue", "replay"])
def test_garbled_arguments_change_nothing_or_are_refused(world: World, script: str) -> None:
    """Conservation also holds against a builder that is wrong: what it cannot mean is refused."""
    seed = random.randrange(1 << 32)
    rnd = random.Random(seed)
    data = [frames.make(frames.frame_id(n), n=3) for n in range(4)]
    fresh = frames.make(frames.frame_id(50))
    words = [
        b"",
        b"0",
        b"1",
        b"2",
        b"-1",
        b"1e9",
        b"nan",
        b"C",
        b"P",
        b"G",
        b"K",
        b"r",
        b"k",
        b"q",
        b"t",
        b"x",
    ]
    for turn in range(300):
        world.client.flushall()
        leases = world.lease(*data)
        calls = {
            "settle": world.settle_call(
                *(part(n, parts=[("r", "", f)]) for n, f in zip(leases, data, strict=True))
            ),
            "enqueue": world.enqueue_call(group(fresh, bucket=1, due="+5")),
            "replay": world.replay_call((f"{frames.frame_id(50)}.0", fresh)),
        }
        call = calls[script]
        args = list(call.args)
        for _ in range(rnd.randint(1, 3)):
            at = rnd.randrange(len(args))
            if rnd.random() < 0.3:
                del args[at]
            else:
                args[at] = rnd.choice(words)
        before = world.frames()
        try:
            world.door.run(type(call)(call.script, call.keys, tuple(args)))
        except (ScriptError, QueueFull) as e:
            assert str(e).startswith(f"{script}: BAD"), f"seed {seed}, turn {turn}: {e}"
        after = world.frames()
        lost = [f for f in before if f not in after]
        ended = sum(world.stats().get(name, 0) for name in ("completed", "cancelled", "expired"))
        assert len(lost) * 3 <= ended, f"seed {seed}, turn {turn}"
