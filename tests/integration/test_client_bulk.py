"""Bulk and concurrent submission against a real Redis: stamps, calls that are prepared while another is under
way, lost replies of those, and that every caller gets its own outcome."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import uvloop

from tests.chaos.proxy import RESET, Proxy, Rule, runs
from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tests.support.waiting import await_until
from tqe import codec
from tqe.client import AsyncClient, Client, JobHandles
from tqe.errors import (
    ArgumentsError,
    InvalidPayload,
    PartialSubmit,
    RedisUnavailable,
    ScriptError,
    SubmitUnknown,
)
from tqe.registry import Registry, Task
from tqe.settings import Settings
from tqe.store import doors, producing
from tqe.store.call import AsyncDoor, Call, connect, connect_async, pieces
from tqe.store.doors import AsyncProducerDoor, ProducerDoor, speaks
from tqe.store.keys import Keys
from tqe.store.redis_time import RedisTime
from tqe.store.scripts import SCRIPTS

KEYS = Keys()
IS_ENQUEUE = runs(SCRIPTS["enqueue"].sha)
# Some 60 payloads a frame and 1,000 a call: a few calls for a few thousand jobs.
JOBS = 4_000
FILLER = "y" * 1_000


def payloads(n: int = JOBS) -> list[dict[str, Any]]:
    return [{"n": at, "x": FILLER} for at in range(n)]


def numbers(redis_client: redis.Redis) -> dict[str, int]:
    """The number in the payload of each job that waits, by its id."""
    return {name: payload["n"] for name, _, payload in Hands(redis_client).fetch().jobs()}


def stored(redis_client: redis.Redis, lane: str = "normal") -> list[bytes]:
    return redis_client.lrange(KEYS.queue(lane), 0, -1)  # type: ignore[no-any-return]


def redis_us(redis_client: redis.Redis) -> int:
    now: Any = redis_client.time()
    return int(now[0]) * 1_000_000 + int(now[1])


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(Settings(redis_url=redis_server.url)) as client:
        yield client


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """Stands before the shared server, which knows the script: NOSCRIPT would send the first call twice."""
    path = redis_server.folder / "proxy.sock"
    path.unlink(missing_ok=True)
    with contextlib.closing(redis_server.client()) as client:
        client.script_load(SCRIPTS["enqueue"].text)
    with Proxy(redis_server.socket, path) as made:
        yield made
    path.unlink(missing_ok=True)
    assert made.errors == []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producing, "_BACKOFF_FIRST_S", 0.001)


# ------------------------------------------------------------------ stamps


def stamps_of(call: Call) -> list[int]:
    frames = [one for one in call.args if isinstance(one, bytes) and one[:2] == b"F1"]
    return [codec.parse(frame).enqueued_us for frame in frames]


def test_no_stamp_lies_in_the_future_and_redis_keeps_them(client: Client, redis_client: redis.Redis) -> None:
    """What Redis said when each call ran is at least what the frames of the call say."""
    said: list[tuple[Call, int]] = []
    door = client.link.door()
    finish = door.finish

    def finishing(begun: Any) -> Any:
        reply = finish(begun)
        said.append((begun.call, reply[0]))
        return reply

    door.finish = finishing  # type: ignore[method-assign]
    for _ in range(20):
        client.submit("A", {"n": -1})
        client.submit_alike("A", payloads(2_500))
    stamped = [(stamp, now_us) for call, now_us in said for stamp in stamps_of(call) if stamp]
    assert len(stamped) > 500 and all(stamp <= now_us for stamp, now_us in stamped)
    # Nearly all were kept as they were sent; on a machine that stands still now and then, not all.
    kept = {codec.parse(frame).enqueued_us for frame in stored(redis_client)}
    assert len({stamp for stamp, _ in stamped} & kept) > 250


def test_a_single_job_has_the_time_of_redis_itself(client: Client, redis_client: redis.Redis) -> None:
    for _ in range(2):
        before_us = redis_us(redis_client)
        client.submit("A", {"n": 1})
        (frame,) = stored(redis_client)[-1:]
        assert before_us <= codec.parse(frame).enqueued_us <= redis_us(redis_client)


@pytest.mark.parametrize("shift_us", [-60_000_000, -200_000, 60_000_000])
def test_a_wrong_stamp_is_replaced_by_redis(
    client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, shift_us: int
) -> None:
    wrong_us = redis_us(redis_client) + shift_us
    monkeypatch.setattr(RedisTime, "now_us", lambda self: wrong_us)
    before_us = redis_us(redis_client)
    client.submit_alike("A", [{"n": n} for n in range(1_000)])
    (frame,) = stored(redis_client)
    assert before_us <= codec.parse(frame).enqueued_us <= redis_us(redis_client)


@pytest.mark.parametrize("mode", ["request", "reply", "late"])
def test_a_late_repeat_with_an_old_stamp_makes_one_job_with_a_time_of_redis(
    proxy: Proxy, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The same bytes go out again, stamp and all, as often as it takes: only Redis may judge the stamp."""
    old_us = redis_us(redis_client) - 90_000_000
    monkeypatch.setattr(RedisTime, "now_us", lambda self: old_us)
    rule = fault(proxy, mode)
    before_us = redis_us(redis_client)
    with Client(Settings(redis_url=proxy.url)) as client:
        handles = client.submit_alike("A", [{"n": n} for n in range(100)])
        let_it_come(rule)
        sent = [command for command in proxy.commands if IS_ENQUEUE(command)]
        assert len(sent) == 2 and sent[0].args == sent[1].args
        (frame,) = stored(redis_client)
        header = codec.parse(frame)
        assert before_us <= header.enqueued_us <= redis_us(redis_client)
        assert (header.n, client.status().totals["submitted"]) == (100, 100)
        assert handles[99].status() == "queued"


