"""Broken and hostile HTTP against a real server: it answers or hangs up, and it never fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.hostile import HEAD, Attack, request, run, send
from tests.support.redis_server import RedisServer
from tests.support.web import ServeIt, Web

# Lines and events are no JSON documents, which is what it can make and read.
STREAMS = ("/api/v1/jobs:batch", "/api/v1/events")
# A document cannot say that exactly one of three members is wanted, nor what a type of job takes.
NOT_CHECKED = "positive_data_acceptance"
FUZZ_S = 8


@pytest.mark.parametrize("seed", [7, 11])
def test_the_corpus(serve_it: ServeIt, seed: int) -> None:
    web = serve_it()
    tally = run(web.port, 600, seed)
    assert not tally.bad, tally.bad[0]
    assert {"200", "202", "400", "405", "415", "421", "422", "left"} <= set(tally.statuses), tally.statuses
    assert web.get("/healthz").status == 200
    assert web.program.text().count("\n") < 20, "what clients do wrong fills no log"


def test_requests_that_wait_behind_another_end_with_the_connection(serve_it: ServeIt) -> None:
    """uvicorn tells only the last of them; the others wrote to a closed connection."""
    web = serve_it()
    kept = HEAD.replace(b"connection: close\r\n", b"")
    many = b"".join(request(b"GET", b"/api/v1/queues", kept) for _ in range(50))
    for _ in range(5):
        web.raw(many)
        send(web.port, Attack([many], leave=True, reset=True))
    assert web.get("/api/v1/queues").status == 200
    assert "Traceback" not in web.program.text()


def test_a_client_that_leaves_while_its_body_is_read(serve_it: ServeIt) -> None:
    """More than the server reads ahead: it has stopped reading, and goes on when nobody is there."""
    web = serve_it()
    head = HEAD + b"content-type: application/x-ndjson\r\n"
    whole = request(b"POST", b"/api/v1/jobs:batch", head, b'{"type": "A"}\n' * 9_000)
    for size in (len(whole) - 1, len(whole) // 2, 70_000):
        for reset in (False, True):
            send(web.port, Attack([whole[:size]], leave=True, reset=reset))
    for reset in (False, True):  # and while it is being answered
        send(web.port, Attack([whole], leave=True, reset=reset))
        send(web.port, Attack([request(b"GET", b"/openapi.json") * 20], leave=True, reset=reset))
    assert web.get("/healthz").status == 200
    assert "Traceback" not in web.program.text()


def test_garbage_behind_a_request_leaves_its_answer_whole(web: Web) -> None:
    """Either the answer, or the refusal; never one in the middle of the other."""
    for garbage in (b"garbage\r\n\r\n", b"\0" * 100, b"GET /" + b"x" * 20_000):
        answer = send(web.port, Attack([request(b"GET", b"/openapi.json", HEAD) + garbage]))
        head, _, body = answer.partition(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        assert len(body) >= int(length.split(b":")[1]), answer[-300:]


@pytest.mark.timeout(180)
def test_every_answer_is_as_the_document_says(
    redis_server: RedisServer, serve_it: ServeIt, tmp_path: Path
) -> None:
    """Schemathesis makes requests of the OpenAPI document, good and bad ones, with a token and without."""
    cli = Cli({"TQE_REDIS_URL": redis_server.url, "TQE_NAMESPACE": "hostile"})
    token = cli("token", "create", "fuzz", "--scope", "admin").stdout.strip()
    web = serve_it(TQE_NAMESPACE="hostile")
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "--no-color", "run", f"http://127.0.0.1:{web.port}/openapi.json", "--seed", "1"]
    command += ["--header", f"Authorization: Bearer {token}", "--warnings", "off"]
    command += ["--phases", "coverage,fuzzing", "--max-time", str(FUZZ_S)]
    command += ["--checks", "all", "--exclude-checks", NOT_CHECKED]
    command += [part for path in STREAMS for part in ("--exclude-path", path)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert said.returncode == 0, said.stdout[-8_000:] + said.stderr[-2_000:]
    assert "Traceback" not in web.program.text()
