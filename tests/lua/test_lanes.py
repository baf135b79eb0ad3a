"""pause, resume, and the tokens on which workers wait."""

import random

import pytest

from tests.lua import frames
from tests.lua.world import World, group, part


def test_pause_and_resume(world: World) -> None:
    world.enqueue(group(*(frames.make(frames.frame_id(n)) for n in range(3))))
    world.takeover()
    assert world.door.run(world.pause_call()) == 1
    assert world.door.run(world.pause_call()) == 0
    assert world.state()["paused"] == {b"high"}
    assert world.fetched() == []
    assert world.tokens() == 0
    assert world.door.run(world.resume_call()) == 1
    assert world.tokens() == 3
    assert world.door.run(world.resume_call()) == 0
    assert world.tokens() == 6, "more tokens than frames do no harm"
    assert len(world.fetched()) == 3
    assert world.tokens() == 0


def test_resume_of_an_empty_lane_wakes_nobody(world: World) -> None:
    world.door.run(world.pause_call())
    world.door.run(world.resume_call())
    assert world.state() == {}


@pytest.mark.parametrize("seed", range(5))
def test_no_frame_lies_in_a_lane_without_a_token(world: World, seed: int) -> None:
    """A token is lost when a peer that is gone took it; after any next step by anybody there is one again."""
    rnd = random.Random(seed)
    number = 0
    world.takeover()
    held: list[bytes] = []
    for _ in range(120):
        step = rnd.choice(["enqueue", "fetch", "return", "pause", "resume", "promote", "pop"])
        if step == "enqueue":
            fresh = [frames.make(frames.frame_id(number + n)) for n in range(rnd.randint(1, 30))]
            number += 30
            world.enqueue(group(*fresh))
        elif step == "fetch":
            held += world.fetched(count=rnd.randint(1, 40))
        elif step == "return":
            back, held = held[:10], held[10:]
            world.settle(*(part(frames.lease(f), parts=[("r", "", f)]) for f in back))
        elif step == "promote":
            world.client.zadd(world.keys.delayed, {frames.make(frames.frame_id(number)): 1})
            number += 1
            world.promote("high")
        elif step == "pop":
            world.client.lpop(world.keys.wake("high"), rnd.randint(1, 16))
            continue
        else:
            world.door.run(world.pause_call() if step == "pause" else world.resume_call())
        lane = world.client.llen(world.keys.queue("high")) + world.client.zcard(world.keys.sorted("high"))
        paused = world.client.exists(world.keys.paused)
        if step in ("enqueue", "resume", "promote") or (step == "return" and back):
            assert world.tokens() >= min(lane, 1), step
        if step == "fetch":
            assert (world.tokens() > 0) == (lane > 0 and not paused)
        assert world.tokens() <= 16
