"""The stream of server-sent events, and the files of the dashboard, from a real server."""

import asyncio
import contextlib
import json
import re
import signal
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.cli import bury
from tests.support.redis_server import RedisServer
from tests.support.viewing import view
from tests.support.waiting import await_until, wait_until
from tests.support.web import ServeIt, Web
from tqe.api import live
from tqe.api.groups import Groups
from tqe.api.live import Live, Part
from tqe.api.pulse import Pulse
from tqe.api.views import Views
from tqe.client import AsyncClient
from tqe.settings import Settings
from tqe.store.keys import Keys

ASSETS = {file.name: file.read_text() for file in Path(str(resources.files("tqe.api") / "assets")).iterdir()}


# ------------------------------------------------------------------ the stream


def test_a_viewer_is_sent_the_queue_as_it_changes(web: Web, redis_client: redis.Redis) -> None:
    web.post("/api/v1/jobs", {"type": "A", "priority": "high"})
    with view(web) as viewer:
        assert viewer.head.startswith("HTTP/1.1 200 ")
        assert "content-type: text/event-stream" in viewer.head
        viewer.event("history")

        def queued() -> int:
            lane = viewer.event("queue")["queues"][0]
            assert (lane["name"], lane["paused"]) == ("high", False)
            return int(lane["queued"])

        wait_until(lambda: queued() == 1)
        assert viewer.event("workers") == {"workers": [], "more": 0}
        assert viewer.event("state")["error"] is None
        bury(redis_client)
        wait_until(lambda: queued() == 0)
        (group,) = wait_until(lambda: viewer.event("dead")["groups"])
        assert (group["type"], group["count"], group["error"]) == ("A", 1, "ValueError: no good")
        assert "ids" not in group