# ------------------------------------------------------------------ calls under way


def fault(proxy: Proxy, mode: str, nth: int = 1) -> Rule:
    if mode == "request":
        return proxy.drop_request(IS_ENQUEUE, nth=nth, then=RESET)
    if mode == "half":
        return proxy.cut_request(IS_ENQUEUE, nth=nth)
    if mode == "reply":
        return proxy.drop_reply(IS_ENQUEUE, nth=nth, then=RESET)
    if mode == "noscript":
        return proxy.answer(IS_ENQUEUE, b"-NOSCRIPT No matching script.\r\n", nth=nth)
    if mode == "loading":
        return proxy.answer(IS_ENQUEUE, b"-LOADING Redis is loading.\r\n", nth=nth)
    return proxy.late(IS_ENQUEUE, nth=nth, then=RESET)


def let_it_come(rule: Rule) -> None:
    if rule.action == "late":
        rule.release()
        assert rule.applied.wait(10), "the held call was never applied"


def submit_in_bulk(url: str, how: str, some: list[dict[str, Any]], **options: Any) -> JobHandles | Any:
    if how == "sync":
        with Client(Settings(redis_url=url)) as client:
            return client.submit_alike("A", some, **options)

    async def submit() -> Any:
        async with AsyncClient(Settings(redis_url=url)) as client:
            return await client.submit_alike("A", some, **options)

    return asyncio.run(submit())


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("mode", ["request", "half", "reply", "late", "noscript", "loading"])
def test_a_call_that_is_lost_while_the_next_is_packed_leaves_every_handle_right(
    proxy: Proxy, redis_client: redis.Redis, how: str, nth: int, mode: str
) -> None:
    rule = fault(proxy, mode, nth)
    handles = submit_in_bulk(proxy.url, how, payloads())
    assert rule.fired.is_set()
    let_it_come(rule)
    assert (len(handles), handles.created, handles.duplicates) == (JOBS, JOBS, 0)
    found = numbers(redis_client)
    assert [found[name] for name in handles.ids] == list(range(JOBS)) and len(found) == JOBS


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("mode", ["request", "reply", "late"])
def test_an_untracked_call_that_is_lost_under_way_is_not_sent_again(
    proxy: Proxy, redis_client: redis.Redis, how: str, mode: str
) -> None:
    rule = fault(proxy, mode, 3)
    with pytest.raises(PartialSubmit) as caught:
        submit_in_bulk(proxy.url, how, payloads(), track=False)
    let_it_come(rule)
    assert isinstance(caught.value.cause, SubmitUnknown)
    known, found = [handle.id for handle in caught.value.handles], numbers(redis_client)
    assert [found[name] for name in known] == list(range(len(known))) and len(known) > 1_000
    # The third call is told of neither way; nothing that was packed behind it went out.
    third = len(found) - len(known)
    assert (third > 0) == (mode != "request") and len(found) < JOBS
    assert all(name.partition(".")[0] not in caught.value.cause.job_id for name in known)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_calls_go_out_in_order_and_one_at_a_time(proxy: Proxy, redis_client: redis.Redis, how: str) -> None:
    submit_in_bulk(proxy.url, how, payloads())
    calls = [command for command in proxy.commands if IS_ENQUEUE(command)]
    assert len(calls) >= 4
    ids = [argument[4:30] for command in calls for argument in command.args if argument[:2] == b"F1"]
    assert ids == sorted(ids)
    assert [frame[4:30] for frame in stored(redis_client)] == ids


