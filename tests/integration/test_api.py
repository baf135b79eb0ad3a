"""The REST API as other languages use it: a real server process, a real Redis, real HTTP."""

import asyncio
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from starlette.requests import Request

from tests.support.cli import Cli, bury
from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tests.support.viewing import view
from tests.support.waiting import wait_until
from tests.support.web import Answer, ServeIt, Web, read_to_end
from tqe.api import jobs
from tqe.client import AsyncClient
from tqe.formats import IDEMPOTENCY_KEY_BYTES_MAX
from tqe.settings import Settings
from tqe.store.keys import Keys
from tqe.store.link import EARS_MAX

APP = """
from tqe import App

app = App()

@app.task("EMAIL", priority="low")
def email(to: str) -> str:
    return to
"""


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(APP)
    return Cli({"TQE_REDIS_URL": redis_server.url})


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
README_LINE = (
    '{"type": "EMAIL", "payload": "{\\"to\\":\\"test@example.com\\"}", "priority": "HIGH",'
    ' "idempotencyKey": "sample-001"}'
)


# ------------------------------------------------------------------ submit


def test_the_line_of_the_readme_creates_a_job_once(web: Web, redis_client: redis.Redis) -> None:
    first = web.post("/api/v1/jobs", README_LINE.encode(), Content_Type="application/json")
    assert first.status == 202
    assert list(first.json) == ["id", "status", "created", "predictedWaitMs"]
    assert (first.json["status"], first.json["created"]) == ("queued", True)
    again = web.post("/api/v1/jobs", README_LINE.encode())
    assert again.status == 200
    assert again.json == {
        "id": first.json["id"],
        "status": "queued",
        "created": False,
        "predictedWaitMs": None,
    }
    hands = Hands(redis_client).fetch()
    assert hands.jobs() == [(first.json["id"], "EMAIL", {"to": "test@example.com"})]


def test_the_same_key_with_another_body_is_a_conflict(web: Web) -> None:
    body = {"type": "A", "payload": {"n": 1}, "idempotencyKey": "k"}
    first = web.post("/api/v1/jobs", body).json["id"]
    told = web.post("/api/v1/jobs", body | {"payload": {"n": 2}}).problem(409, "idempotency-conflict")
    assert told["firstId"] == first


@pytest.mark.parametrize("priority", ["HIGH", "high", "High"])
def test_priorities_are_taken_in_any_case(web: Web, priority: str) -> None:
    name = web.post("/api/v1/jobs", {"type": "A", "priority": priority}).json["id"]
    assert web.get(f"/api/v1/jobs/{name}").json["lane"] == "high"


def test_delayed_jobs_are_scheduled(web: Web) -> None:
    for options in ({"delay": 60}, {"runAt": time.time() + 60}, {"runAt": "2031-01-31T08:00:00Z"}):
        told = web.post("/api/v1/jobs", {"type": "A", **options})
        assert (told.status, told.json["status"]) == (202, "scheduled"), told.body
        assert web.get(f"/api/v1/jobs/{told.json['id']}").json["status"] == "scheduled"


