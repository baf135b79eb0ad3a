"""Fixtures that every test may use: private real Redis servers, emptied for each test."""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator

import pytest
import redis

from tests.support.fake_clock import FakeClock
from tests.support.redis_server import Binary, RedisServer, binaries

# A shell's background job is started with SIGINT ignored, and so would be all that we start: Ctrl-C could not
# be tried. With a handler here, what we start begins with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Servers by binary name, started when a test first asks, stopped by pid at the end of the session.
_Servers = Callable[[Binary], RedisServer]


@pytest.fixture(scope="session")
def _servers() -> Iterator[_Servers]:
    running: dict[str, RedisServer] = {}

    def get(binary: Binary) -> RedisServer:
        server = running.get(binary.name)
        if server is None:
            server = running[binary.name] = RedisServer(binary)
            server.start()
        return server

    yield get
    for server in running.values():
        server.close()


@pytest.fixture
def redis_server(_servers: _Servers) -> RedisServer:
    """An empty server of the default binary: what stands on PATH, else the bundled one."""
    found = binaries()
    assert found, "no redis-server: none on PATH, and the bundled one is missing"
    server = _servers(found[0])
    server.reset()
    return server


@pytest.fixture
def redis_client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client (bytes, no blanket retry) of `redis_server`."""
    with contextlib.closing(redis_server.client()) as client:
        yield client


@pytest.fixture(params=binaries(), ids=lambda binary: binary.name)
def any_redis(request: pytest.FixtureRequest, _servers: _Servers) -> RedisServer:
    """An empty server, once for each version that was found: the oldest that we support to the newest."""
    server = _servers(request.param)
    server.reset()
    return server


@pytest.fixture
def make_redis() -> Iterator[Callable[..., RedisServer]]:
    """`make_redis(binary=None, **config)` starts a server that the test may kill or misconfigure."""
    made: list[RedisServer] = []

    def make(binary: Binary | None = None, **config: str) -> RedisServer:
        server = RedisServer(binary or binaries()[0], **config)
        made.append(server)
        server.start()
        return server

    yield make
    for server in made:
        server.close()


@pytest.fixture
def fake_clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What our own loggers say of warnings and worse, whatever a test before has set up."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tqe")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(level)
