"""The door to Redis: NOSCRIPT, what errors mean, and what is known after a lost reply."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import redis

from tests.lua import frames
from tests.lua.world import World, group
from tests.support.redis_server import RedisServer
from tests.support.waiting import await_until, wait_until
from tqe.errors import LeaseLost, QueueFull, RedisUnavailable, ScriptError, TQEError
from tqe.store.call import AsyncDoor, Call, SyncDoor, connect, connect_async, reply_error
from tqe.store.keys import Keys
from tqe.store.scripts import SCRIPTS

A, B = (frames.make(frames.frame_id(n)) for n in range(2))


def commands_seen(client: redis.Redis) -> dict[str, int]:
    return {name: row["calls"] for name, row in client.info("commandstats").items()}


def test_a_script_that_redis_does_not_know_goes_out_as_text_once(world: World) -> None:
    world.client.config_resetstat()
    for _ in range(3):
        world.enqueue(group(A, bucket=1))
    seen = commands_seen(world.client)
    assert (seen["cmdstat_evalsha"], seen["cmdstat_eval"]) == (3, 1)
    assert "cmdstat_script" not in seen and "cmdstat_script|load" not in seen


def test_redis_names_the_scripts_as_we_do(world: World) -> None:
    for script in SCRIPTS.values():
        assert world.client.execute_command("SCRIPT", "LOAD", script.text) == script.sha.encode()


def test_each_reply_of_a_pipeline_is_judged_by_itself(world: World) -> None:
    world.takeover()
    world.fetch()
    calls = [
        world.fetch_call("W9"),
        world.enqueue_call(group(A, bucket=1)),
        world.fetch_call("W1"),
        Call("enqueue", (), ()),
        world.enqueue_call(group(B, bucket=1)),
    ]
    lost, first, fetched, bad, second = world.door.run_many(calls)
    assert isinstance(lost, LeaseLost)
    assert isinstance(bad, ScriptError) and bad.code == "BAD" and bad.script == "enqueue"
    # The two that Redis did not know went out again, behind the fetch.
    assert first[1:] == second[1:] == [1]
    assert fetched[5:] == []
    assert len(world.fetched()) == 2


def test_calls_keep_their_order_when_all_are_known(world: World) -> None:
    world.takeover()
    world.enqueue(group(A))
    world.fetch()
    calls = [world.enqueue_call(group(B)), world.fetch_call()]
    assert [frames.lease(f) for f in world.door.run_many(calls)[1][5:]] == [frames.lease(B)]


def test_plain_commands(world: World) -> None:
    answers = world.door.send([("SET", "x", 1), ("GET", "x"), ("LPUSH", "x", 1), ("GET", "x")])
    assert answers[:2] == [b"OK", b"1"]
    assert isinstance(answers[2], ScriptError) and answers[2].code == "WRONGTYPE"
    assert answers[3] == b"1"


@pytest.mark.parametrize(
    ("text", "kind", "applied"),
    [
        ("LEASE gone", LeaseLost, ...),
        ("FULL no memory", QueueFull, ...),
        ("OOM command not allowed", QueueFull, ...),
        (
            "ERR Error running script (call to f_12ab): @user_script:1: @user_script: 1: -OOM cmd ",
            QueueFull,
            ...,
        ),
        (
            "ERR Error running script (call to f_1): @user_script:1: -MISCONF Errors w",
            RedisUnavailable,
            False,
        ),
        ("LOADING Redis is loading", RedisUnavailable, False),
        ("BUSY Redis is busy", RedisUnavailable, False),
        ("READONLY You can't write", RedisUnavailable, False),
        ("MASTERDOWN Link", RedisUnavailable, False),
        ("CLUSTERDOWN Hash slot", RedisUnavailable, False),
        ("NOSCRIPT No matching", RedisUnavailable, False),
        ("NOAUTH Authentication", RedisUnavailable, False),
        ("WRONGPASS invalid", RedisUnavailable, False),
        ("BOTH incarnations", ScriptError, ...),
        ("LIVE incarnation", ScriptError, ...),
        ("ERR unknown command", ScriptError, ...),
        ("ERR Error running script (call to f_12ab): @user_script:1: attempt to CALL it ", ScriptError, ...),
    ],
)
def test_what_an_error_means(text: str, kind: type[TQEError], applied: object) -> None:
    error = reply_error(text, "fetch")
    assert type(error) is kind
    if isinstance(error, RedisUnavailable):
        assert error.applied is applied
    if isinstance(error, ScriptError):
        assert error.code == text.split()[0]


def test_a_server_that_is_read_only(any_redis: RedisServer, world: World) -> None:
    world.takeover()
    try:
        world.client.execute_command("REPLICAOF", "127.0.0.1", "1")
        for call in (world.fetch_call(), world.enqueue_call(group(A))):
            with pytest.raises(RedisUnavailable) as caught:
                world.door.run(call)
            assert caught.value.applied is False
    finally:
        world.client.execute_command("REPLICAOF", "NO", "ONE")


def test_a_server_that_is_busy_with_a_script(any_redis: RedisServer, world: World) -> None:
    world.enqueue(group(A))
    world.client.config_set("lua-time-limit", "1")
    with contextlib.closing(any_redis.client()) as other:
        spin = threading.Thread(target=_quietly, args=(other, "while true do end"))
        spin.start()
        try:
            error = wait_until(lambda: _error(world, world.enqueue_call(group(B))))
            assert isinstance(error, RedisUnavailable) and error.applied is False
        finally:
            wait_until(lambda: _killed(world.client))
            spin.join()
    assert world.depth() == {"high": world.client.llen(world.keys.queue("high"))}


def _quietly(client: redis.Redis, text: str) -> None:
    with contextlib.suppress(redis.ResponseError):
        client.eval(text, 0)


def _error(world: World, call: Call) -> TQEError | None:
    try:
        world.door.run(call)
    except TQEError as e:
        return e
    return None


def _killed(client: redis.Redis) -> bool:
    try:
        return bool(client.script_kill())
    except redis.ResponseError as e:
        return "NOTBUSY" in str(e)


def test_nobody_listens(tmp_path) -> None:  # type: ignore[no-untyped-def]
    door = SyncDoor(connect(f"unix://{tmp_path}/nobody", timeout_s=0.2))
    with pytest.raises(RedisUnavailable) as caught:
        door.run(Call("pause", (b"a", b"b"), ("high",)))
    assert caught.value.applied is False


def test_a_server_that_is_silent(any_redis: RedisServer) -> None:
    """What was sent may yet be executed: nobody can tell."""
    client = connect(any_redis.url, timeout_s=0.2)
    with contextlib.closing(client):
        world = World(client)
        world.enqueue(group(A))
        any_redis.pause()
        try:
            with pytest.raises(RedisUnavailable) as caught:
                world.enqueue(group(B, bucket=1))
            assert caught.value.applied is None
        finally:
            any_redis.resume()
        # It was executed after we gave up; the repeat finds it.
        world.enqueue(group(B, bucket=1))
        wait_until(lambda: client.llen(world.keys.queue("high")) == 2)
        assert world.stats()["submitted"] == 2


@contextlib.contextmanager
def one_answer(answer: bytes) -> Iterator[str]:
    """A server that reads once, says `answer` and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            while data := peer.recv(65536):
                if b"EVALSHA" in data:
                    peer.sendall(answer)
                    return
                peer.sendall(b"+OK\r\n" * data.count(b"\r\n*") + b"+OK\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", [None, None, None]),
        (b":1\r\n", [1, None, None]),
        (b":1\r\n-LEASE gone\r\n$5\r\nab", [1, LeaseLost, None]),
        (b"-LOADING Redis is loading\r\n:1\r\n", [False, None, None]),
        (b"-BUSY Redis\r\n:1\r\n:2\r\n", [False, 1, 2]),
        (b"-READONLY You\r\n:1\r\n", [False, 1, None]),
    ],
)
def test_a_connection_that_breaks_in_a_pipeline(answer: bytes, expected: list[object]) -> None:
    call = Call("pause", (b"a", b"b"), ("high",))
    with one_answer(answer) as url, contextlib.closing(connect(url, timeout_s=2)) as client:
        answers = SyncDoor(client).run_many([call] * 3)
    assert _facts(answers) == expected

    async def again() -> list[object]:
        client = connect_async(url, timeout_s=2)
        try:
            return await AsyncDoor(client).run_many([call] * 3)
        finally:
            await client.aclose()

    with one_answer(answer) as url:
        assert _facts(asyncio.run(again())) == expected