def test_a_refused_item_behind_a_call_under_way(proxy: Proxy, redis_client: redis.Redis) -> None:
    """Its reply is lost as well: what is told of must be exactly what is there."""
    rule = fault(proxy, "reply", 2)
    items: list[Any] = [("A", payload) for payload in payloads()]
    items[3_500] = ("A", "no object")
    with Client(Settings(redis_url=proxy.url)) as client, pytest.raises(PartialSubmit) as caught:
        client.submit_many(items)
    assert rule.fired.is_set() and isinstance(caught.value.cause, InvalidPayload)
    found = numbers(redis_client)
    assert [found[handle.id] for handle in caught.value.handles] == sorted(found.values())
    assert list(range(len(found))) == sorted(found.values()) and len(found) > 1_000


def test_an_interrupt_while_packing_leaves_no_reply_to_the_next_call(
    client: Client, redis_client: redis.Redis
) -> None:
    client.submit("A", {"n": -1})

    def interrupted() -> Iterator[Any]:
        yield from payloads(3_000)
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            client.submit_alike("A", interrupted())
        handle = client.submit("A", {"n": -1}, idempotency_key="one")
        # An answer to somebody else's call would be no duplicate, or of the wrong shape.
        assert client.submit("A", {"n": -1}, idempotency_key="one").created is False
        assert handle.status() == "queued"
    # Nor does the connection stay with nobody: a pool has only so many.
    assert client.link.door().client.connection_pool._in_use_connections == set()  # type: ignore[attr-defined]


def test_a_call_that_could_not_be_sent_is_told_by_finish(tmp_path: Any) -> None:
    door = ProducerDoor(connect(f"unix://{tmp_path}/nobody", timeout_s=0.2))
    begun = door.begin(Call("pause", (b"a", b"b"), ("high",)))
    with pytest.raises(RedisUnavailable) as caught:
        door.finish(begun)
    assert caught.value.applied is False
    door.abandon(begun)


