"""Scripts on a real Redis, each call with its round trip, and the whole way of a job without a loop.

Imports of the engine stand in functions, for the reason that `parts` gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from bench.micro.parts import FRAME, INCARNATION, LANE, SINGLES, Bench, outgoing, settler

if TYPE_CHECKING:
    from tests.support.redis_server import RedisServer
    from tqe.store.call import Call, SyncDoor
    from tqe.store.working import Fetcher

ROUNDS = 30


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    from tests.support.redis_server import RedisServer, binaries

    running = RedisServer(binaries()[0])
    running.start()
    yield running
    running.close()


@pytest.fixture
def door(server: RedisServer) -> Iterator[SyncDoor]:
    from tqe.store import working
    from tqe.store.call import SyncDoor, connect
    from tqe.store.keys import Keys

    server.reset()
    client = connect(server.url)
    found = SyncDoor(client)
    found.run(working.takeover(Keys(), "", INCARNATION, 600_000))
    yield found
    client.close()


_made = 0


def enqueue(count: int, jobs: int) -> Call:
    """Frames that were never sent before: the script would recognise a repeat by its snapshot."""
    from tqe.store import producing
    from tqe.store.keys import Keys

    global _made
    first, _made = _made, _made + count
    return producing.enqueue_call(Keys(), outgoing(count, jobs, first=first))[0]


def fetcher() -> Fetcher:
    from tqe.store import working
    from tqe.store.keys import Keys

    return working.Fetcher(Keys(), INCARNATION, [working.LaneRule(LANE)], 600_000)


def fetch(door: SyncDoor, calls: Fetcher) -> list[bytes]:
    from tqe.store import working

    call = calls.call(jobs_max=1 << 20, bytes_max=1 << 20, frames_max=1_000)
    return working.read_fetch(door.run(call)).frames


def settle(leases: list[Any]) -> list[Call]:
    return [one.call for one in settler()(leases)]


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