def _facts(answers: list[object]) -> list[object]:
    """Replies as they are, RedisUnavailable as its `applied`, other errors as their class."""
    return [
        answer.applied
        if isinstance(answer, RedisUnavailable)
        else type(answer)
        if isinstance(answer, Exception)
        else answer
        for answer in answers
    ]


def test_a_wrong_password(make_redis) -> None:  # type: ignore[no-untyped-def]
    server = make_redis()
    with contextlib.closing(server.client()) as client:
        client.config_set("requirepass", "secret")
        for query in ("", "?password=wrong"):
            with contextlib.closing(connect(server.url + query, timeout_s=2)) as ours:
                with pytest.raises(RedisUnavailable) as caught:
                    SyncDoor(ours).run(Call("pause", (b"a", b"b"), ("high",)))
                assert caught.value.applied is False
                assert "wrong" not in str(caught.value)
        client.config_set("requirepass", "")


async def test_the_async_door(any_redis: RedisServer, world: World) -> None:
    client = connect_async(any_redis.url)
    try:
        door = AsyncDoor(client)
        assert (await door.run(world.enqueue_call(group(A, bucket=1))))[1:] == [1]
        with pytest.raises(LeaseLost):
            await door.run(world.fetch_call())
        both = await door.run_many([world.fetch_call(), world.takeover_call()])
        assert isinstance(both[0], LeaseLost) and len(both[1]) == 2
        assert await door.send([("LLEN", world.keys.queue("high"))]) == [1]
    finally:
        await client.aclose()


