"""Many jobs in one request: every line is answered, and what is wrong with one is nobody else's business."""

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.web import ServeIt, Web, read_to_end

PATH = "/api/v1/jobs:batch"


def send(web: Web, lines: bytes) -> list[Any]:
    told = web.post(PATH, lines, Content_Type="application/x-ndjson")
    assert told.status == 200, told.body
    assert told.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in told.body.splitlines()]


def test_each_line_is_answered_by_its_number(web: Web, redis_client: redis.Redis) -> None:
    lines = b"""\
{"type": "A", "payload": {"n": 1}}

{"type": "A", "payload": "{\\"n\\": 2}", "priority": "HIGH"}
{"type": "A", "payload": {"n": 3}, "priority": "urgent"}
no json
{"type": "A", "type": "B"}
{"type": "A", "idempotencyKey": "k"}
{"type": "A", "idempotencyKey": "k"}
{"type": "A", "payload": {"n": 4}}"""
    told = send(web, lines)
    assert [one["line"] for one in told] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert [one.get("created") for one in told] == [True, True, None, None, None, True, False, True]
    kinds = [one["error"]["type"].rpartition(":")[2] for one in told if "error" in one]
    assert kinds == ["unknown-priority", "invalid-body", "invalid-body"]
    assert told[5]["id"] == told[6]["id"]
    payloads = {name: payload for name, _, payload in Hands(redis_client).fetch().jobs()}
    assert payloads[told[0]["id"]] == {"n": 1}
    assert payloads[told[1]["id"]] == {"n": 2}
    assert payloads[told[-1]["id"]] == {"n": 4}


@pytest.mark.parametrize("last", [b"", b'{"type": "A", "colour": 1}\n'])
def test_thousands_of_lines(web: Web, redis_client: redis.Redis, last: bytes) -> None:
    """In groups, of which the last has a bad line: the ids are in the order of the lines all the same."""
    lines = b"".join(b'{"type": "T%d", "payload": {"n": %d}}\n' % (n % 3, n) for n in range(5_000))
    told = send(web, lines + last)
    assert len(told) == 5_000 + bool(last)
    assert ("error" in told[-1]) == bool(last)
    payloads: dict[str, Any] = {}
    hands = Hands(redis_client)
    while len(payloads) < 5_000:
        hands.fetch()
        payloads |= {name: payload for name, _, payload in hands.jobs()}
    assert [payloads[one["id"]]["n"] for one in told[:5_000]] == list(range(5_000))


def test_a_batch_has_a_number_of_lines(web: Web, redis_client: redis.Redis) -> None:
    told = send(web, b'{"type": "A"}\n' * 10_002)
    assert len(told) == 10_001
    assert told[-1]["line"] == 10_001 and told[-1]["error"]["limitLines"] == 10_000
    assert redis_client.hget("tq:{0}:stats", "submitted") == b"10000"


def test_a_line_has_a_length(web: Web) -> None:
    long = b'{"type": "A", "payload": {"x": "' + b"x" * 1_100_000
    told = web.post(PATH, long, Content_Type="application/x-ndjson")
    assert told.problem(413, "body-too-large")["limitBytes"] == 1024 * 1024
    told = send(web, b'{"type": "A"}\n' + b'{"type": "A", "payload": {"x": "' + b"x" * 1_040_000 + b'"}}\n')
    assert [one.get("created") for one in told] == [True, True]


def test_deep_and_endless_lines_are_refused(web: Web) -> None:
    deep = b'{"type": "A", "payload": ' + b'{"a":' * 65 + b"1" + b"}" * 66
    told = send(
        web, b"\n".join((deep, b"[" * 50_000, b'{"type":"A","payload":{"n":1e999}}', b'{"type":"A"}'))
    )
    assert ["error" in one for one in told] == [True, True, True, False]


def test_a_batch_of_nothing_is_no_error(web: Web) -> None:
    assert send(web, b"") == []
    assert send(web, b"\n\r\n  \n") == []


def test_other_types_are_refused(web: Web) -> None:
    web.post(PATH, b"{}", Content_Type="text/plain").problem(415, "wrong-content-type")


def test_a_client_that_leaves_half_way_costs_nothing(web: Web) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: [::1]\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", web.port), 10) as connection:
        connection.sendall(head + b'e\r\n{"type": "A"}\n\r\n')
    assert web.get("/healthz").status == 200


def test_a_chunked_stream_is_read_to_its_end(web: Web) -> None:
    line = b'{"type": "A"}\n'
    head = f"POST {PATH} HTTP/1.1\r\nhost: [::1]\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", web.port), 10) as connection:
        connection.sendall(head.encode())
        for _ in range(3):
            connection.sendall(b"%x\r\n%b\r\n" % (len(line), line))
        connection.sendall(b"0\r\n\r\n")
        answer = read_to_end(connection)
    assert answer.count(b'"created":true') == 3


def test_a_full_redis_is_told(serve_it: ServeIt, make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis()
    web = serve_it(TQE_REDIS_URL=server.url)
    wait_until(lambda: web.get("/readyz").status == 200, 10)
    with server.client() as client:
        client.config_set("maxmemory", "1")
    told = web.post(PATH, b'{"type": "A"}\n', Content_Type="application/x-ndjson")
    assert told.problem(503, "queue-full") and told.headers["retry-after"] == "5"
