"""The tests' own helpers: servers of every version start, are private, and come back after a kill."""

import os
import stat
from collections.abc import Callable

import pytest
import redis

from tests.support.fake_clock import FakeClock
from tests.support.redis_server import RedisServer, binaries
from tests.support.waiting import await_until, wait_until
from tqe.clock import SYSTEM, Clock

MakeRedis = Callable[..., RedisServer]


def test_any_redis_is_a_private_durable_server(any_redis: RedisServer) -> None:
    client = any_redis.client()
    info = client.info()
    assert info["redis_version"] or info["valkey_version"]
    assert info["tcp_port"] == 0
    assert info["aof_enabled"] == 1
    assert info["maxmemory_policy"] == "noeviction"
    assert stat.S_IMODE(os.stat(any_redis.folder).st_mode) == 0o700
    client.close()


def test_the_bundled_oldest_version_is_among_them() -> None:
    assert any(binary.version[:2] == (6, 2) for binary in binaries())


def test_each_test_starts_with_an_empty_server(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    redis_client.set("left", "over")
    redis_client.config_set("maxmemory", "1mb")
    redis_server.reset()
    assert redis_client.dbsize() == 0
    assert redis_client.config_get("maxmemory") == {"maxmemory": "0"}


def test_killed_server_comes_back_with_its_data(make_redis: MakeRedis) -> None:
    server = make_redis()
    with server.client() as client:
        client.set("k", "v")
    server.kill()
    assert not server.running
    server.start()
    with server.client() as client:
        assert client.get("k") == b"v"


def test_close_leaves_neither_process_nor_folder(make_redis: MakeRedis) -> None:
    server = make_redis()
    pid, folder = server.pid, server.folder
    server.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not folder.exists()


def test_wait_until_returns_the_value_and_fails_with_the_last_one() -> None:
    values = iter([0, 0, 7])
    assert wait_until(lambda: next(values)) == 7
    with pytest.raises(AssertionError, match=r"the moon \(last value: 0\)"):
        wait_until(lambda: 0, timeout=0.01, what="the moon")


async def test_await_until_lets_the_loop_run() -> None:
    values = iter([0, 7])
    assert await await_until(lambda: next(values)) == 7


def test_fake_clock_fits_and_moves_by_hand() -> None:
    clock: Clock = FakeClock()
    assert isinstance(clock, FakeClock)
    wall, mono = clock.wall_ms(), clock.monotonic_ns()
    clock.advance(ms=5)
    assert (clock.wall_ms() - wall, clock.monotonic_ns() - mono) == (5, 5_000_000)
    clock.step_wall(ms=-30_000)
    assert clock.monotonic_ns() - mono == 5_000_000
    clock.suspend(ms=10)
    assert (clock.monotonic_ns() - mono, clock.boottime_ns() - mono) == (5_000_000, 15_000_000)


def test_system_clock_units_agree() -> None:
    ms, us = SYSTEM.wall_ms(), SYSTEM.wall_us()
    assert 0 <= us - ms * 1000 < 60_000_000
    assert SYSTEM.boottime_ns() >= SYSTEM.monotonic_ns() - 1_000_000
