"""The pytest plugin: fixtures for the tests of an application, found by pytest through its entry point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tqe.app import App
    from tqe.testing import Eager, Queue

# Nothing of the engine is imported before a fixture is asked for: pytest loads this file in every project.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("tqe_app", "The app that TQE's fixtures test, as module:attribute.", default="")


@pytest.fixture
def tqe_app(request: pytest.FixtureRequest) -> App:
    """The app under test: that of the option `tqe_app`, or whatever a fixture of this name in the project
    answers."""
    path = request.config.getini("tqe_app")
    if not path:
        pytest.fail(
            "which app do the tests test? Set `tqe_app = module:attribute` in pytest's configuration,"
            " or define a fixture `tqe_app` that returns the App",
            pytrace=False,
        )
    from tqe.app import load_app

    return load_app(path)


@pytest.fixture(scope="session")
def tqe_redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private Redis, started when a test first asks, gone after the last."""
    from tqe.testing import private_redis

    with private_redis(tmp_path_factory.mktemp("tqe")) as url:
        yield url


@pytest.fixture
def tqe_eager(tqe_app: App) -> Iterator[Eager]:
    """Eager mode: what the test submits through `tqe_app` runs at once."""
    from tqe.testing import eager

    with eager(tqe_app) as ran:
        yield ran


@pytest.fixture
def tqe_queue(tqe_app: App, tqe_redis_url: str) -> Iterator[Queue]:
    """An empty queue of `tqe_app` on a private Redis; `drain()` or `worker()` runs real workers."""
    from tqe.testing import queue

    with queue(tqe_app, tqe_redis_url) as made:
        yield made
