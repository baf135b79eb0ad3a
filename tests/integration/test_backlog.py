"""How much work waits, as read from a real Redis: by type, from both ends of a lane, whatever lies in it."""

from collections.abc import Iterator, Sequence

import pytest
import redis

from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tqe import codec
from tqe.client import Client
from tqe.job import IDS
from tqe.settings import Settings
from tqe.store import backlog, model
from tqe.store.backlog import Backlog
from tqe.store.keys import Keys

KEYS = Keys()
LANES = ("high", "normal", "low")


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(Settings(redis_url=redis_server.url)) as client:
        yield client


def scored(
    client: redis.Redis, lane: str, boosts_us: Sequence[int], *, entered_us: int = 10**15
) -> list[str]:
    """Frames of one that a worker has scored and given back; the ids of their jobs."""
    names = []
    for boost_us in boosts_us:
        frame_id = IDS.frame_id()
        frame = codec.pack(
            [(b"A", b"{}", b"", False)], frame_id=frame_id, lane=lane, tracked=False, enqueued_us=entered_us
        )
        (own,) = codec.cut(frame, [(0, 1)], boost_us=boost_us, flags=codec.parse(frame).flags | codec.SCORED)
        client.zadd(KEYS.sorted(lane), {own: entered_us - boost_us})
        client.hincrby(KEYS.depth, f"{lane}:sorted", 1)
        names.append(f"{frame_id.decode()}.0")
    return names


def look(client: Client) -> Backlog:
    return client.run(backlog.look(KEYS, LANES))


def test_nothing_waits_in_an_empty_queue(client: Client) -> None:
    found = look(client)
    assert (found.seconds, found.workers) == (0.0, 0)
    assert {name: lane.jobs for name, lane in found.lanes.items()} == dict.fromkeys(LANES, 0)


def test_each_lane_counts_by_the_types_that_wait_in_it(client: Client, redis_client: redis.Redis) -> None:
    redis_client.hset(KEYS.means, mapping={"SHORT": 2_000, "LONG": 10_000_000})
    client.submit_alike("SHORT", [{}] * 5_000, priority="high")
    client.submit_alike("LONG", [{}] * 3)
    found = look(client)
    assert found.lanes["high"] == pytest.approx((5_000, 10.0, False, 10.0))
    assert found.lanes["normal"] == pytest.approx((3, 30.0, False, 30.0))
    assert found.seconds == pytest.approx(40.0)


@pytest.mark.parametrize(("jobs", "frames"), [(5_000, 5), (10**6, 1_000), (2, 1), (130, 65), (10**4, 10**4)])
def test_a_sample_of_a_list_is_small(jobs: int, frames: int) -> None:
    read = sum(
        (last if last >= 0 else frames + last) - (first if first >= 0 else frames + first) + 1
        for _, _, first, last in backlog._ends(b"lane", jobs, frames)
    )
    assert read <= max(2, backlog.SAMPLE_FRAMES_MAX) and read * jobs / frames < 2 * jobs
    assert frames < 4 or read < frames


def test_both_ends_of_a_lane_are_read(client: Client, redis_client: redis.Redis) -> None:
    redis_client.hset(KEYS.means, mapping={"SHORT": 1_000_000, "LONG": 3_000_000})
    for name in ("SHORT", "LONG"):
        for _ in range(40):
            client.submit(name, {})
    assert look(client).seconds == pytest.approx(160.0)
    Hands(redis_client).fetch(40)  # the rest is LONG
    found = look(client)
    assert (found.seconds, found.workers) == (pytest.approx(120.0), 1)


def test_the_sorted_part_is_sampled_evenly_and_by_what_was_predicted(
    client: Client, redis_client: redis.Redis
) -> None:
    """Short jobs stand at one end of it and long ones at the other, so its ends alone tell nothing."""
    redis_client.hset(KEYS.means, mapping={"A": 9_000_000})
    bound_us, mean_us, jobs = 10**9, 10**7, 500
    redis_client.hset(KEYS.model, mapping={"version": "v", "bound_us": bound_us, "mean_us": mean_us})
    order = model.Order("v", "", bound_us, mean_us, {"normal": "bounded"})
    run_s = [0.01 if at < 300 else 20.0 for at in range(jobs)]
    scored(redis_client, "normal", [int(order.likely_boost_us("normal", one)) for one in run_s])
    found = look(client).lanes["normal"]
    assert found.jobs == jobs and found.listed_seconds == 0.0
    assert found.seconds == pytest.approx(sum(run_s), rel=0.1)
    redis_client.delete(KEYS.model)
    assert look(client).lanes["normal"].seconds == pytest.approx(9.0 * jobs), "boosts tell nothing"


def test_what_nobody_has_timed_counts_as_the_others_do_or_as_a_second(
    client: Client, redis_client: redis.Redis
) -> None:
    client.submit_alike("NEW", [{}] * 10)
    assert look(client).seconds == pytest.approx(10 * backlog.UNKNOWN_S)
    redis_client.hset(KEYS.means, "OTHER", 500_000)
    assert look(client).seconds == pytest.approx(5.0)
    redis_client.hset(KEYS.means, "NEW", 100_000)
    assert look(client).seconds == pytest.approx(1.0)


def test_a_paused_lane_asks_for_no_workers(client: Client) -> None:
    client.submit_alike("A", [{}] * 10, priority="low")
    client.pause("low")
    found = look(client)
    assert (found.lanes["low"].jobs, found.lanes["low"].paused, found.seconds) == (10, True, 0.0)


def test_damaged_frames_and_numbers_break_nothing(client: Client, redis_client: redis.Redis) -> None:
    redis_client.hset(KEYS.means, mapping={"A": 1_000_000, "B": "soon"})
    redis_client.rpush(KEYS.queue("high"), b"no frame")
    client.submit_alike("A", [{}] * 4, priority="high")
    redis_client.zadd(KEYS.sorted("low"), {b"": 1.0})
    assert look(client).lanes["high"].seconds >= 4.0
    assert look(client).lanes["low"].jobs == 1