async def test_tasks_and_the_waits_of_what_began_lately(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    keys = Keys()

    def publish(jobs: int) -> None:
        record = {"worker": 1, "pid": 7, "state": "busy", "host": "h", "steward": "s"}
        redis_client.zadd(keys.incarnations, {"one": 2e12})
        redis_client.set(keys.worker("one"), json.dumps(record))
        bins = [0] * 24
        bins[10] = jobs
        task = {"outcomes": {"completed": jobs - 1, "failed": 1, "dead": 1}, "run_bins": bins}
        task |= {"wait_bins": bins, "run_sum_s": 1.0, "wait_sum_s": 1.0}
        redis_client.set(keys.tasks("s"), json.dumps({"A": task}))

    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        pulse = Pulse(client)
        views = Views(client, pulse, Groups(client))

        async def look() -> Any:
            await pulse.look()
            return await views.tasks()

        assert await views.tasks() is None  # nothing is known of the workers yet
        publish(5)
        told = await look()
        (task,) = told["tasks"]
        assert (task["type"], task["runs"], task["failed"], task["dead"]) == ("A", 5, 1, 1)
        assert told["waits"] is None and views.opening()["waits"] == []
        publish(25)
        told = await look()
        assert (told["waits"]["bins"][10], sum(told["waits"]["bins"])) == (20, 20)
        assert told["tasks"][0]["perS"] is None or told["tasks"][0]["perS"] > 0
        publish(3)  # a supervisor that begins anew
        assert (await look())["waits"] is None
        assert views.opening()["waits"] == [told["waits"]]


def test_the_history_comes_first(web: Web) -> None:
    with view(web) as viewer:
        viewer.event("queue")
        viewer.event("queue")
    with view(web) as viewer:
        point = viewer.event("history")[-1]
    assert set(point) == {"atMs", "submittedPerS", "completedPerS", "failedPerS", "running", "queued"}
    assert set(point["queued"]) == {"high", "normal", "low"}


def test_who_asks_for_the_head_only_gets_an_end(web: Web) -> None:
    told = web("HEAD", "/api/v1/events")
    assert (told.status, told.body) == (200, b"")
    assert told.headers["content-type"].startswith("text/event-stream")


def test_streams_end_when_the_server_stops(serve_it: ServeIt) -> None:
    web = serve_it()
    with view(web) as viewer:
        viewer.event("state")
        web.program.signal(signal.SIGTERM)
        assert len(list(viewer.pieces())) < 100  # it ends, and in good order
    assert web.program.ended() == 0


# ------------------------------------------------------------------ one reading for all


class Counted(Pulse):
    """A pulse without Redis; `beat` is one look."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.error = ""

    def beat(self) -> None:
        self.looked.ring()


async def test_parts_are_read_once_for_all_and_never_for_nobody() -> None:
    pulse, reads = Counted(), 0

    async def read() -> int:
        nonlocal reads
        reads += 1
        return reads

    shown = Live(pulse, {"queue": Part(read)})
    running = asyncio.create_task(shown.run())
    closing = asyncio.Event()

    async def look(found: list[bytes]) -> None:
        with shown.watching():
            async for text in shown.events(closing):
                found.append(text)

    for _ in range(5):
        pulse.beat()
        await asyncio.sleep(0)
    assert reads == 0
    seen: list[list[bytes]] = [[] for _ in range(10)]
    viewers = [asyncio.create_task(look(one)) for one in seen]
    await await_until(lambda: all(live.event("queue", 1) in one for one in seen))
    pulse.beat()
    await await_until(lambda: all(live.event("queue", 2) in one for one in seen))
    assert reads == 2
    closing.set()
    await asyncio.gather(*viewers)
    for _ in range(5):
        pulse.beat()
        await asyncio.sleep(0)
    assert (reads, shown.viewers) == (2, 0)
    running.cancel()


async def test_a_part_with_a_mark_is_read_again_when_that_changes() -> None:
    pulse, reads, mark = Counted(), 0, "one"

    async def read() -> int:
        nonlocal reads
        reads += 1
        return reads

    shown = Live(pulse, {"dead": Part(read, mark=lambda: mark)})
    running = asyncio.create_task(shown.run())
    with shown.watching():
        await await_until(lambda: reads == 1)
        for _ in range(5):
            pulse.beat()
            await asyncio.sleep(0.001)
        assert reads == 1
        mark = "two"
        pulse.beat()
        await await_until(lambda: reads == 2)
    with shown.watching():  # whoever comes after nobody looked gets it in any case
        pulse.beat()
        await await_until(lambda: reads == 3)
    running.cancel()


async def test_a_silent_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_S", 0.01)
    events = Live(Counted(), {}, lambda: {"history": []}).events(asyncio.Event())
    assert (await anext(events)).startswith(b"event: history\n")
    assert (await anext(events)).startswith(b": ")
    await events.aclose()


def test_too_many_viewers_are_refused(serve_it: ServeIt) -> None:
    web = serve_it()
    with contextlib.ExitStack() as stack:
        for _ in range(live.VIEWERS_MAX):
            stack.enter_context(view(web))
        told = web.get("/api/v1/events")
        told.problem(503, "too-many-viewers")
        assert told.headers["retry-after"] == "10"

    def seen_again() -> bool:
        with view(web) as viewer:
            return viewer.head.startswith("HTTP/1.1 200 ")

    wait_until(seen_again)


# ------------------------------------------------------------------ the page


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_each_file_is_served_and_may_do_little(web: Web, name: str) -> None:
    told = web.get("/" if name == "index.html" else f"/assets/{name}")
    assert (told.status, told.body.decode()) == (200, ASSETS[name])
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert told.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
    policy = told.headers["content-security-policy"]
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'"):
        assert rule in policy
    assert told.headers["x-content-type-options"] == "nosniff"


def test_nothing_is_loaded_from_elsewhere_and_no_text_becomes_markup() -> None:
    for name, text in ASSETS.items():
        bare = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.", bare), name
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function"
        assert not re.search(forbidden, text), name
    page = ASSETS["index.html"]
    assert not re.search(r"\son\w+=|style=|<style|<script(?![^>]*src=)", page)
    for name in re.findall(r'(?:src|href)="assets/([^"]+)"', page):
        assert name in ASSETS


def test_every_file_says_what_it_owns() -> None:
    for name, text in ASSETS.items():
        if name.endswith(".js"):
            assert re.match(r"// [A-Z].*[.:]\n", text.replace("\n// ", " ")), name
