"""Proves the proxy against a real redis-server: each fault is what it says, and nothing else changes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.chaos.proxy import CLOSE, HANG, RESET, Command, Proxy, Rule, every, named, runs
from tests.chaos.resp import Framer, ProtocolError, encode_command, parse_command, script_sha
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

PUSH = "redis.call('RPUSH', KEYS[1], ARGV[1]) return redis.call('LLEN', KEYS[1])"
PUSH_SHA = sha1(PUSH.encode(), usedforsecurity=False).hexdigest()
LOST = (redis.ConnectionError, redis.TimeoutError)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.socket) as made:
        yield made
        assert made.errors == []


@pytest.fixture
def client(proxy: Proxy) -> Iterator[Any]:
    with contextlib.closing(connect(proxy)) as made:
        yield made


def connect(proxy: Proxy, timeout: float = 10.0) -> Any:
    return redis.Redis.from_url(
        proxy.url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        protocol=2,
    )


def push(client: Any, item: str, key: str = "l") -> int:
    try:
        return int(client.evalsha(PUSH_SHA, 1, key, item))
    except redis.exceptions.NoScriptError:
        return int(client.eval(PUSH, 1, key, item))


def items(server: RedisServer, key: str = "l") -> list[Any]:
    with contextlib.closing(server.client()) as direct:
        return list(direct.lrange(key, 0, -1))


# ---- framing

MESSAGES = [
    b"+OK\r\n",
    b"-ERR no\r\n",
    b":-12\r\n",
    b"$-1\r\n",
    b"$0\r\n\r\n",
    b"$5\r\na\r\nbc\r\n",
    b"*-1\r\n",
    b"*0\r\n",
    b"*3\r\n:1\r\n*2\r\n$1\r\nx\r\n*0\r\n$-1\r\n",
    b"%2\r\n+a\r\n:1\r\n+b\r\n*1\r\n:2\r\n",
    b"~1\r\n#t\r\n",
    b">2\r\n+invalidate\r\n_\r\n",
    b"|1\r\n+ttl\r\n:3\r\n*1\r\n:9\r\n",
    b"=7\r\ntxt:abc\r\n",
    b",1.5\r\n",
    b"(349\r\n",
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_framer_finds_the_same_messages_however_they_are_cut(size: int) -> None:
    stream = b"".join(MESSAGES)
    framer, found = Framer(), []
    for at in range(0, len(stream), size):
        found += framer.feed(stream[at : at + size])
    assert found == MESSAGES
    assert framer.pending == 0


def test_framer_takes_inline_commands_only_from_clients() -> None:
    assert Framer(inline=True).feed(b"PING hello\r\n*1\r\n$4\r\nPING\r\n") == [
        b"PING hello\r\n",
        b"*1\r\n$4\r\nPING\r\n",
    ]
    with pytest.raises(ProtocolError):
        Framer().feed(b"PING\r\n")


@pytest.mark.parametrize(
    "bad",
    [b"$x\r\n", b"$-2\r\n", b"$3\r\nabcde", b"*1\r\nfoo\r\n", b"$99999999999\r\n", b"+" + b"a" * 70_000],
)
def test_framer_refuses_what_is_not_the_protocol(bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        Framer().feed(bad)


def test_big_message_byte_by_byte_is_not_quadratic() -> None:
    message = encode_command([b"SET", b"k", b"x" * 300_000])
    framer = Framer(inline=True)
    found = [out for at in range(len(message)) for out in framer.feed(message[at : at + 1])]
    assert found == [message]


def test_commands_are_parsed() -> None:
    argv = [b"EVALSHA", b"AB" * 20, b"1", b"k\r\n$1", b"", b"\x00"]
    assert parse_command(encode_command(argv)) == argv
    assert parse_command(b"PING  x\r\n") == [b"PING", b"x"]
    assert script_sha(argv) == "ab" * 20
    assert script_sha([b"eval", PUSH.encode(), b"0"]) == PUSH_SHA
    assert script_sha([b"GET", b"k"]) == ""
    command = Command([b"EVALSHA", b"s", b"2", b"k1", b"k2", b"a1"], "EVALSHA", "s", 1)
    assert (command.keys, command.args) == ([b"k1", b"k2"], [b"a1"])


# ---- without a fault


def test_transparent_on_loopback_and_on_a_unix_socket(redis_server: RedisServer) -> None:
    folder = redis_server.folder / "proxied.sock"
    for listen in (None, folder):
        with Proxy(redis_server.socket, listen) as proxy, contextlib.closing(connect(proxy)) as client:
            big = b"x" * 3_000_000
            client.set("big", big)
            assert client.get("big") == big
            pipe = client.pipeline(transaction=False)
            for i in range(500):
                pipe.rpush("many", i)
            assert pipe.execute() == list(range(1, 501))
            with client.pipeline(transaction=True) as tx:
                tx.get("big")
                tx.delete("many")
                assert tx.execute() == [big, 1]
            assert client.blpop(["none"], timeout=0.01) is None
            assert proxy.errors == []


def test_publish_and_subscribe_pass(proxy: Proxy, client: Any) -> None:
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("c")
    assert wait_until(lambda: client.publish("c", "hello"))
    message = wait_until(lambda: pubsub.get_message(timeout=0.1))
    assert message["data"] == b"hello"
    pubsub.close()


def test_commands_are_recorded_with_their_script(proxy: Proxy, client: Any) -> None:
    push(client, "a")
    push(client, "b")
    names = [(command.name, command.sha) for command in proxy.commands if command.sha]
    assert names == [("EVALSHA", PUSH_SHA), ("EVAL", PUSH_SHA), ("EVALSHA", PUSH_SHA)]


# ---- one command


@pytest.mark.parametrize("then", [RESET, CLOSE])
def test_dropped_request_is_not_applied(
    proxy: Proxy, client: Any, redis_server: RedisServer, then: str
) -> None:
    push(client, "a")
    rule = proxy.drop_request(runs(PUSH_SHA), nth=2, then=then)
    push(client, "b")
    with pytest.raises(LOST):
        push(client, "c")
    assert rule.fired.is_set()
    assert items(redis_server) == [b"a", b"b"]
    assert push(client, "d") == 3  # a new connection, and the rule is spent


@pytest.mark.parametrize("then", [RESET, CLOSE])
def test_dropped_reply_is_applied(proxy: Proxy, client: Any, redis_server: RedisServer, then: str) -> None:
    rule = proxy.drop_reply(named("RPUSH"), then=then)
    with pytest.raises(LOST):
        client.rpush("l", "a")
    assert rule.applied.wait(5)
    assert rule.replies == [b":1\r\n"]
    assert items(redis_server) == [b"a"]


def test_what_stands_behind_a_dropped_request_is_lost_too(
    proxy: Proxy, client: Any, redis_server: RedisServer
) -> None:
    proxy.drop_request(named("RPUSH"), nth=2)
    pipe = client.pipeline(transaction=False)
    for item in "abc":
        pipe.rpush("l", item)
    with pytest.raises(LOST):
        pipe.execute()
    wait_until(lambda: proxy.links == 0)
    assert items(redis_server) == [b"a"]


def test_half_a_request_is_not_applied(proxy: Proxy, client: Any, redis_server: RedisServer) -> None:
    proxy.cut_request(named("RPUSH"))
    with pytest.raises(LOST):
        client.rpush("l", "a" * 1000)
    client.rpush("l", "b")
    assert items(redis_server) == [b"b"]


def test_late_request_is_applied_after_the_client_went_on(
    proxy: Proxy, client: Any, redis_server: RedisServer
) -> None:
    late = proxy.late(named("RPUSH"), nth=2)
    pipe = client.pipeline(transaction=False)
    for item in "abc":
        pipe.rpush("l", item)
    with pytest.raises(LOST):
        pipe.execute()
    assert late.fired.is_set() and not late.applied.is_set()
    client.rpush("l", "recovered")
    assert items(redis_server) == [b"a", b"recovered"]
    late.release()
    assert late.applied.wait(5)
    assert items(redis_server) == [b"a", b"recovered", b"b", b"c"]  # what was behind it is late too, in order
    assert late.replies == [b":3\r\n", b":4\r\n"]


def test_late_request_of_a_client_that_ran_into_its_timeout(proxy: Proxy, redis_server: RedisServer) -> None:
    late = proxy.late(named("RPUSH"), then=HANG)
    with contextlib.closing(connect(proxy, timeout=0.1)) as client:
        with pytest.raises(redis.TimeoutError):
            client.rpush("l", "late")
        client.rpush("l", "next")
    late.release()
    assert late.applied.wait(5)
    assert items(redis_server) == [b"next", b"late"]


def test_late_request_that_is_never_released_is_never_applied(redis_server: RedisServer) -> None:
    with Proxy(redis_server.socket) as proxy, contextlib.closing(connect(proxy)) as client:
        proxy.late(named("RPUSH"))
        with pytest.raises(LOST):
            client.rpush("l", "a")
    assert items(redis_server) == []


def test_black_hole_says_nothing(proxy: Proxy, redis_server: RedisServer) -> None:
    rule = proxy.black_hole(named("RPUSH"))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.2) as raw:
        raw.sendall(encode_command(["RPUSH", "l", "a"]))
        assert rule.fired.wait(5)
        raw.sendall(encode_command(["PING"]))
        with pytest.raises(TimeoutError):  # neither a reply nor the end of the connection
            raw.recv(1)
    assert items(redis_server) == []


def test_applied_and_then_silence(proxy: Proxy, redis_server: RedisServer) -> None:
    rule = proxy.drop_reply(named("RPUSH"), then=HANG)
    with contextlib.closing(connect(proxy, timeout=0.1)) as client, pytest.raises(redis.TimeoutError):
        client.rpush("l", "a")
    assert rule.applied.wait(5)
    assert items(redis_server) == [b"a"]


def test_delay_keeps_order(proxy: Proxy, client: Any) -> None:
    rule = proxy.delay(named("GET"), 0.05)
    pipe = client.pipeline(transaction=False)
    pipe.set("k", 1).get("k").set("k", 2).get("k")
    assert pipe.execute() == [True, b"1", True, b"2"]
    assert rule.applied.is_set()


def test_sliced_replies_are_the_same(proxy: Proxy, client: Any) -> None:
    rule = proxy.slice_reply(named("LRANGE"))
    client.rpush("l", *range(50))
    assert client.lrange("l", 0, -1) == [b"%d" % i for i in range(50)]
    assert rule.applied.wait(5)
    proxy.slice_replies = True
    assert client.lrange("l", 0, 3) == [b"0", b"1", b"2", b"3"]


def test_corrupted_reply(proxy: Proxy, client: Any) -> None:
    proxy.corrupt_reply(named("GET"), lambda reply: reply.replace(b"$", b"?"))
    client.set("k", "v")
    with pytest.raises(redis.exceptions.InvalidResponse):
        client.get("k")


def test_answer_of_the_proxy_keeps_its_place_in_a_pipeline(proxy: Proxy, client: Any) -> None:
    rule = proxy.answer(named("INCRBY"), b"-NOSCRIPT No matching script.\r\n", nth=2)
    pipe = client.pipeline(transaction=False)
    pipe.incr("n").incr("n").incr("n")
    first, second, third = pipe.execute(raise_on_error=False)
    assert (first, third) == (1, 2)
    assert isinstance(second, redis.exceptions.NoScriptError)
    assert rule.applied.is_set()


def test_rule_counts_over_all_connections_and_may_fire_more_than_once(proxy: Proxy) -> None:
    rule = proxy.answer(named("PING"), b"+FAKE\r\n", nth=2, times=2)
    clients = [connect(proxy) for _ in range(4)]
    said = [client.execute_command("PING") for client in clients]
    assert said == [True, False, False, True]
    assert rule.spent
    for client in clients:
        client.close()


def test_two_rules_on_one_command_the_first_gets_it(proxy: Proxy, client: Any) -> None:
    first = proxy.answer(named("GET"), b"+first\r\n")
    second = proxy.answer(named("GET"), b"+second\r\n", times=2)
    assert [client.get("k"), client.get("k"), client.get("k")] == [b"first", b"second", None]
    assert first.fired.is_set() and second.fired.is_set()


def test_cleared_rules_do_nothing(proxy: Proxy, client: Any) -> None:
    rule: Rule = proxy.drop_request(every)
    proxy.clear()
    assert client.ping()
    assert not rule.fired.is_set()


# ---- all connections


def test_reset_of_all_connections(proxy: Proxy, client: Any) -> None:
    client.ping()
    assert proxy.links == 1
    proxy.reset_all()
    wait_until(lambda: proxy.links == 0)
    with contextlib.suppress(*LOST):
        client.ping()
    assert client.ping()


def test_silence_and_healing(proxy: Proxy) -> None:
    with contextlib.closing(connect(proxy, timeout=0.1)) as client:
        client.ping()
        proxy.silence()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        with pytest.raises(LOST):  # new connections are accepted and say nothing
            client.ping()
        proxy.heal()
        assert client.ping()


def test_server_that_is_not_there(tmp_path: Path) -> None:
    with (
        Proxy(tmp_path / "none.sock") as proxy,
        contextlib.closing(connect(proxy)) as client,
        pytest.raises(redis.ConnectionError),
    ):
        client.ping()
    assert proxy.errors == []


def test_server_that_dies_behind_the_proxy(redis_server: RedisServer, proxy: Proxy, client: Any) -> None:
    client.set("k", 1)
    redis_server.kill()
    with pytest.raises(redis.ConnectionError):
        client.get("k")
    redis_server.start()
    assert client.get("k") == b"1"
