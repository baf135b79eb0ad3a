"""Fixtures of the chaos tests: the seed of a run, and an arena that is judged and cleared away."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.arena import Arena
from tests.support.redis_server import RedisServer


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed with every failure; TQE_TEST_SEED replays it (the faults and the load, not the scheduler)."""
    number = int(os.environ.get("TQE_TEST_SEED") or secrets.randbelow(2**31))
    print(f"\nTQE_TEST_SEED={number} pytest '{request.node.nodeid}'")
    return number


@pytest.fixture
def arena(make_redis: Callable[..., RedisServer], tmp_path: Path, seed: int) -> Iterator[Arena]:
    with contextlib.closing(Arena(make_redis(), tmp_path, seed)) as made:
        yield made
