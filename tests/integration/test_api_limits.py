"""How much callers may ask of the REST API: requests a second, and what may wait in a lane."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from tests.support.cli import Cli
from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.web import ServeIt, Web
from tqe.api import pulse as pulse_module
from tqe.api.limits import Limits
from tqe.api.pulse import Pulse
from tqe.settings import Settings
from tqe.store.reading import MORE_TOTALS, TOTALS, LaneStatus, QueueStatus

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
    wait_until(lambda: web.get("/readyz").status == 200, 10)
    told = [web.post("/api/v1/jobs", {"type": "A"}) for _ in range(4)]
    assert [one.status for one in told] == [202, 202, 202, 429], "before Redis was asked again, too"
    problem = told[3].problem(429, "backlog-full")
    assert problem["lane"] == "normal" and "3 jobs wait in the lane normal" in problem["detail"]
    assert 1 <= int(told[3].headers["retry-after"]) <= 60
    mixed = lines(web, LINE + b'{"type": "A", "priority": "HIGH"}\n{"type": "A", "priority": "x"}\n' + LINE)
    assert [one.get("error", {}).get("status", 200) for one in mixed] == [429, 200, 422, 429]
    Hands(redis_client).fetch()
    wait_until(lambda: web.post("/api/v1/jobs", {"type": "A"}).status == 202, 10)


# ------------------------------------------------------------------ predicted seconds


def status(*, queued: int, running: int, completed: int) -> QueueStatus:
    totals = dict.fromkeys((*TOTALS, *MORE_TOTALS), 0) | {"completed": completed}
    return QueueStatus(
        lanes={"normal": LaneStatus(queued=queued, sorted=0)},
        running=running,
        scheduled=0,
        dead=0,
        totals=totals,
        workers=(),
        quarantined_frames=0,
        parked_frames=0,
    )


async def test_seconds_of_work_are_jobs_times_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two run at any time and four end in a second: each takes half a second."""
    now = SimpleNamespace(ns=10**9, monotonic_ns=lambda: now.ns, wall_ms=lambda: 0)
    monkeypatch.setattr(pulse_module, "clock", now)
    told = SimpleNamespace(status=None)

    async def ask() -> Any:
        return told.status

    pulse = Pulse(SimpleNamespace(status=ask))  # type: ignore[arg-type]
    limits = Limits(Settings(http_backlog_s_max=10), pulse)
    assert limits.active and limits.enter("normal") is None, "nothing is known yet"
    for second in range(60):
        told.status = status(queued=19, running=2, completed=4 * second)
        now.ns += 10**9
        await pulse.look()
    assert pulse.mean_s == pytest.approx(0.5, rel=0.02)
    assert limits.enter("normal") is None
    problem = limits.enter("normal")
    assert problem is not None and problem.status == 429 and problem.retry_after_s == 1
    assert "about 10 seconds of work on one worker" in problem.detail
    told.status = status(queued=4_000, running=2, completed=240)
    await pulse.look()
    problem = limits.enter("normal")
    assert problem is not None and problem.retry_after_s == 60, "no longer than makes sense to wait"


def test_without_limits_nothing_is_counted() -> None:
    assert not Limits(Settings(), SimpleNamespace()).active  # type: ignore[arg-type]
    assert Limits(Settings(http_backlog_jobs_max=0), SimpleNamespace()).active  # type: ignore[arg-type]