async def test_a_cancelled_call_does_not_leave_its_reply_to_the_next(
    any_redis: RedisServer, world: World
) -> None:
    client = connect_async(any_redis.url, max_connections=1)
    try:
        door = AsyncDoor(client)
        await door.send([("PING",)])
        task = asyncio.create_task(door.send([("BLPOP", "nothing", 5)]))
        await await_until(lambda: any(row["cmd"] == "blpop" for row in world.client.client_list()))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await door.send([("ECHO", "mine")]) == [b"mine"]
    finally:
        await client.aclose()


def test_redis_py_does_not_repeat_by_itself() -> None:
    for client in (connect("redis://127.0.0.1:1"), connect_async("redis://127.0.0.1:1")):
        options = client.connection_pool.connection_kwargs
        assert options["retry"].get_retries() == 0
        assert not options["retry_on_timeout"]


# -- names


def test_keys_of_a_shard_share_its_tag() -> None:
    keys = Keys("app", 3)
    names = [getattr(keys, name) for name in Keys.__slots__ if not name.startswith("_")]
    names += [
        *keys.lane("high"),
        keys.processing("W"),
        keys.worker("W"),
        keys.idem("k"),
        keys.bucket(1, "A"),
        keys.done("F"),
    ]
    assert all(name.startswith(b"app:{3}:") for name in names)
    assert len(set(names)) == len(names)
    assert keys.lane("high") == (b"app:{3}:queue:high", b"app:{3}:sorted:high", b"app:{3}:wake:high")
    assert keys.bucket(1_700_000_000, b"Z") == b"app:{3}:job:1700000000Z"


@pytest.mark.parametrize("namespace", ["", "a{b", "a}b", "a*", "a b"])
def test_a_namespace_that_would_break_the_tag(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        Keys(namespace)


def test_includes_are_in_place() -> None:
    for script in SCRIPTS.values():
        assert "--@include" not in script.text
    assert "local function frame(f)" in SCRIPTS["fetch"].text