def test_the_short_way_means_what_the_long_one_does(
    proxy: Proxy, redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    client = connect(proxy.url, timeout_s=5)
    door = ProducerDoor(client)
    call = Call("pause", (KEYS.void, KEYS.paused), ("high",))
    redis_client.script_flush()
    assert door.run(call) == 1 and redis_client.smembers(KEYS.paused) == {b"high"}
    is_pause = runs(SCRIPTS["pause"].sha)
    for reply, error, applied in (
        (b"-LOADING Redis is loading the dataset in memory\r\n", RedisUnavailable, False),
        (b"-READONLY You can't write against a read only replica.\r\n", RedisUnavailable, False),
        (b"-ERR Error running script\r\n", ScriptError, None),
    ):
        proxy.answer(is_pause, reply)
        with pytest.raises(error) as caught:
            door.run(call)
        assert getattr(caught.value, "applied", None) is applied
    proxy.drop_reply(is_pause)
    with pytest.raises(RedisUnavailable) as lost:
        door.run(call)
    assert isinstance(lost.value, RedisUnavailable) and lost.value.applied is None
    assert door.run(call) == 0  # on a fresh connection
    assert client.connection_pool._in_use_connections == set()  # type: ignore[attr-defined]
    client.close()


@pytest.mark.parametrize("sizes", [(), (5,), (20_000,), (5, 20_000, 5), (20_000, 20_000), (8_191, 8_192)])
def test_a_command_in_pieces_has_the_same_bytes(sizes: tuple[int, ...]) -> None:
    arguments: tuple[Any, ...] = ("EVALSHA", 3, "é", *(b"x" * size for size in sizes), 10**15, b"")
    expected = redis.connection.Connection().pack_command(*arguments)
    assert b"".join(pieces(arguments)) == b"".join(expected)
    # Large ones are the caller's own objects: nothing was copied.
    large = [argument for argument in arguments if isinstance(argument, bytes) and len(argument) >= 8_192]
    assert [piece for piece in pieces(arguments) if any(piece is one for one in large)] == large


# ------------------------------------------------------------------ the async door


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        ("unix:///tmp/redis.sock", True),
        ("unix://:secret@/tmp/redis.sock?db=3", True),
        ("redis://user:secret@host:6379/2", True),
        ("rediss://host", False),
        ("redis://host?socket_timeout=3", False),
        ("unix:///tmp/redis.sock?ssl_cert_reqs=none", False),
    ],
)
def test_urls_that_ask_for_more_are_left_to_the_library(url: str, ours: bool) -> None:
    assert speaks(url) is ours


async def test_the_door_of_the_library_can_begin_and_finish_too(redis_server: RedisServer) -> None:
    door = AsyncDoor(connect_async(redis_server.url))
    call = Call("pause", (KEYS.void, KEYS.paused), ("high",))
    assert [await (await door.begin(call)) for _ in range(2)] == [1, 0]
    await door.close()


