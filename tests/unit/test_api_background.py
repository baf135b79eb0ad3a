"""What looks in the background of `tqe serve` survive, and what becomes of a process in which one ends."""

import asyncio
import os
import resource
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.support.waiting import await_until
from tqe.api import faults as faults_module
from tqe.api import groups as groups_module
from tqe.api import guard as guard_module
from tqe.api import limits as limits_module
from tqe.api import processes
from tqe.api import pulse as pulse_module
from tqe.api.faults import Faults
from tqe.api.groups import KEPT_FROM_JOBS
from tqe.api.guard import Guard
from tqe.api.limits import Limits
from tqe.api.live import Live, Part
from tqe.api.problems import outward
from tqe.api.pulse import Pulse
from tqe.api.service import ServeOptions
from tqe.errors import RedisUnavailable
from tqe.settings import Settings
from tqe.supervisor import process


class OddClient:
    """Whatever it is asked ends in something that nobody has thought of."""

    def __init__(self) -> None:
        self.asked = 0
        self.core: Any = type("Core", (), {"keys": None})

    async def status(self) -> None:
        self.asked += 1
        raise ValueError("odd")

    async def run(self, steps: Any) -> None:
        steps.close()
        await self.status()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pulse_module, guard_module, limits_module):
        monkeypatch.setattr(module, "PERIOD_S", 0.001)


def limits(client: Any) -> Limits:
    return Limits(Settings(http_backlog_jobs_max=1), client, Pulse(client))


LOOKS: list[Callable[[Any], Any]] = [
    Pulse,
    lambda client: Guard(client, loopback=True, host="localhost", origins=()),
    limits,
]


@pytest.mark.parametrize("made", LOOKS)
async def test_a_look_goes_on_whatever_happens_and_is_told_once(
    made: Callable[[Any], Any], logged: list[str]
) -> None:
    client = OddClient()
    running = asyncio.create_task(made(client).run())
    await await_until(lambda: client.asked > 5 or running.done())
    assert not running.done()
    running.cancel()
    assert len(logged) == 1 and "cannot be read" in logged[0]


async def test_a_part_that_cannot_be_read_leaves_the_others(logged: list[str]) -> None:
    pulse = Pulse(OddClient())  # type: ignore[arg-type]
    pulse.error = ""
    reads = 0

    async def good() -> dict[str, int]:
        nonlocal reads
        reads += 1
        return {"reads": reads}

    async def odd() -> Any:
        raise AttributeError("odd")

    async def no_json() -> Any:
        return {"x": object()}

    def no_mark() -> object:
        raise KeyError("odd")

    parts = {"odd": Part(odd), "no_json": Part(no_json), "no_mark": Part(good, mark=no_mark)}
    live = Live(pulse, parts | {"good": Part(good)})
    running = asyncio.create_task(live.run())
    with live.watching():

        def turned() -> bool:
            pulse.looked.ring()
            return reads > 3 or running.done()

        await await_until(turned)
        assert not running.done() and "good" in live._events
    running.cancel()
    assert len(logged) == 3 and all("of the live view" in said for said in logged)


async def test_a_fault_that_goes_on_is_told_now_and_then(
    logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults()
    for _ in range(3):
        faults.note("it", RedisUnavailable("gone"))
        faults.note("it", ValueError("odd"))
    assert len(logged) == 2
    monkeypatch.setattr(faults_module, "_AGAIN_S", 0)
    faults.note("it", ValueError("odd"))
    assert len(logged) == 3


async def _returns(self: object) -> None:
    return


async def _fails(self: object) -> None:
    raise AssertionError("never thought of")


async def _is_cancelled(self: object) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("end", [_returns, _fails, _is_cancelled])
def test_a_server_in_which_a_look_ends_ends_too(
    end: Callable[[object], Awaitable[None]], logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pulse, "run", end)
    options = ServeOptions(port=0)
    reader, writer = os.pipe()
    with processes.listen(options) as listener:
        life = processes._Life(listener, Settings(redis_url="redis://127.0.0.1:1"), None, options, reader)
        assert life.run() == 1
    with suppress(OSError):
        os.close(reader)
    os.close(writer)
    assert any("this server process ends" in said for said in logged)


# ------------------------------------------------------------------ what is told, what is read


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("run_at takes a time, not 'run_at'", "runAt takes a time, not 'run_at'"),
        ("no option 'max_retries_x', but max_retries", "no option 'max_retries_x', but maxRetries"),
        ("unknown field `idempotency_key`", "unknown field `idempotency_key`"),
        ("run_at: not 'its \\' run_at", "runAt: not 'its \\' run_at"),
        ("of job run_at_noon", "of job run_at_noon"),
    ],
)
def test_names_are_told_as_on_the_wire_and_quotes_as_they_are(said: str, told: str) -> None:
    assert outward(said) == told


async def test_groups_of_many_dead_jobs_are_read_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, jobs = 0, KEPT_FROM_JOBS

    async def read(client: Any) -> dict[str, Any]:
        nonlocal reads
        reads += 1
        await asyncio.sleep(0)
        return {"groups": [], "jobs": jobs, "more": False}

    monkeypatch.setattr(groups_module, "groups_document", read)
    groups = groups_module.Groups(OddClient())  # type: ignore[arg-type]
    await asyncio.gather(*(groups.document() for _ in range(5)))
    assert reads == 1 and groups.kept
    groups.forget()
    jobs = 1
    await groups.document()
    await groups.document()
    assert reads == 3 and not groups.kept


def test_the_limit_of_open_files_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert process.raise_file_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
