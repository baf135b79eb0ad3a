"""Fixtures of the integration tests: rigs of real workers, servers of the REST API."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.redis_server import RedisServer
from tests.support.web import ServeIt, Web, serve
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


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Web]]:
    """Servers that several tests use, by the address of their Redis."""
    servers: dict[str, Web] = {}
    yield servers
    for web in servers.values():
        web.program.close()


@pytest.fixture
def web(redis_server: RedisServer, shared: dict[str, Web], tmp_path_factory: pytest.TempPathFactory) -> Web:
    """A server without an app, shared by all tests."""
    if redis_server.url not in shared:
        folder = tmp_path_factory.mktemp("serve")
        shared[redis_server.url] = Web(serve(folder, {"TQE_REDIS_URL": redis_server.url}))
    return shared[redis_server.url]


@pytest.fixture
def serve_it(redis_server: RedisServer, tmp_path: Path) -> Iterator[ServeIt]:
    """`serve_it("work:app", "--procs", "2")` starts a server of the test's own."""
    begun: list[Web] = []

    def begin(*args: str, **env: str) -> Web:
        begun.append(Web(serve(tmp_path, {"TQE_REDIS_URL": redis_server.url} | env, *args)))
        return begun[-1]

    yield begin
    for web in begun:
        web.program.close()
