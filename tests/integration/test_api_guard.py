"""Who may call the REST API: tokens, their scopes and their end; what web pages of others cannot do."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from starlette.requests import Request

from tests.support.cli import Cli
from tests.support.redis_server import RedisServer
from tests.support.viewing import view
from tests.support.waiting import wait_until
from tests.support.web import ServeIt, Web
from tqe.api import guard as guard_module
from tqe.api.problems import Problem
from tqe.store import tokens
from tqe.store.keys import Keys

KEYS = Keys("guard")  # not the namespace of the servers that all tests share: they would want tokens too


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli({"TQE_REDIS_URL": redis_server.url, "TQE_NAMESPACE": "guard"})


@pytest.fixture
def guarded(cli: Cli, serve_it: ServeIt) -> Web:
    """A server that wants tokens."""
    cli("token", "create", "first")
    return serve_it(TQE_NAMESPACE="guard")


def made(cli: Cli, name: str, *scopes: str) -> dict[str, str]:
    """The header that sends a new token."""
    wanted = [part for scope in scopes for part in ("--scope", scope)]
    return {"Authorization": f"Bearer {cli('token', 'create', name, *wanted).stdout.strip()}"}


# ------------------------------------------------------------------ the command


def test_a_token_is_shown_once_and_kept_as_a_hash(cli: Cli, redis_client: redis.Redis) -> None:
    said = cli("token", "create", "shop")
    text = said.stdout.strip()
    assert text.startswith("tqe_shop_") and len(text) == 9 + 64
    assert "may submit, read" in said.stderr and text not in said.stderr
    secret = text.rpartition("_")[2].encode()
    record = redis_client.hget(KEYS.tokens, "shop")
    assert secret not in record and json.loads(record)["scopes"] == ["submit", "read"]
    assert text not in cli("token", "list").stdout
    (told,) = cli.json("token", "list")
    assert list(told) == ["name", "scopes", "created"] and told["name"] == "shop"
    both = cli.json("token", "create", "ops", "--scope", "admin")
    assert (both["name"], both["scopes"]) == ("ops", ["admin"]) and both["token"].startswith("tqe_ops_")


def test_names_and_scopes_are_checked(cli: Cli) -> None:
    cli("token", "create", "shop")
    assert "'shop' already" in cli.fails(2, "token", "create", "shop")
    assert "no name of a token" in cli.fails(2, "token", "create", "a b")
    assert "no name of a token" in cli.fails(2, "token", "create", "a_b")
    assert "'root' is not one of" in cli.fails(2, "token", "create", "x", "--scope", "root")
    assert "there is no token y; there are: shop" in cli.fails(2, "token", "revoke", "y")
    assert "--all" in cli.fails(2, "token", "revoke")
    assert "--all" in cli.fails(2, "token", "revoke", "shop", "--all")


def test_the_end_of_the_last_token_lets_nobody_in(cli: Cli) -> None:
    assert "no tokens: `tqe serve` takes anybody" in cli("token", "list").stdout
    cli("token", "create", "shop")
    assert "nobody can call" in cli("token", "revoke", "shop").stdout
    assert "nobody can call" in cli("token", "list").stdout
    assert "takes anybody" in cli("token", "revoke", "--all").stdout
    assert cli.json("token", "list") == []


def test_a_damaged_record_is_told_and_can_be_revoked(cli: Cli, redis_client: redis.Redis) -> None:
    redis_client.hset(KEYS.tokens, "bad", '{"scopes": ["root"], "sha256": "x", "created_ms": 1}')
    redis_client.hset(KEYS.tokens, "worse", '{"scopes": ["read"], "sha256": "é", "created_ms": 1}')
    said = cli("token", "list").stderr
    assert "bad: it cannot be read" in said and "worse: it cannot be read" in said
    assert cli.json("token", "revoke", "bad") == {"revoked": ["bad"]}


def test_there_is_a_limit(cli: Cli, redis_client: redis.Redis) -> None:
    record = '{"scopes": ["read"], "sha256": "x", "created_ms": 1}'
    redis_client.hset(KEYS.tokens, mapping={f"t{n}": record for n in range(tokens.TOKENS_MAX)})
    assert "revoke some" in cli.fails(2, "token", "create", "one-more")


def test_every_verb_has_an_example(cli: Cli) -> None:
    for verb in ("create", "list", "revoke"):
        assert "Example" in cli("token", verb, "--help").stdout


# ------------------------------------------------------------------ tokens


def test_each_scope_reaches_as_far_as_it_says(cli: Cli, guarded: Web) -> None:
    job = {"type": "A"}
    submit, read, admin = (made(cli, scope, scope) for scope in ("submit", "read", "admin"))
    for headers, expected in ((submit, (202, 403, 403)), (read, (403, 200, 403)), (admin, (202, 200, 200))):
        told = (
            guarded.post("/api/v1/jobs", job, **headers),
            guarded.get("/api/v1/queues", **headers),
            guarded.post("/api/v1/queues/low/pause", **headers),
        )
        assert tuple(one.status for one in told) == expected
    problem = guarded.post("/api/v1/queues/low/pause", **read).problem(403, "wrong-scope")
    assert problem["scope"] == "admin" and "--scope admin" in problem["detail"]


def test_without_a_valid_token_nobody_gets_in(guarded: Web) -> None:
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer tqe_first_",
        "Bearer tqe_first_" + "0" * 64,
        "Bearer tqe__" + "0" * 64,
        "Bearer tqe_*_1",
        "Bearer " + "x" * 8_000,
        "Bearer \xff\xfe",
        "Basic Zmlyc3Q6eA==",
    ):
        sent = {} if header is None else {"Authorization": header}
        for told in (
            guarded.get("/api/v1/queues", **sent),
            guarded.post("/api/v1/jobs", {"type": "A"}, **sent),
        ):
            told.problem(401, "no-valid-token")
            assert told.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/healthz").status == 200
    assert guarded.get("/openapi.json").status == 200


def test_a_scheme_is_taken_in_any_case(cli: Cli, guarded: Web) -> None:
    text = made(cli, "a", "read")["Authorization"].partition(" ")[2]
    assert guarded.get("/api/v1/queues", Authorization=f"bearer {text}").status == 200


def test_new_tokens_work_at_once_and_revoked_ones_end(cli: Cli, guarded: Web) -> None:
    headers = made(cli, "guest", "read")
    assert guarded.get("/api/v1/queues", **headers).status == 200
    cli("token", "revoke", "guest", "first")
    wait_until(lambda: guarded.get("/api/v1/queues", **headers).status == 401, 10)
    # None is left: that does not open the door.
    guarded.get("/api/v1/queues").problem(401, "no-valid-token")


def test_a_server_that_was_open_wants_tokens_as_soon_as_there_are_some(cli: Cli, serve_it: ServeIt) -> None:
    web = serve_it(TQE_NAMESPACE="guard")
    assert "anybody on this machine" in web.program.text()
    assert web.get("/api/v1/queues").status == 200
    cli("token", "create", "first")
    wait_until(lambda: web.get("/api/v1/queues").status == 401, 10)
    cli("token", "revoke", "--all")
    wait_until(lambda: web.get("/api/v1/queues").status == 200, 10)


def test_other_addresses_are_served_with_tokens_only(cli: Cli, serve_it: ServeIt) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        assert "no access tokens" in cli.fails(2, "serve", "--host", host, "--port", "0")
    headers = made(cli, "a", "read")
    web = serve_it("--host", "0.0.0.0", TQE_NAMESPACE="guard")
    assert web.get("/api/v1/queues").status == 401
    assert web.get("/api/v1/queues", Host="shop.example.com", **headers).status == 200
    cli("token", "revoke", "--all")
    wait_until(lambda: web.get("/api/v1/queues", **headers).status == 401, 10)


# ------------------------------------------------------------------ pages of others

CHANGES = (
    ("POST", "/api/v1/jobs"),
    ("POST", "/api/v1/queues/low/pause"),
    ("POST", "/api/v1/queues/low/purge"),
    ("POST", "/api/v1/dlq:replay"),
    ("DELETE", "/api/v1/jobs/01ARZ3NDEKTSV4RRFFQ69G5F00.0"),
)


@pytest.mark.parametrize(
    "sent",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_changes_nothing(web: Web, sent: dict[str, str]) -> None:
    for method, path in CHANGES:
        told = web(method, path, **sent).problem(403, "wrong-origin")
        assert "http_origins" in told["detail"]
    assert web.get("/api/v1/queues").json["queues"][2]["paused"] is False


def test_our_own_page_may(web: Web) -> None:
    for sent in (
        {"Origin": f"http://127.0.0.1:{web.port}", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ):
        assert web.post("/api/v1/queues/low/pause", **sent).status == 200
        assert web.post("/api/v1/queues/low/resume", **sent).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "0.0.0.0", ""]
)
def test_a_name_that_was_made_to_lead_here_is_refused(web: Web, host: str) -> None:
    told = web.get("/api/v1/queues", Host=host).problem(421, "wrong-host")
    assert "localhost" in told["detail"]
    web.post("/api/v1/jobs", {"type": "A"}, Host=host).problem(421, "wrong-host")
    assert web.get("/healthz", Host=host).status == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8080", "127.0.0.1", "127.9.9.9:1", "[::1]:8080", "[::1]"]
)
def test_names_of_this_machine_are_taken(web: Web, host: str) -> None:
    assert web.get("/api/v1/queues", Host=host).status == 200


def test_nothing_is_shared_with_other_origins_unless_told(web: Web, cli: Cli, serve_it: ServeIt) -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    assert not [name for name in web("OPTIONS", "/api/v1/jobs", **asked).headers if "access-control" in name]
    headers = made(cli, "a", "submit")
    other = serve_it(TQE_NAMESPACE="guard", TQE_HTTP_ORIGINS="https://shop.example, https://b.example")
    told = other("OPTIONS", "/api/v1/jobs", **asked)
    assert (told.status, told.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    told = other.post("/api/v1/jobs", {"type": "A"}, Origin="https://shop.example", **headers)
    assert (told.status, told.headers["access-control-allow-origin"]) == (202, "https://shop.example")
    assert "access-control-allow-credentials" not in told.headers
    told = other.post("/api/v1/jobs", {"type": "A"}, Origin="https://evil.example", **headers)
    assert told.status == 403 and "access-control-allow-origin" not in told.headers


# ------------------------------------------------------------------ who looks


def test_a_stream_wants_a_token_and_ends_when_that_is_revoked(cli: Cli, guarded: Web) -> None:
    with view(guarded) as viewer:
        assert viewer.head.startswith("HTTP/1.1 401 ")
    header = made(cli, "wall", "read")
    wait_until(lambda: guarded.get("/api/v1/queues", **header).status == 200)
    with view(guarded, **header) as viewer:
        viewer.event("queue")
        cli("token", "revoke", "wall")
        assert len(list(viewer.pieces())) < 100


# ------------------------------------------------------------------ without Redis


async def test_callers_wait_together_for_a_redis_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One look for all: one after the other, the last of them would wait for minutes."""
    monkeypatch.setattr(guard_module, "ANSWER_S", 0.05)
    looks = 0

    async def never(steps: object) -> None:
        nonlocal looks
        looks += 1
        await asyncio.Event().wait()

    client: Any = SimpleNamespace(run=never, core=SimpleNamespace(keys=KEYS))
    guard = guard_module.Guard(client, loopback=True, host="127.0.0.1", origins=())
    request = Request({"type": "http", "headers": [(b"host", b"localhost")]})
    found = await asyncio.gather(
        *(guard.admit(request, "read", changes=False) for _ in range(20)), return_exceptions=True
    )
    assert {one.name for one in found if isinstance(one, Problem)} == {"redis-unavailable"}
    assert len(found) == 20 and looks < 5