@pytest.mark.parametrize(
    ("body", "status", "name", "word"),
    [
        (b"", 400, "invalid-body", "not JSON"),
        (b"{", 400, "invalid-body", "the body is not JSON"),
        (b"[]", 400, "invalid-body", "object"),
        (b"\xff\xfe", 400, "invalid-body", "JSON"),
        (b'{"type": "A", "type": "B"}', 400, "invalid-body", "of the body"),
        ({"payload": {}}, 400, "invalid-body", '"type" is missing'),
        ({"type": 5}, 400, "invalid-body", '"type" is no text'),
        ({"type": "A B"}, 400, "invalid-body", "no type"),
        ({"type": "A", "payload": []}, 400, "invalid-body", "object"),
        ({"type": "A", "payload": "[1]"}, 400, "invalid-body", "object"),
        ({"type": "A", "payload": "{"}, 400, "invalid-body", "the payload is not JSON"),
        ({"type": "A", "priority": "urgent"}, 422, "unknown-priority", "high"),
        ({"type": "A", "priority": 3}, 422, "invalid-option", "priority"),
        ({"type": "A", "delay": -1}, 422, "invalid-option", "delay"),
        ({"type": "A", "delay": 1, "runAt": 2}, 422, "invalid-option", "delay"),
        ({"type": "A", "runAt": "soon"}, 422, "invalid-option", "runAt"),
        ({"type": "A", "runAt": "2031-01-31T08:00:00"}, 422, "invalid-option", "zone"),
        ({"type": "A", "maxRetries": "3"}, 422, "invalid-option", "maxRetries"),
        ({"type": "A", "idempotencyKey": ""}, 422, "invalid-option", "idempotencyKey"),
        ({"type": "A", "timeout": True}, 422, "invalid-option", "timeout"),
        ({"type": "A", "colour": "red"}, 422, "invalid-option", "colour"),
        (b'{"type": "A", "payload": ' + b'{"a":' * 65 + b"1" + b"}" * 66, 400, "invalid-body", "deep"),
        (b'{"type": "A", "payload": ' + b"[" * 100_000, 400, "invalid-body", ""),
        (b'{"type": "A", "payload": {"n": 1' + b"0" * 5_000 + b"}}", 400, "invalid-body", ""),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    web: Web, body: Any, status: int, name: str, word: str
) -> None:
    assert word in web.post("/api/v1/jobs", body).problem(status, name)["detail"]


def test_bodies_of_another_type_are_refused(web: Web) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", ""):
        web.post("/api/v1/jobs", b'{"type": "A"}', Content_Type=kind).problem(415, "wrong-content-type")
    told = web.post("/api/v1/jobs", b"x", Content_Type="application/json", Content_Encoding="gzip")
    told.problem(415, "wrong-content-encoding")
    good = web.post("/api/v1/jobs", b'{"type": "A"}', Content_Type="application/json; charset=utf-8")
    assert good.status == 202


def test_an_app_lets_arguments_be_checked_and_gives_the_lane(cli: Cli, serve_it: ServeIt) -> None:
    web = serve_it("work:app")
    told = web.post("/api/v1/jobs", {"type": "EMAIL", "payload": {"too": "x"}})
    told.problem(422, "wrong-arguments")
    name = web.post("/api/v1/jobs", {"type": "EMAIL", "payload": {"to": "x"}}).json["id"]
    assert web.get(f"/api/v1/jobs/{name}").json["lane"] == "low"


def test_an_idle_queue_promises_no_wait(web: Web, redis_client: redis.Redis) -> None:
    Hands(redis_client).fetch()  # a worker that lives, though it publishes nothing

    def predicted() -> Any:
        return web.post("/api/v1/jobs", {"type": "A", "delay": 5}).json["predictedWaitMs"]

    assert predicted() is None  # no worker tells that it lives: nobody can say


# ------------------------------------------------------------------ look, wait, cancel


def test_a_job_is_shown_with_the_fields_of_the_command(web: Web, cli: Cli) -> None:
    name = web.post("/api/v1/jobs", {"type": "A"}).json["id"]
    told = web.get(f"/api/v1/jobs/{name}")
    assert told.status == 200
    names = ["id", "type", "status", "lane", "attempts", "submittedAt", "startedAt", "finishedAt"]
    assert list(told.json) == [*names, "result", "error", "predictedMs", "predictedWaitMs"]
    assert list(told.json.values()) == list(cli.json("job", name).values())


def test_a_long_poll_ends_with_the_job(web: Web, redis_client: redis.Redis) -> None:
    name = web.post("/api/v1/jobs", {"type": "A"}).json["id"]
    began = time.monotonic()
    assert web.get(f"/api/v1/jobs/{name}?wait=0.05").json["status"] == "queued"
    with socket.create_connection(("127.0.0.1", web.port), 30) as connection:
        connection.sendall(
            f"GET /api/v1/jobs/{name}?wait=60 HTTP/1.1\r\nhost: [::1]\r\nconnection: close\r\n\r\n".encode()
        )
        wait_until(lambda: redis_client.zcard("tq:{0}:waiting") == 1, 10)
        Hands(redis_client).fetch().settle(lambda job: ("C", {"sent": True}))
        answer = read_to_end(connection)
    assert b'"status":"completed"' in answer, answer
    assert time.monotonic() - began < 50


def test_long_polls_leave_room_for_all_others(web: Web, redis_client: redis.Redis) -> None:
    """More of them than hear of an end at once, and five times as many other requests beside them."""
    job = web.post("/api/v1/jobs", {"type": "A"}).json["id"]

    def ask(path: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", web.port), 60)
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: [::1]\r\nconnection: close\r\n\r\n".encode())
        return connection

    def status(connection: socket.socket) -> bytes:
        with connection:
            return read_to_end(connection)

    waits = [ask(f"/api/v1/jobs/{job}?wait=60") for _ in range(EARS_MAX + 12)]
    channel = Keys().done(job.partition(".")[0].encode())
    wait_until(lambda: redis_client.pubsub_numsub(channel)[0][1] == EARS_MAX, 20)
    answers = [status(one) for one in [ask("/api/v1/queues") for _ in range(300)]]
    assert {answer[:12] for answer in answers} == {b"HTTP/1.1 200"}
    Hands(redis_client).fetch().settle(lambda name: ("C", None))
    assert all(b'"status":"completed"' in status(one) for one in waits)


async def test_who_cannot_wait_is_told_when_to_ask_again(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WAITS_MAX", 0)
    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        job = await client.submit("A", {})
        scope = {"type": "http", "path_params": {"id": job.id}, "query_string": b"wait=60", "headers": []}
        service: Any = SimpleNamespace(client=client, settings=client.core.settings, waits=0)
        answer = await asyncio.wait_for(jobs.show(service, Request(scope)), 20)
    assert (answer.status_code, answer.headers["retry-after"]) == (200, str(jobs.WAIT_AGAIN_S))


@pytest.mark.parametrize("wait", ["x", "-1", "61", "nan", ""])
def test_a_wait_is_a_number_of_seconds(web: Web, wait: str) -> None:
    name = web.post("/api/v1/jobs", {"type": "A"}).json["id"]
    told = web.get(f"/api/v1/jobs/{name}?wait={wait}").problem(400, "invalid-query")
    assert told["parameter"] == "wait"


def test_what_is_not_there_is_not_found(web: Web) -> None:
    for name in ("01ARZ3NDEKTSV4RRFFQ69G5F00.0", "nonsense", "%00", "%ff", "01ARZ3NDEKTSV4RRFFQ69G5F00.1000"):
        web.get(f"/api/v1/jobs/{name}").problem(404, "not-found")
        web("DELETE", f"/api/v1/jobs/{name}").problem(404, "not-found")
    web.get("/api/v2").problem(404, "not-found")
    told = web("PATCH", "/api/v1/jobs")
    assert told.problem(405, "method-not-allowed")["detail"] == "not PATCH here, but POST"
    assert told.headers["allow"] == "POST"
    allowed = web("PATCH", "/api/v1/jobs/x").headers["allow"]
    assert set(allowed.split(", ")) == {"GET", "HEAD", "DELETE"}, "all methods of the path"


def test_cancelling(web: Web, redis_client: redis.Redis) -> None:
    waiting = web.post("/api/v1/jobs", {"type": "A", "delay": 60}).json["id"]
    told = web("DELETE", f"/api/v1/jobs/{waiting}")
    assert (told.status, told.json["id"]) in ((200, waiting), (202, waiting))
    ended = web.post("/api/v1/jobs", {"type": "A"}).json["id"]
    bury(redis_client)
    told = web("DELETE", f"/api/v1/jobs/{ended}")
    assert told.problem(409, "too-late")["jobStatus"] == "dead"


# ------------------------------------------------------------------ the server itself


def test_probes_and_the_document(web: Web) -> None:
    assert web.get("/healthz").json == {"status": "ok"}
    wait_until(lambda: web.get("/readyz").status == 200, 10)
    told: Answer = web.get("/openapi.json")
    document = told.json
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]["/api/v1/jobs/{id}"]) == {"get", "delete"}
    assert "JobRequest" in document["components"]["schemas"]
    assert told.headers["x-content-type-options"] == "nosniff"
    assert "server" not in told.headers


def test_the_document_as_a_page(web: Web) -> None:
    document, told = web.get("/openapi.json").json, web.get("/docs")
    text = told.body.decode()
    for path, methods in document["paths"].items():
        assert all(f"<h2>{method.upper()} {path}</h2>" in text for method in methods)
    for name in set(re.findall(r'href="#(\w+)"', text)):
        assert f'id="{name}"' in text, "each type that is named can be looked up"
    assert "script" not in text and "script-src 'self'" in told.headers["content-security-policy"]
    longest = document["components"]["schemas"]["JobRequest"]["properties"]["idempotencyKey"]
    assert {"type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY_BYTES_MAX} in longest["anyOf"]


def test_a_redis_that_is_gone_is_no_error_of_ours(
    serve_it: ServeIt, make_redis: Callable[..., RedisServer]
) -> None:
    server = make_redis()
    web = serve_it(TQE_REDIS_URL=server.url)
    wait_until(lambda: web.get("/readyz").status == 200, 10)
    with view(web) as viewer:
        viewer.event("queue")
        server.kill()
        wait_until(lambda: web.get("/readyz").status == 503, 30)
        wait_until(lambda: viewer.event("state")["error"], what="who looks on is told")
    web.get("/readyz").problem(503, "not-ready")
    assert b"taskqueue_redis_up 0.0\n" in web.get("/metrics").body
    assert web.get("/healthz").status == 200
    server.start()
    wait_until(lambda: web.get("/readyz").status == 200, 30)
    assert web.post("/api/v1/jobs", {"type": "A"}).status == 202


def test_it_drains_and_a_long_poll_does_not_hold_it_up(serve_it: ServeIt) -> None:
    web = serve_it("--procs", "2")
    name = web.post("/api/v1/jobs", {"type": "A"}).json["id"]
    with socket.create_connection(("127.0.0.1", web.port), 30) as connection:
        connection.sendall(
            f"GET /api/v1/jobs/{name}?wait=60 HTTP/1.1\r\nhost: [::1]\r\nconnection: close\r\n\r\n".encode()
        )
        # A second request on another connection: the first one has been read by then, or soon will be.
        web.get("/healthz")
        web.program.signal(signal.SIGTERM)
        answer = read_to_end(connection)
    assert b"200 OK" in answer and b'"status":"queued"' in answer
    assert web.program.ended(20) == 0


def test_a_port_that_is_taken_is_one_sentence(cli: Cli, web: Web) -> None:
    assert "cannot listen on 127.0.0.1" in cli.fails(2, "serve", "--port", str(web.port))


def test_it_serves_loopback_only(cli: Cli) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        assert "no access tokens" in cli.fails(2, "serve", "--host", host, "--port", "0")


# ------------------------------------------------------------------ traces


def frames(client: redis.Redis) -> list[bytes]:
    found: list[bytes] = client.lrange(Keys().queue("normal"), 0, -1)
    client.delete(Keys().queue("normal"))
    return found


def test_a_job_carries_the_trace_of_its_request(web: Web, redis_client: redis.Redis) -> None:
    body = {"type": "A", "payload": {}}
    web.post("/api/v1/jobs", body, traceparent=PARENT, tracestate="shop=1")
    (frame,) = frames(redis_client)
    assert PARENT.encode() in frame and b'"tracestate":"shop=1"' in frame
    lines = b'{"type": "A", "payload": {}}\n' * 3
    web.post("/api/v1/jobs:batch", lines, traceparent=PARENT, Content_Type="application/x-ndjson")
    (frame,) = frames(redis_client)
    assert PARENT.encode() in frame
    web.post("/api/v1/jobs", body)  # on another connection: nothing of it is left
    (frame,) = frames(redis_client)
    assert b"traceparent" not in frame


def test_requests_that_are_sent_behind_each_other_have_traces_of_their_own(
    web: Web, redis_client: redis.Redis
) -> None:
    head = b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b'Content-Length: 13\r\n\r\n{"type": "A"}'
    with socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection:
        connection.sendall(head + b"traceparent: " + PARENT.encode() + b"\r\n" + body + head + body)
        told = b""
        while told.count(b"202 Accepted") < 2:
            told += connection.recv(4096)
    found = frames(redis_client)
    assert [PARENT.encode() in frame for frame in found] == [True, False]


@pytest.mark.parametrize(
    "parent",
    [PARENT[:-1] + "0", PARENT[:-3], "ff" + PARENT[2:], PARENT.upper(), PARENT[:36] + "0" * 16 + "-01", "x"],
)
def test_a_trace_that_is_none_or_not_sampled_is_not_carried(
    web: Web, redis_client: redis.Redis, parent: str
) -> None:
    assert web.post("/api/v1/jobs", {"type": "A"}, traceparent=parent).status == 202
    (frame,) = frames(redis_client)
    assert b"traceparent" not in frame
