"""fetch: leases frames within its budgets, merges list and sorted part, keeps tokens and depth true."""

from typing import Any

import pytest

from tests.lua import frames
from tests.lua.world import LEASE_MS, World, group
from tqe.errors import LeaseLost

S = 1_000_000


def put(world: World, *data: bytes, lane: str = "high") -> None:
    world.client.rpush(world.keys.queue(lane), *data)


def put_sorted(world: World, scores: dict[bytes, int], lane: str = "high") -> None:
    world.client.zadd(world.keys.sorted(lane), scores)


def one(number: int, enqueued_us: int = 0, **fields: object) -> bytes:
    return frames.make(frames.frame_id(number), enqueued_us=enqueued_us, **fields)  # type: ignore[arg-type]


def test_frames_move_into_the_incarnations_hash(world: World) -> None:
    a, b = one(1), one(2, n=5)
    put(world, a, b)
    world.client.hset(world.keys.depth, mapping={"high": 6, "low": 4})
    world.takeover()
    now, lease_end, held, cancels, left, *got = world.fetch()
    assert got == [a, b]
    assert lease_end == now // 1000 + LEASE_MS
    assert (held, cancels, left) == (2, [], [])
    assert world.state() == {
        "incarnations": {b"W1": lease_end},
        "processing:W1": {frames.lease(a): a, frames.lease(b): b},
        "depth": {b"low": b"4"},
    }


def test_an_incarnation_without_a_lease_gets_nothing(world: World) -> None:
    put(world, one(1))
    before = world.state()
    with pytest.raises(LeaseLost):
        world.fetch()
    assert world.state() == before


def test_a_late_fetch_of_an_incarnation_that_was_taken_over_gets_nothing(world: World) -> None:
    put(world, one(1))
    world.takeover("W1")
    world.takeover("W2", "W1")
    with pytest.raises(LeaseLost):
        world.fetch("W1")


