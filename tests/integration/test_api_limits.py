"""How much callers may ask of the REST API: requests a second, and what may wait in a lane."""

import json
from typing import Any

import redis

from tests.support.cli import Cli
from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.web import Answer, ServeIt, Web
from tqe.api.limits import Limits
from tqe.settings import Settings
from tqe.store.keys import Keys

LINE = b'{"type": "A"}\n'


def lines(web: Web, body: bytes, **headers: str) -> list[Any]:
    told = web.post("/api/v1/jobs:batch", body, Content_Type="application/x-ndjson", **headers)
    assert told.status == 200, told.body
    return [json.loads(line) for line in told.body.splitlines()]


def test_a_token_has_so_many_requests(redis_server: RedisServer, serve_it: ServeIt) -> None:
    cli = Cli({"TQE_REDIS_URL": redis_server.url, "TQE_NAMESPACE": "limits"})
    one, other = (
        {"Authorization": f"Bearer {cli('token', 'create', name).stdout.strip()}"}
        for name in ("one", "other")
    )
    web = serve_it(TQE_NAMESPACE="limits", TQE_HTTP_RATE_PER_S="5")
    told = [web.get("/api/v1/queues", **one) for _ in range(200)]
    refused = [answer for answer in told if answer.status != 200]
    assert refused and told[0].status == 200
    assert refused[0].problem(429, "too-many-requests")["retryAfterS"] == 1
    assert refused[0].headers["retry-after"] == "1"
    assert "'one'" in refused[0].json["detail"]
    assert web.get("/api/v1/queues", **other).status == 200
    assert web.get("/healthz").status == 200
    wait_until(lambda: web.get("/api/v1/queues", **one).status == 200, 10)


def test_each_line_of_a_batch_is_a_request(serve_it: ServeIt) -> None:
    web = serve_it(TQE_HTTP_RATE_PER_S="10")
    told = lines(web, LINE * 500)
    refused = [one for one in told if "error" in one]
    assert [one["line"] for one in told] == list(range(1, 501))
    assert 9 <= len(told) - len(refused) < 500
    assert refused[0]["error"]["status"] == 429 and refused[0]["error"]["retryAfterS"] == 1


def test_a_lane_takes_so_many_jobs(serve_it: ServeIt, redis_client: redis.Redis) -> None:
    web = serve_it(TQE_HTTP_BACKLOG_JOBS_MAX="3")
    wait_until(lambda: web.post("/api/v1/jobs", {"type": "A", "priority": "low"}).status == 429, 10)
    told = [web.post("/api/v1/jobs", {"type": "A"}) for _ in range(4)]
    assert (told[0].status, told[3].status) == (202, 429)
    problem = told[3].problem(429, "backlog-full")
    assert problem["lane"] == "normal" and "jobs wait in the lane normal" in problem["detail"]
    assert web.get("/api/v1/queues").json["queues"][1]["queued"] <= 3
    assert 1 <= int(told[3].headers["retry-after"]) <= 60
    mixed = lines(web, LINE + b'{"type": "A", "priority": "HIGH"}\n{"type": "A", "priority": "x"}\n' + LINE)
    assert [one.get("error", {}).get("status", 200) for one in mixed] == [429, 200, 422, 429]
    Hands(redis_client).fetch()
    wait_until(lambda: web.post("/api/v1/jobs", {"type": "A"}).status == 202, 10)


def test_a_lane_takes_so_many_seconds_of_work(serve_it: ServeIt, redis_client: redis.Redis) -> None:
    redis_client.hset(Keys().means, mapping={"LONG": 5_000_000, "SHORT": 1_000})
    web = serve_it(TQE_HTTP_BACKLOG_S_MAX="12")

    def submit(kind: str, priority: str) -> Answer:
        return web.post("/api/v1/jobs", {"type": kind, "priority": priority})

    assert submit("LONG", "low").status == 202
    wait_until(lambda: submit("LONG", "low").status == 429, 10)
    problem = submit("LONG", "low").problem(429, "backlog-full")
    assert "seconds of work on one worker" in problem["detail"] and problem["retryAfterS"] == 60
    assert {submit("SHORT", "high").status for _ in range(50)} == {202}


def test_without_limits_nothing_is_asked() -> None:
    nobody: Any = None
    assert not Limits(Settings(), nobody, nobody).active
    assert Limits(Settings(http_backlog_jobs_max=0), nobody, nobody).active