async def test_a_connection_that_died_is_replaced(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        await client.submit("A", {"n": 0})
        for _ in range(3):
            redis_client.client_kill_filter(_type="normal", skipme=True)
            handle = await client.submit("A", {"n": 0})
            assert await handle.status() == "queued"
        assert (await client.status()).totals["submitted"] == 4


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_an_overdue_reply_is_noticed_and_a_blocked_loop_is_not_taken_for_one(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, run: Callable[[Any], None]
) -> None:
    """A handler of another socket stands still; after it uvloop runs timers first, and reads then."""
    monkeypatch.setattr(doors, "_TIMEOUT_MS", 150)
    monkeypatch.setattr(doors, "_TICK_S", 0.05)
    run(_be_overdue(proxy))


async def _be_overdue(proxy: Proxy) -> None:
    door = AsyncProducerDoor(connect_async(proxy.url), proxy.url)
    call = Call("pause", (KEYS.void, KEYS.paused), ("high",))
    await door.run(call)
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()

    def stand_still() -> None:
        ours.recv(1)
        threading.Event().wait(0.3)

    loop.add_reader(ours, stand_still)
    for _ in range(3):
        delayed = proxy.delay(runs(SCRIPTS["pause"].sha), 0.05)
        answer = asyncio.ensure_future(door.run(call))
        await await_until(delayed.fired.is_set)
        theirs.send(b"x")
        assert await answer == 0
    loop.remove_reader(ours)
    ours.close()
    theirs.close()
    proxy.black_hole(runs(SCRIPTS["pause"].sha))
    with pytest.raises(RedisUnavailable) as caught:
        await door.run(call)
    assert caught.value.applied is None
    assert await door.run(call) == 0
    await door.close()


# ------------------------------------------------------------------ concurrent submissions


def email(to: str, n: int = 0) -> None: ...


async def test_types_of_one_turn_share_a_frame_and_stand_side_by_side(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        await client.connect()
        kinds = ["a", "b", "c"]
        handles = await asyncio.gather(
            *(client.submit(kinds[n % 3], {"n": n, "x": FILLER if n == 50 else ""}) for n in range(100))
        )
        (frame,) = stored(redis_client)
        assert codec.types(frame) == "a*34;b*33;c*33"
        found = {name: (kind, payload["n"]) for name, kind, payload in Hands(redis_client).fetch().jobs()}
        assert [found[handle.id] for handle in handles] == [(kinds[n % 3], n) for n in range(100)]
        assert [(await handle.job()).type for handle in handles[:3]] == kinds


async def test_a_caller_that_is_cancelled_takes_nobody_with_it(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        await client.connect()
        tasks = [asyncio.create_task(client.submit("A", {"n": n})) for n in range(10)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[3], asyncio.CancelledError)
        found = numbers(redis_client)
        got = {n: outcome for n, outcome in enumerate(outcomes) if not isinstance(outcome, BaseException)}
        assert {n: found[handle.id] for n, handle in got.items()} == {n: n for n in range(10) if n != 3}
        assert len(found) == 10  # and does not take its job back


async def test_a_task_that_is_registered_later_is_checked_from_then_on(redis_server: RedisServer) -> None:
    registry = Registry()
    async with AsyncClient(Settings(redis_url=redis_server.url), registry=registry) as client:
        await client.submit("EMAIL", {"whatever": 1})
        registry.add(Task("EMAIL", email))
        with pytest.raises(ArgumentsError):
            await client.submit("EMAIL", {"whatever": 1})
        for bad in (["EMAIL"], 7, "E MAIL"):
            with pytest.raises(InvalidPayload, match="is no type"):
                await client.submit(bad, {})  # type: ignore[arg-type]


def test_a_client_that_was_closed_serves_another_loop(redis_server: RedisServer) -> None:
    client = AsyncClient(Settings(redis_url=redis_server.url))

    async def submit() -> int:
        async with client:
            await asyncio.gather(*(client.submit("A", {"n": n}) for n in range(3)))
            return (await client.status()).totals["submitted"]

    assert [asyncio.run(submit()) for _ in range(3)] == [3, 6, 9]


async def test_a_mistake_of_ours_is_told_to_all_who_wait(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        await client.connect()

        def broken(*_: Any) -> Any:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(codec, "pack_mixed", lambda *_, **__: broken())
            outcomes = await asyncio.gather(
                client.submit("A", {}), client.submit("B", {}, track=False), client.submit("C", {}, delay=1),
                return_exceptions=True,
            )  # fmt: skip
        assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError] * 3
        assert (await client.submit("A", {})).created


async def test_a_payload_is_taken_when_it_is_submitted(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    """One object that is changed from submission to submission, all of them in one turn."""
    async with AsyncClient(Settings(redis_url=redis_server.url)) as client:
        await client.connect()
        payload = {"n": 0}

        async def one(n: int) -> Any:
            payload["n"] = n
            return await client.submit("A", payload)

        handles = await asyncio.gather(*(one(n) for n in range(20)))
        found = numbers(redis_client)
        assert [found[handle.id] for handle in handles] == list(range(20))


async def test_a_connection_lost_under_many_callers_makes_one_job_each(
    proxy: Proxy, redis_client: redis.Redis
) -> None:
    async with AsyncClient(Settings(redis_url=proxy.url)) as client:
        await client.submit("A", {"n": -1})
        rule = proxy.drop_reply(IS_ENQUEUE, nth=2)
        handles = await asyncio.gather(*(client.submit("A", {"n": n}) for n in range(3_000)))
        assert rule.fired.is_set()
        found = numbers(redis_client)
        assert [found[handle.id] for handle in handles] == list(range(3_000)) and len(found) == 3_001
        assert all(handle.created for handle in handles)


def test_the_sync_client_reads_through_the_library_while_a_call_is_under_way(
    client: Client, redis_client: redis.Redis
) -> None:
    """`progress` may look at the queue."""
    seen: list[int] = []
    client.submit_alike("A", payloads(), progress=lambda n: seen.append(client.status().totals["submitted"]))
    assert seen[-1] == JOBS and seen == sorted(seen) and len(seen) > 2
