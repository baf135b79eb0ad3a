"""Fixtures of the integration tests: rigs of real workers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.redis_server import RedisServer
from tests.support.worker import Rig, make_rig


@pytest.fixture
def rig_of(
    redis_server: RedisServer, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Rig]]:
    """`rig_of(**settings)` makes a rig on the shared server, or on another one given as `server`."""
    made: list[Rig] = []
    failures = request.session.testsfailed

    def make(server: RedisServer = redis_server, **settings: Any) -> Rig:
        folder = tmp_path / f"rig-{len(made)}"
        folder.mkdir()
        made.append(make_rig(server, folder, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close(failed=request.session.testsfailed > failures)


@pytest.fixture
def rig(rig_of: Callable[..., Rig]) -> Rig:
    """A rig with the usual settings."""
    return rig_of()
