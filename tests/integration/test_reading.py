"""What readers are told: the queue, a job, its workers, the dead letters, whatever the state of Redis."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tqe.client import Client
from tqe.settings import Settings
from tqe.store import reading
from tqe.store.keys import Keys

KEYS = Keys()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(Settings(redis_url=redis_server.url)) as client:
        yield client


def publish(redis_client: redis.Redis, incarnation: str, **told: Any) -> None:
    """What a steward does once a second."""
    redis_client.zadd(KEYS.incarnations, {incarnation: 2e12})
    record = {"worker": 0, "pid": 1, "cpu": 0, "state": "idle", "host": "h", "jobs": [], **told}
    redis_client.set(KEYS.worker(incarnation), json.dumps(record))


def test_an_empty_queue_has_the_whole_shape(client: Client) -> None:
    assert client.status().as_dict() == {
        "lanes": {name: {"queued": 0, "sorted": 0} for name in ("high", "normal", "low")},
        "running": 0,
        "scheduled": 0,
        "dead": 0,
        "totals": {
            "submitted": 0,
            "completed": 0,
            "failed": 0,
            "retried": 0,
            "dead": 0,
            "duplicate": 0,
            "cancelled": 0,
            "recovered": 0,
            "fenced": 0,
        },
        "workers": [],
    }


def test_types_of_coroutines_come_from_their_records(client: Client, redis_client: redis.Redis) -> None:
    names = [job.id for job in client.submit_many([("A", {}), ("B", {}), ("B", {})])]
    untracked = client.submit("C", {}, track=False).id
    ids = ["x.0", *names, untracked, "0" * 26 + ".0"]
    publish(redis_client, "B" * 26, jobs=[{"id": one, "since_ms": 5} for one in ids])
    found = client.workers()
    named = client.run(reading.name_jobs(KEYS, found, 3))
    assert [job.type for job in named[0].jobs] == ["", "A", "B", "", "", ""]
    named = client.run(reading.name_jobs(KEYS, found, 10))
    assert [job.type for job in named[0].jobs] == ["", "A", "B", "B", "", ""]
    assert [job.id for job in named[0].jobs] == ids


def test_each_part_of_the_queue_is_counted_in_jobs(client: Client, redis_client: redis.Redis) -> None:
    client.submit_alike("A", [{}] * 30)
    client.submit_alike("A", [{}] * 20, priority="high")
    client.submit_alike("A", [{}] * 10, delay=60)
    client.pause("low")
    redis_client.zadd(KEYS.sorted("high"), {b"x": 1.0})
    redis_client.hset(KEYS.depth, "high:sorted", 7)
    redis_client.rpush(KEYS.quarantine, b"x", b"y")
    redis_client.rpush(KEYS.parked, b"x")
    publish(redis_client, "B" * 26, worker=1, pid=7, cpu=3, state="busy", jobs=[
        {"id": "x.0", "type": "A", "since_ms": 5}, {"id": "x.1", "type": "A", "since_ms": 6},
    ])  # fmt: skip
    publish(redis_client, "A" * 26)
    redis_client.zadd(KEYS.incarnations, {"C" * 26: 2e12})  # registered, not yet published
    status = client.status()
    assert status.lanes == {
        "high": reading.LaneStatus(queued=27, sorted=7),
        "normal": reading.LaneStatus(queued=30, sorted=0),
        "low": reading.LaneStatus(queued=0, sorted=0, paused=True),
    }
    assert (status.scheduled, status.running, status.quarantined_frames, status.parked_frames) == (
        10,
        2,
        2,
        1,
    )
    assert status.totals["submitted"] == 60
    assert status.as_dict()["workers"] == [
        {"worker": 0, "pid": 1, "cpu": 0, "state": "idle", "job": None},
        {"worker": 1, "pid": 7, "cpu": 3, "state": "busy", "job": "x.0"},
    ]
    client.resume("low")
    assert not client.status().lanes["low"].paused


def test_a_depth_that_drifted_is_bounded_by_what_is_there(client: Client, redis_client: redis.Redis) -> None:
    client.submit_many([("A", {})], priority="high")
    client.submit_many([("A", {})], delay=60)
    redis_client.hset(KEYS.depth, mapping={"high": -5, "normal": 400, "low:sorted": 3, "delayed": 0})
    status = client.status()
    assert [lane.queued for lane in status.lanes.values()] == [1, 0, 0] and status.scheduled == 1


def test_lanes_that_nobody_configured_here_are_shown(client: Client, redis_client: redis.Redis) -> None:
    other = Settings(redis_url=client.core.settings.redis_url, lanes=("bulk", "normal"))
    with Client(other) as elsewhere:
        elsewhere.submit("A", {}, priority="bulk")
    assert list(client.status().lanes) == ["high", "normal", "low", "bulk"]
    assert client.status().lanes["bulk"].queued == 1


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"worker":"x","pid":1}', b'{"worker":1,"pid":1,"jobs":[7]}', b"\xff"]
)
def test_what_is_no_record_of_a_worker_is_left_out(
    client: Client, redis_client: redis.Redis, text: bytes
) -> None:
    publish(redis_client, "A" * 26)
    redis_client.zadd(KEYS.incarnations, {"B" * 26: 2e12})
    redis_client.set(KEYS.worker("B" * 26), text)
    assert [worker.incarnation for worker in client.workers()] == ["A" * 26]


def test_a_job_through_its_life(client: Client, redis_client: redis.Redis) -> None:
    handle = client.submit_many([("A", {"i": 0}), ("B", {"i": 1})])[1]
    assert handle.job().as_dict() == {
        "id": handle.id,
        "type": "B",
        "status": "queued",
        "lane": "normal",
        "attempts": 0,
        "submitted_at": handle.job().as_dict()["submitted_at"],
        "started_at": None,
        "finished_at": None,
        "result": None,
        "error": None,
    }
    hands = Hands(redis_client).fetch()
    publish(redis_client, "A" * 26, jobs=[{"id": handle.id, "type": "B", "since_ms": 1_700_000_000_000}])
    running = handle.job().as_dict()
    assert (running["status"], running["attempts"]) == ("running", 1)
    assert running["started_at"] == "2023-11-14T22:13:20.000Z"
    redis_client.delete(KEYS.worker("A" * 26))
    hands.settle(lambda name: ("R", 60_000) if name == handle.id else ("C", None))
    retrying = handle.job()
    assert (retrying.status, retrying.attempts, retrying.error) == ("retrying", 1, "not yet")
    redis_client.zremrangebyscore(KEYS.delayed, "-inf", "+inf")


def test_a_job_that_ended_shows_its_own_record(client: Client, redis_client: redis.Redis) -> None:
    handle = client.submit("A", {})
    Hands(redis_client).fetch().settle(lambda name: ("C", {"n": [1, 2]}))
    found = handle.job()
    assert (found.status, found.result, found.attempts) == ("completed", {"n": [1, 2]}, 1)
    assert found.as_dict()["finished_at"] == "2023-11-14T22:13:22.000Z"


@pytest.mark.parametrize("value", [b"", b"nonsense", b"Q,5,0", b"QQ,3,0,0,0,a,b", b"\xff,1,0,0,0,a,b"])
def test_a_damaged_record_is_unknown_and_no_crash(
    client: Client, redis_client: redis.Redis, value: bytes
) -> None:
    handle = client.submit("A", {})
    (bucket,) = redis_client.keys("tq:{0}:job:*")
    redis_client.hset(bucket, handle.frame_id, value)
    redis_client.hset(bucket, handle.id, b"{")
    assert handle.job().status == "unknown"


def bury(redis_client: redis.Redis, count: int, died_ms: int, type_name: str = "A") -> None:
    for i in range(count):
        name = f"{i:026d}.{died_ms % 1000}"
        redis_client.hset(KEYS.dlq, name, b"frame")
        redis_client.hset(
            KEYS.dlq_meta,
            name,
            json.dumps({"type": type_name, "reason": "crash:SIGKILL", "died_at": died_ms}),
        )
        redis_client.zadd(KEYS.dlq_index, {name: died_ms})


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_of_dead_letters_show_each_once_also_those_of_one_millisecond(
    client: Client, redis_client: redis.Redis, newest_first: bool
) -> None:
    bury(redis_client, 1203, 1_700_000_000_001)
    bury(redis_client, 40, 1_700_000_000_000, "B")
    bury(redis_client, 300, 1_700_000_000_002)
    seen: list[str] = []
    cursor, pages = None, 0
    while pages == 0 or cursor is not None:
        page = client.run(reading.dead_jobs(KEYS, newest_first=newest_first, cursor=cursor))
        seen += [job.id for job in page.jobs]
        cursor, pages = page.cursor, pages + 1
        assert pages < 10
    assert len(seen) == len(set(seen)) == 1543
    died = [int(name[-1]) for name in seen]
    assert died == sorted(died, reverse=newest_first)


def test_dead_letters_are_filtered(client: Client, redis_client: redis.Redis) -> None:
    bury(redis_client, 600, 1_700_000_000_001)
    bury(redis_client, 3, 1_700_000_000_000, "B")
    assert len(list(client.dead_jobs(type_name="B"))) == 3
    assert len(list(client.dead_jobs(reason="crash"))) == 603
    assert list(client.dead_jobs(reason="arguments")) == []
    page = client.run(reading.dead_jobs(KEYS, newest_first=False, until_ms=1_700_000_000_000))
    assert len(page.jobs) == 3 and page.cursor is None


def test_a_dead_letter_whose_parts_are_missing_is_still_shown(
    client: Client, redis_client: redis.Redis
) -> None:
    redis_client.zadd(KEYS.dlq_index, {b"lost": 1_700_000_000_000})
    (found,) = client.dead_jobs()
    assert found.as_dict() == {
        "id": "lost",
        "type": None,
        "lane": None,
        "reason": None,
        "error": None,
        "attempts": 0,
        "crashes": 0,
        "died_at": "2023-11-14T22:13:20.000Z",
    }
    assert client.dead_job("lost") is None
    redis_client.hset(KEYS.dlq, "lost", b"no frame")
    entry = client.dead_job("lost")
    assert entry is not None and entry.payload is None


def test_what_autoscaling_wants_is_told_by_host(client: Client, redis_client: redis.Redis) -> None:
    told = {"workers": 3, "fewest": 1, "most": 8, "reason": "backlog", "text": "90 s of work wait"}
    publish(redis_client, "A" * 26, scaling=told)
    publish(redis_client, "B" * 26, scaling=told)
    publish(redis_client, "C" * 26, host="other")
    shown = {"workers": 3, "min": 1, "max": 8, "reason": "90 s of work wait"}
    assert client.status().as_dict()["autoscale"] == {"h": shown}
