"""A `World` on each version of Redis that was found."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.lua.world import World
from tests.support.redis_server import RedisServer


@pytest.fixture
def world(any_redis: RedisServer) -> Iterator[World]:
    with contextlib.closing(any_redis.client()) as client:
        yield World(client)