def test_an_empty_fetch_extends_the_lease(world: World) -> None:
    world.takeover(lease_ms=1)
    now, lease_end, held, cancels, left = world.fetch()
    assert world.state() == {"incarnations": {b"W1": now // 1000 + LEASE_MS}}
    assert (lease_end, held, cancels, left) == (now // 1000 + LEASE_MS, 0, [], [])


def test_lanes_are_served_in_rank_order(world: World) -> None:
    low, high = one(1, lane="low"), one(2)
    put(world, low, lane="low")
    put(world, high)
    world.takeover()
    assert world.fetched(lanes=("high", "low")) == [high, low]


@pytest.mark.parametrize(
    ("budget", "taken"),
    [
        ({"jobs": 25}, 2),
        ({"jobs": 30}, 3),
        ({"jobs": 1}, 1),
        ({"count": 4}, 4),
        ({"size": 2_000}, 2),
        ({"size": 1}, 1),
        ({}, 50),
    ],
)
def test_budgets(world: World, budget: dict[str, int], taken: int) -> None:
    """What exceeds a budget stays at the head, in order; a first frame is always taken."""
    data = [one(n, n=10) for n in range(50)]
    assert 600 < len(data[0]) < 1_000
    put(world, *data)
    world.client.hset(world.keys.depth, "high", 500)
    world.takeover()
    assert world.fetched(**budget) == data[:taken]
    assert world.client.lrange(world.keys.queue("high"), 0, -1) == data[taken:]
    assert world.depth() == ({"high": 500 - 10 * taken} if taken < 50 else {})


def test_a_budget_of_one_large_frame_amid_small_ones(world: World) -> None:
    data = [one(n) for n in range(30)]
    data[20] = one(20, n=900)
    put(world, *data)
    world.takeover()
    assert world.fetched(jobs=500) == data[:20]
    assert world.fetched(jobs=500) == [data[20]]
    assert world.fetched(jobs=500) == data[21:]


def test_what_exceeds_the_budget_goes_back_with_its_score(world: World) -> None:
    data = {one(n, n=10): n for n in range(20)}
    put_sorted(world, data)
    world.takeover()
    got = world.fetched(jobs=35)
    assert got == list(data)[:3]
    assert world.state()["sorted:high"] == dict(list(data.items())[3:])


def test_a_full_fetch_does_not_look_at_lower_lanes(world: World) -> None:
    put(world, one(1), one(2))
    put(world, one(3, lane="low"), lane="low")
    world.takeover()
    assert world.fetched(lanes=("high", "low"), count=2) == [one(1), one(2)]


def test_frames_that_fill_one_chunk_exactly(world: World) -> None:
    for size in (1, 4, 5, 16, 21, 64, 85):
        data = [one(n) for n in range(size)]
        put(world, *data)
        world.client.hset(world.keys.depth, "high", size)
        world.takeover()
        assert world.fetched(count=size) == data
        assert world.depth() == {}, "an empty lane has no depth, however it was emptied"


def test_plain_fifo_merges_by_time_of_entry(world: World) -> None:
    old, mid, new = one(1, 1 * S), one(2, 2 * S), one(3, 3 * S)
    put(world, mid)
    put_sorted(world, {old: 1 * S, new: 3 * S})
    world.takeover()
    assert world.fetched() == [old, mid, new]


def test_the_sorted_part_wins_ties(world: World) -> None:
    a, b = one(1, 5 * S), one(2, 5 * S)
    put(world, a)
    put_sorted(world, {b: 5 * S})
    world.takeover()
    assert world.fetched() == [b, a]


def test_an_ordered_lane_gives_its_head_the_lowest_score_it_could_get(world: World) -> None:
    """Head of the list at 10 s, T = 4 s: its key is 6 s. Scores up to 6 s go before it, later ones after."""
    head = one(1, 10 * S)
    first, tie, after = one(2, 6 * S, boost_us=1), one(3, 6 * S), one(4, 7 * S)
    put(world, head)
    put_sorted(world, {first: 6 * S - 1, tie: 6 * S, after: 7 * S})
    world.takeover()
    assert world.fetched(lanes=(("high", 4 * S),)) == [first, tie, head, after]


def test_the_same_lane_as_fifo(world: World) -> None:
    head = one(1, 10 * S)
    after = one(4, 11 * S)
    put(world, head)
    put_sorted(world, {after: 7 * S})
    world.takeover()
    assert world.fetched(lanes=(("high", 0),)) == [after, head]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("bound", [0, 3 * S])
def test_a_merge_in_steps_is_the_merge_at_once(world: World, count: int, bound: int) -> None:
    """A budget must not change the order: the loser of a comparison goes back to where it was."""
    listed = [one(n, n * S) for n in range(0, 60, 2)]
    scored = {one(n, n * S, boost_us=(n % 7) * S // 2): n * S - (n % 7) * S // 2 for n in range(1, 60, 2)}
    expected = []
    left, right = list(listed), sorted(scored, key=lambda f: (scored[f], f))
    while left or right:
        take_right = right and (not left or scored[right[0]] <= frames.enqueued_us(left[0]) - bound)
        expected.append((right if take_right else left).pop(0))
    put(world, *listed)
    put_sorted(world, scored)
    world.takeover()
    got: list[bytes] = []
    while some := world.fetched(lanes=(("high", bound),), count=count):
        got += some
    assert got == expected


# --- lanes that are ordered


def left(world: World, *lanes: str | tuple[str, int], **options: object) -> list[int]:
    return world.fetch(lanes=lanes, **options)[4]  # type: ignore[arg-type,no-any-return]


def test_the_lowest_key_that_is_left_is_told(world: World) -> None:
    """The list's head counts as what it may be worth, whether it was popped and put back or never seen."""
    world.takeover()
    put(world, *(one(n, 10 * S + n) for n in range(4)))
    put_sorted(world, {one(10, 9 * S): 9 * S, one(11, 9 * S): 9 * S + 1})
    # From the list, since 6 s < 9 s: it has a window, the sorted part has the budget.
    assert left(world, ("high", 4 * S), jobs=1, window=2) == [1, 6 * S + 2]
    assert left(world, ("high", 4 * S), jobs=1, window=2) == [1, 9 * S + 1]
    assert left(world, ("high", 4 * S), jobs=1) == []
    assert world.depth() == {}


def test_where_enough_is_sorted_the_list_waits_for_its_turn(world: World) -> None:
    """Its head then counts as its time of entry, a boost of 0: by that it is merged and told."""
    world.takeover()
    listed, scored = one(1, 10 * S), {one(10 + n, 9 * S): 9 * S + n for n in range(3)}
    put(world, listed)
    put_sorted(world, scored)
    ask: dict[str, Any] = {"lanes": (("high", 4 * S),), "jobs": 1, "sorted_max": 2}
    assert world.fetch(**ask)[4:] == [[1, 9 * S + 1], one(10, 9 * S)]
    assert world.fetch(**ask)[4:] == [[1, 9 * S + 2], one(11, 9 * S)]
    assert world.fetched(**ask) == [listed, one(12, 9 * S)], "one left: the list is looked at again"


def test_only_lanes_that_are_ordered_and_brought_something_tell_what_is_left(world: World) -> None:
    world.takeover()
    for lane in ("high", "low"):
        put(world, *(one(n, S + n, lane=lane) for n in range(4)), lane=lane)
    assert left(world, "high", ("low", 5), jobs=2) == []
    assert left(world, "high", ("low", 5), jobs=4, window=3) == [2, S + 3 - 5]


@pytest.mark.parametrize(("window", "taken"), [(3, 3), (4, 4), (100, 4)])
def test_a_window_has_its_own_budget_and_leaves_that_of_scored_jobs(
    world: World, window: int, taken: int
) -> None:
    listed = [one(n, 10 * S + n) for n in range(4)]
    scored = [one(10 + n, 9 * S + n) for n in range(3)]
    put(world, *listed)
    put_sorted(world, {f: 9 * S + n for n, f in enumerate(scored)})
    world.takeover()
    got = world.fetched(lanes=(("high", 4 * S),), jobs=2, window=window)
    assert got == listed[:taken] + (scored[:2] if taken == 4 else [])


def test_a_large_first_frame_is_taken_beyond_the_window(world: World) -> None:
    frame = one(1, S, n=50)
    put(world, frame, one(2, S + 1))
    world.takeover()
    reply = world.fetch(lanes=(("high", 9),), jobs=1, window=10)
    assert reply[4:] == [[1, S + 1 - 9], frame]


def test_a_frame_whose_time_of_entry_is_damaged_is_not_held_back(world: World) -> None:
    bad = one(1)[:111] + b"................" + one(1)[127:]
    put(world, bad)
    put_sorted(world, {one(2): 5 * S})
    world.takeover()
    assert world.fetched(count=1) == [bad]


def test_what_is_no_frame_goes_to_quarantine(world: World) -> None:
    good = one(1)
    bad = [
        b"",
        b"F",
        b"F1",
        good[:100],
        good[:127],
        good.replace(b".000.0001.", b".000.00x1."),
        b"\xff" * 300,
    ]
    bad += [b"F1A " + b"0" * 400, b"F1 " + good[3:], b"f" + good[1:], good[:127] + b"x" + good[128:]]
    put(world, *bad[:5], good, *bad[5:])
    world.takeover()
    assert world.fetched() == [good]
    assert world.state() | {"incarnations": 0} == {
        "incarnations": 0,
        "processing:W1": {frames.lease(good): good},
        "quarantine": bad,
        "stats": {b"quarantined": str(len(bad)).encode()},
    }


@pytest.mark.parametrize(
    "middle", [b".000.0000.00000 0001 ", b".001.0001.00000 0001 ", b".000.0001.00000 1001 "]
)
def test_numbers_that_cannot_be_are_damage(world: World, middle: bytes) -> None:
    good = one(1)
    put(world, good[:30] + middle + good[51:])
    world.takeover()
    assert world.fetched() == []
    assert world.client.llen(world.keys.quarantine) == 1


def test_a_truncated_frame_does_not_spoil_the_check_of_the_next(world: World) -> None:
    good = one(1)
    put(world, good[:30], good, good[:45], one(2), b"F1A " + b" " * 123 + b"\n", one(3))
    world.takeover()
    assert world.fetched() == [good, one(2), one(3)]


def test_a_newer_frame_is_parked(world: World) -> None:
    newer = b"F2" + one(1)[2:]
    put(world, newer, one(2))
    put_sorted(world, {b"Fz anything": 1})
    world.takeover()
    assert world.fetched() == [one(2)]
    assert sorted(world.client.lrange(world.keys.parked, 0, -1)) == sorted([newer, b"Fz anything"])
    assert world.stats() == {"parked": 2}


def test_damaged_frames_count_against_the_budget_of_frames(world: World) -> None:
    """Else one fetch could walk through a million of them."""
    put(world, *[b"junk%d" % n for n in range(100)], one(1))
    world.takeover()
    assert world.fetched(count=10) == []
    assert world.client.llen(world.keys.quarantine) == 10
    assert world.tokens() == 1, "there is more: whoever waits must come"


def test_two_frames_of_one_name_do_not_overwrite_each_other(world: World) -> None:
    a, twin = one(1), one(1, attempts=3)
    assert frames.lease(a) == frames.lease(twin)
    put(world, a, twin, one(2), a)
    world.takeover()
    assert world.fetched() == [a, one(2)]
    state = world.state()
    assert state["processing:W1"] == {frames.lease(a): a, frames.lease(one(2)): one(2)}
    assert state["quarantine"] == [twin, a]


def test_cancel_requests_come_with_the_frames(world: World) -> None:
    a, b, c = one(1), one(2, n=9), one(3)
    put(world, a, b, c)
    world.client.hset(world.keys.cancel, mapping={frames.id_of(b): "3,7", frames.id_of(c): "0", "other": "1"})
    world.takeover()
    reply = world.fetch()
    assert reply[3] == [2, b"3,7", 3, b"0"]
    assert reply[5:] == [a, b, c]
    assert world.client.hlen(world.keys.cancel) == 3, (
        "requests are answered by settle, and swept by the steward"
    )


def test_a_paused_lane_is_passed_over_and_has_no_tokens(world: World) -> None:
    world.enqueue(group(one(1)))
    world.enqueue(group(one(2, lane="low")), lanes=("low",))
    world.door.run(world.pause_call("high"))
    world.takeover()
    assert [frames.id_of(f) for f in world.fetched(lanes=("high", "low"))] == [frames.id_of(one(2))]
    assert (world.tokens("high"), world.tokens("low")) == (0, 0)
    assert world.depth() == {"high": 1}


def test_tokens_on_exit(world: World) -> None:
    """Empty lanes have none, the others at least one, also those that were not looked at."""
    world.enqueue(group(*[one(n) for n in range(20)]))
    world.enqueue(group(*[one(n, lane="low") for n in range(30, 35)]), lanes=("low",))
    world.takeover()
    lanes = ("high", "low", "none")
    world.client.rpush(world.keys.wake("none"), "w")
    world.client.delete(world.keys.wake("high"), world.keys.wake("low"))
    world.fetch(lanes=lanes, count=3)
    assert [world.tokens(lane) for lane in lanes] == [1, 1, 0]
    world.fetch(lanes=lanes, count=17)
    assert [world.tokens(lane) for lane in lanes] == [0, 1, 0]
    world.fetch(lanes=lanes)
    assert [world.tokens(lane) for lane in lanes] == [0, 0, 0]
    assert world.depth() == {}


def test_large_frames(world: World) -> None:
    data = [one(n, n=1_000) for n in range(5)]
    put(world, *data)
    world.takeover()
    assert world.fetched(jobs=2_500) == data[:2]
