"""Scripts on a real Redis, each call with its round trip, and the whole way of a job without a loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.micro.parts import FRAME, KEYS, LANE, SINGLES, TYPE, Bench, frames
from tests.support.redis_server import RedisServer, binaries
from tqe.codec import hot
from tqe.job import new_snapshot
from tqe.store import producing, settling, working
from tqe.store.call import Call, SyncDoor, connect
from tqe.store.producing import Outgoing

INCARNATION = "0" * 26
ROUNDS = 30


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    running = RedisServer(binaries()[0])
    running.start()
    yield running
    running.close()


@pytest.fixture
def door(server: RedisServer) -> Iterator[SyncDoor]:
    server.reset()
    client = connect(server.url)
    found = SyncDoor(client)
    found.run(working.takeover(KEYS, "", INCARNATION, 600_000))
    yield found
    client.close()


_made = 0


def outgoing(count: int, jobs: int) -> list[Outgoing]:
    """Frames that were never sent before: enqueue would recognise a repeat by its snapshot."""
    global _made
    first, _made = _made, _made + count
    value = new_snapshot(jobs, LANE, f"{TYPE.decode()}*{jobs}")
    return [
        Outgoing(frame[4:30], jobs, frame, LANE, "0", value) for frame in frames(count, jobs, first=first)
    ]


def enqueue(count: int, jobs: int) -> Call:
    return producing.enqueue_call(KEYS, outgoing(count, jobs))[0]


def fetcher() -> working.Fetcher:
    return working.Fetcher(KEYS, INCARNATION, [working.LaneRule(LANE)], 600_000)


def fetch(door: SyncDoor, calls: working.Fetcher) -> list[bytes]:
    call = calls.call(jobs_max=1 << 20, bytes_max=1 << 20, frames_max=1_000)
    return working.read_fetch(door.run(call)).frames


def settle(leases: list[hot.Lease]) -> list[Call]:
    batch = settling.SettleBatch()
    groups, _ = hot.plain_done(leases)
    for (second, char, value), done in groups.items():
        batch.add_done((second, char) if value else None, value, [lease.name for lease in done], done)
    made = batch.calls(KEYS, INCARNATION, result_ttl_s=3_600, dlq_max=1_000)
    return [one.call for one in made]


SHAPES = pytest.mark.parametrize(("count", "jobs"), [(SINGLES, 1), (10, FRAME)], ids=["singles", "bulk"])


@SHAPES
def test_enqueue(benchmark: Any, door: SyncDoor, count: int, jobs: int) -> None:
    benchmark.extra_info["jobs"] = count * jobs
    benchmark.pedantic(door.run, setup=lambda: ((enqueue(count, jobs),), {}), rounds=ROUNDS, warmup_rounds=2)


@SHAPES
def test_fetch(benchmark: Any, door: SyncDoor, count: int, jobs: int) -> None:
    benchmark.extra_info["jobs"] = count * jobs
    calls = fetcher()

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        door.run(enqueue(count, jobs))
        return (door, calls), {}

    benchmark.pedantic(fetch, setup=setup, rounds=ROUNDS, warmup_rounds=2)


@SHAPES
def test_settle(benchmark: Any, door: SyncDoor, count: int, jobs: int) -> None:
    benchmark.extra_info["jobs"] = count * jobs
    calls, bench = fetcher(), Bench()

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        door.run(enqueue(count, jobs))
        leases = bench.run(fetch(door, calls))
        made = settle(leases)
        bench.slot.close_rows(leases)
        return (made,), {}

    def send(made: list[Call]) -> None:
        for call in made:
            door.run(call)

    benchmark.pedantic(send, setup=setup, rounds=ROUNDS, warmup_rounds=2)


@SHAPES
def test_end_to_end(benchmark: Any, door: SyncDoor, count: int, jobs: int) -> None:
    """Pack, enqueue, fetch, run, settle, one after the other: the sum of what overlaps in a real worker."""
    benchmark.extra_info["jobs"] = count * jobs
    calls, bench = fetcher(), Bench()

    def once() -> None:
        door.run(enqueue(count, jobs))
        leases = bench.run(fetch(door, calls))
        for call in settle(leases):
            door.run(call)
        bench.slot.close_rows(leases)

    benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=2)
