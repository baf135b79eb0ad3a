"""The clients and the app against a real Redis: what goes in, what is answered, what a lost reply leads
to."""

import asyncio
import os
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
import redis

from tests.support.hands import Hands
from tests.support.redis_server import RedisServer
from tests.support.waiting import await_until, wait_until
from tqe import app as app_module
from tqe import codec
from tqe.app import App, load_app
from tqe.client import AsyncClient, Client, submission_from_json
from tqe.errors import (
    AppImportError,
    ArgumentsError,
    IdempotencyConflict,
    InvalidOption,
    InvalidPayload,
    JobFailed,
    JobWasCancelled,
    PartialSubmit,
    PayloadTooLarge,
    QueueFull,
    RedisUnavailable,
    RegistrationError,
    ResultTimeout,
    ResultTooLarge,
    ResultUnavailable,
    ServerUnfit,
    SettingsError,
    SubmitUnknown,
    UnknownLane,
)
from tqe.registry import Registry, Task
from tqe.settings import Settings
from tqe.store import embedded, producing, reading
from tqe.store import link as link_module
from tqe.store.call import AsyncDoor, Call, SyncDoor, connect_async
from tqe.store.keys import Keys
from tqe.store.link import AsyncLink, SyncLink

KEYS = Keys()


def email(to: str, n: int = 0) -> None: ...


def registry() -> Registry:
    found = Registry()
    found.add(Task("EMAIL", email))
    return found


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    with Client(Settings(redis_url=redis_server.url), registry=registry()) as client:
        yield client


@pytest.fixture
async def aclient(redis_server: RedisServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(Settings(redis_url=redis_server.url), registry=registry()) as client:
        yield client


@pytest.fixture
def app(redis_server: RedisServer) -> Iterator[App]:
    app = App("test", redis_url=redis_server.url)
    yield app
    app.close()


def frames(redis_client: redis.Redis, lane: str = "normal") -> list[bytes]:
    return redis_client.lrange(KEYS.queue(lane), 0, -1)  # type: ignore[no-any-return]


# ------------------------------------------------------------------ what goes in


def test_a_submission_is_a_frame_of_one_that_a_worker_can_read(
    client: Client, redis_client: redis.Redis
) -> None:
    handle = client.submit("EMAIL", {"to": "a"}, priority="HIGH", timeout=2, max_retries=1)
    (frame,) = frames(redis_client, "high")
    header = codec.parse(frame)
    assert handle.id == f"{header.frame_id.decode()}.0" and handle.created
    assert (header.n, header.lane, header.flags & codec.TRACKED) == (1, "high", codec.TRACKED)
    assert header.options == b'{"timeout_ms":2000,"max_retries":1}'
    assert codec.walk(frame) == [(0, b"EMAIL", b'{"to":"a"}', b"", False)]
    assert (handle.status(), handle.job().type, handle.job().lane) == ("queued", "EMAIL", "high")
    assert client.status().lanes["high"].queued == 1 and client.status().totals["submitted"] == 1


def test_every_supported_server_takes_submissions(any_redis: RedisServer) -> None:
    with Client(Settings(redis_url=any_redis.url)) as client:
        ids = {client.submit("A", {}, idempotency_key="k").id for _ in range(2)}
        handles = client.submit_many([("A", {"x": i}) for i in range(2500)], delay=1)
        assert len(ids) == 1 and handles[2499].status() == "scheduled"
        status = client.status().as_dict()
        assert status["scheduled"] == 2500
        assert status["totals"]["submitted"] == 2501 and status["totals"]["duplicate"] == 1


def test_large_payloads_are_compressed_and_too_large_ones_refused(
    client: Client, redis_client: redis.Redis
) -> None:
    client.submit("BLOB", {"text": "x" * 5000})
    ((_, _, stored, _, zstd),) = codec.walk(frames(redis_client)[0])
    assert zstd and len(stored) < 100
    assert Hands(redis_client).fetch() is not None
    with pytest.raises(PayloadTooLarge, match="1048576"):
        client.submit("BLOB", {"text": "x" * 1_100_000})


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ([1, 2], InvalidPayload),
        ("text", InvalidPayload),
        ({"to": float("nan")}, InvalidPayload),
        ({"to": 2**64}, InvalidPayload),
        ({1: 2}, InvalidPayload),
        ({"to": object()}, InvalidPayload),
        ({"to": "a", "m": 1}, ArgumentsError),
        ({"n": 1}, ArgumentsError),
        ({"to": 1}, ArgumentsError),
    ],
)
def test_a_bad_payload_is_refused_before_anything_is_sent(
    client: Client, redis_client: redis.Redis, payload: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        client.submit("EMAIL", payload)
    with pytest.raises(error):
        client.submit_many([("EMAIL", payload)])
    with pytest.raises(error):
        client.submit_alike("EMAIL", [payload])
    assert redis_client.dbsize() == 0


def test_a_nesting_bomb_is_refused(client: Client) -> None:
    bomb: list[Any] = []
    for _ in range(100_000):
        bomb = [bomb]
    with pytest.raises(InvalidPayload, match="nested"):
        client.submit("ANY", {"x": bomb})
    while bomb:  # its own destructor would recurse as deep
        bomb = bomb[0]


def test_wrong_types_lanes_and_options_are_refused(client: Client) -> None:
    with pytest.raises(InvalidPayload, match="is no type"):
        client.submit("E MAIL", {})
    with pytest.raises(UnknownLane):
        client.submit("EMAIL", {"to": "a"}, priority="urgent")
    with pytest.raises(InvalidOption):
        client.submit("EMAIL", {"to": "a"}, delay=-1)
    with pytest.raises(InvalidOption, match="belongs to one job"):
        client.submit_many([("EMAIL", {"to": "a"})], idempotency_key="k")
    with pytest.raises(InvalidPayload, match="an item is"):
        client.submit_many(["EMAIL"])


def test_json_that_people_write() -> None:
    line = '{"type":"A","payload":{"x":1},"priority":"high","idempotencyKey":"k","maxRetries":2,"delay":null}'
    assert submission_from_json(line, payload_max_bytes=1000) == (
        "A",
        {"x": 1},
        {"priority": "high", "idempotency_key": "k", "max_retries": 2},
    )
    assert submission_from_json('{"type":"A"}', payload_max_bytes=1000) == ("A", {}, {})
    for bad in (
        '{"payload":{}}',
        '{"type":"A","payload":[]}',
        '{"type":"A","payload":{"a":1,"a":2}}',
        "[",
        "",
    ):
        with pytest.raises(InvalidPayload):
            submission_from_json(bad, payload_max_bytes=1000)


# ------------------------------------------------------------------ in bulk


def test_bulk_fills_frames_and_every_handle_finds_its_job(client: Client, redis_client: redis.Redis) -> None:
    handles = client.submit_alike("EMAIL", ({"to": "a", "n": i} for i in range(12_345)), timeout=9)
    assert (len(handles), handles.created, handles.duplicates) == (12_345, 12_345, 0)
    packed = frames(redis_client)
    assert len(packed) == 13 and all(codec.parse(frame).n <= 1000 for frame in packed)
    assert {codec.parse(frame).options for frame in packed} == {b'{"timeout_ms":9000}'}
    numbers = {name: payload["n"] for name, _, payload in Hands(redis_client).fetch().jobs()}
    assert [numbers[name] for name in handles.ids] == list(range(12_345))
    assert [handles[i].id for i in (0, 999, 1000, 12_344, -1)] == [
        name for name, n in numbers.items() for i in (0, 999, 1000, 12_344, 12_344) if n == i
    ]
    assert [numbers[handle.id] for handle in handles[998:1003]] == [998, 999, 1000, 1001, 1002]
    with pytest.raises(IndexError):
        handles[12_345]


def test_frames_keep_within_their_bytes(client: Client, redis_client: redis.Redis) -> None:
    client.submit_alike("BLOB", [{"x": "y" * 900} for _ in range(200)])
    client.submit_many([("BLOB", {"x": os.urandom(400).hex()}) for _ in range(200)], priority="low")
    client.submit_many([("BLOB", {"x": os.urandom(60_000).hex()})], priority="high")
    for lane in ("normal", "low"):
        sizes = [len(frame) for frame in frames(redis_client, lane)]
        assert len(sizes) > 1 and max(sizes) <= 65_536 and min(sizes[:-1]) > 60_000
    assert len(frames(redis_client, "high")) == 1


def test_options_of_a_call_ride_in_the_frame_and_a_delay_makes_one_member(
    client: Client, redis_client: redis.Redis
) -> None:
    client.submit_alike("EMAIL", [{"to": "a"}] * 1000, delay=5, max_retries=0, expires=60)
    ((frame, due_ms),) = redis_client.zrange(KEYS.delayed, 0, -1, withscores=True)
    header = codec.parse(frame)
    assert header.n == 1000 and due_ms > time.time() * 1000 + 3000
    assert set(msgspec.json.decode(header.options)) == {"max_retries", "expires_ms"}
    assert all(job[3] == b"" for job in codec.walk(frame))


def test_items_that_differ_travel_as_they_must(client: Client, redis_client: redis.Redis) -> None:
    items = [
        ("A", {"i": 0}),
        ("B", {"i": 1}, {"timeout": 1}),
        ("A", {"i": 2}, {"priority": "high"}),
        ("A", {"i": 3}, {"idempotency_key": "k"}),
        ("A", {"i": 4}, {"delay": 60}),
        ("A", {"i": 5}, {"idempotency_key": "k"}),
        ("A", {"i": 6}, {"track": False}),
    ]
    # The two keyed ones differ in their payload: the second is refused, and that ends the submission.
    with pytest.raises(PartialSubmit) as caught:
        client.submit_many(items)
    assert isinstance(caught.value.cause, IdempotencyConflict) and len(caught.value.handles) == 5
    normal = [codec.walk(frame) for frame in frames(redis_client)]
    by_size = sorted(normal, key=len, reverse=True)
    assert [(kind, options) for _, kind, _, options, _ in by_size[0]] == [
        (b"A", b""),
        (b"B", b'{"timeout_ms":1000}'),
    ]
    assert [len(jobs) for jobs in by_size] == [2, 1]  # the untracked one goes in a later call
    assert len(frames(redis_client, "high")) == 1 and redis_client.zcard(KEYS.delayed) == 1


def test_the_same_key_twice_in_one_call(client: Client) -> None:
    item = ("A", {"i": 1}, {"idempotency_key": "k"})
    handles = client.submit_many([item, ("A", {}), item])
    assert (handles.created, handles.duplicates) == (2, 1)
    assert handles[0].id == handles[2].id and (handles[0].created, handles[2].created) == (True, False)
    assert len(set(handles.ids)) == 2


def test_bad_items_end_a_submission_or_are_reported(client: Client, redis_client: redis.Redis) -> None:
    items: list[Any] = [("EMAIL", {"to": "a", "n": i}) for i in range(3000)]
    items[7] = ("EMAIL", {"to": 7})
    items[2500] = ("EMAIL", {"to": "a"}, {"priority": "nowhere"})
    with pytest.raises(ArgumentsError) as caught:
        client.submit_many(items)
    assert "item 7 " in caught.value.__notes__[0] and redis_client.dbsize() == 0
    handles = client.submit_many(items, collect=True)
    assert {at: type(error) for at, error in handles.refused.items()} == {
        7: ArgumentsError,
        2500: UnknownLane,
    }
    numbers = {name: payload["n"] for name, _, payload in Hands(redis_client).fetch().jobs()}
    assert [numbers[name] for name in handles.ids] == [i for i in range(3000) if i not in (7, 2500)]
    alike = client.submit_alike("EMAIL", [{"to": "a"}, {"to": 1}, {"to": "b"}], collect=True)
    assert set(alike.refused) == {1} and len(alike) == 2 and alike[1].status() == "queued"


def test_progress_is_told(client: Client) -> None:
    seen: list[int] = []
    client.submit_alike("EMAIL", [{"to": "a"}] * 90_000, progress=seen.append)
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == 90_000


def test_what_fails_after_a_first_call_is_partial(redis_server: RedisServer) -> None:
    link = LossyLink(Settings(redis_url=redis_server.url), ["ok", "full"])
    with Client(Settings(), link=link) as client, pytest.raises(PartialSubmit) as caught:
        client.submit_alike("A", [{"x": "y" * 200}] * 20_000)
    assert isinstance(caught.value.cause, QueueFull)
    handles = caught.value.handles
    assert 1000 <= len(handles) < 20_000
    link.plan = []
    with Client(Settings(), link=link) as client:
        assert client.job(handles[-1].id).status == "queued"
        assert client.status().lanes["normal"].queued == len(handles)


def test_a_full_redis_is_said_and_a_first_call_leaves_nothing(
    client: Client, redis_client: redis.Redis
) -> None:
    redis_client.config_set("maxmemory", "1mb")
    with pytest.raises(QueueFull):
        client.submit("EMAIL", {"to": "a"})
    with pytest.raises(QueueFull):
        client.submit_alike("EMAIL", [{"to": "a"}] * 10)


# ------------------------------------------------------------------ keys


def test_a_key_answers_with_the_first_job_whatever_the_order_of_its_payload(client: Client) -> None:
    first = client.submit("A", {"a": 1, "b": {"x": 1, "y": 2}}, idempotency_key="é" * 128)
    again = client.submit("A", {"b": {"y": 2, "x": 1}, "a": 1}, idempotency_key="é" * 128)
    assert (first.created, again.created) == (True, False) and first == again
    for type_name, payload, options in (
        ("A", {"a": 2}, {}),
        ("B", {"a": 1}, {}),
        ("A", {"a": 1}, {"lane": "low"}),
    ):
        with pytest.raises(IdempotencyConflict) as caught:
            client.submit(type_name, payload, idempotency_key="é" * 128, **options)
        assert caught.value.first_id == first.id
    assert client.status().totals["submitted"] == 1


def test_a_key_outlives_the_wait_of_its_job(client: Client, redis_client: redis.Redis) -> None:
    client.submit("A", {}, idempotency_key="k", delay=1000)
    ttl_s: Any = redis_client.ttl(KEYS.idem("k"))
    assert 86_400 + 990 < ttl_s <= 86_400 + 1001


# ------------------------------------------------------------------ lost replies


class LossyDoor:
    """Runs calls of `enqueue` (and `replay`, `purge`) by plan: ok, lost (applied, no reply), late (applied
    only when the next call has been answered), gone (not applied, and the caller cannot know), refused,
    full."""

    def __init__(self, door: SyncDoor, plan: list[str]) -> None:
        self.door = door
        self.plan = plan
        self.client = door.client
        self.late: list[Call] = []
        self.sent: list[Call] = []

    def run(self, call: Call) -> Any:
        if call.script not in ("enqueue", "replay", "purge"):
            return self.door.run(call)
        self.sent.append(call)
        how = self.plan.pop(0) if self.plan else "ok"
        if how == "refused":
            raise RedisUnavailable("Redis refused: LOADING", applied=False)
        if how == "full":
            raise QueueFull("full")
        if how == "late":
            self.late.append(call)
        if how in ("lost", "ok"):
            reply = self.door.run(call)
            while self.late:
                self.door.run(self.late.pop())
            if how == "ok":
                return reply
        raise RedisUnavailable("Redis did not answer", applied=None)

    def begin(self, call: Call, packed: Any = None) -> Call:
        return call

    def finish(self, begun: Call) -> Any:
        return self.run(begun)

    def abandon(self, begun: Call) -> None: ...

    def send(self, commands: Any) -> Any:
        return self.door.send(commands)


class LossyLink(SyncLink):
    def __init__(self, settings: Settings, plan: list[str]) -> None:
        super().__init__(settings)
        self.plan = plan
        self.lossy: LossyDoor | None = None

    def door(self) -> Any:
        self.lossy = LossyDoor(super().door(), self.plan)
        return self.lossy


class AsyncLossyLink(AsyncLink):
    def __init__(self, settings: Settings, plan: list[str]) -> None:
        super().__init__(settings)
        self.plan = plan

    async def door(self) -> Any:
        door, plan = await super().door(), self.plan

        class Door:
            client = door.client

            async def run(self, call: Call) -> Any:
                how = plan.pop(0) if plan else "ok"
                reply = await door.run(call) if how in ("ok", "lost") else None
                if how == "ok":
                    return reply
                raise RedisUnavailable("Redis did not answer", applied=None)

            async def begin(self, call: Call) -> Any:
                return self.run(call)

            async def send(self, commands: Any) -> Any:
                return await door.send(commands)

        return Door()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producing, "_BACKOFF_FIRST_S", 0.001)


@pytest.mark.parametrize("options", [{}, {"idempotency_key": "k"}, {"idempotency_key": "k", "track": False}])
@pytest.mark.parametrize(
    "plan", [["lost"], ["gone"], ["late"], ["lost", "lost"], ["refused", "lost", "gone"], ["refused"], []]
)
def test_a_lost_reply_of_enqueue_is_repeated_with_the_same_bytes_and_makes_one_job(
    redis_server: RedisServer, quick: None, plan: list[str], options: dict[str, Any]
) -> None:
    link = LossyLink(Settings(redis_url=redis_server.url), list(plan))
    with Client(Settings(), link=link) as client:
        handle = client.submit("A", {"x": 1}, **options)
        assert handle.created and link.lossy is not None
        assert len(link.lossy.sent) == len(plan) + 1 and len({call.args for call in link.lossy.sent}) == 1
        status = client.status()
        assert status.lanes["normal"].queued == 1 and status.totals["submitted"] == 1
        assert status.totals["duplicate"] == 0


@pytest.mark.parametrize("plan", [["lost"], ["gone"], ["late"], ["refused", "lost"]])
def test_an_untracked_job_is_never_sent_twice(
    redis_server: RedisServer, quick: None, plan: list[str]
) -> None:
    link = LossyLink(Settings(redis_url=redis_server.url), list(plan))
    with Client(Settings(), link=link) as client:
        with pytest.raises(SubmitUnknown) as caught:
            client.submit("A", {}, track=False)
        assert len(caught.value.job_id) == 28
        assert client.status().lanes["normal"].queued == plan.count("lost")


def test_patience_ends(redis_server: RedisServer, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        producing.persist, "__kwdefaults__", {"patience_s": 0.05, "repeatable": True, "unknown": None}
    )
    monkeypatch.setattr(producing.enqueue, "__kwdefaults__", {"patience_s": 0.05})
    for plan, error in ((["refused"] * 100, RedisUnavailable), (["gone"] * 100, SubmitUnknown)):
        link = LossyLink(Settings(redis_url=redis_server.url), plan)
        with Client(Settings(), link=link) as client, pytest.raises(error):
            client.submit("A", {})
        assert 0 < len(plan) < 99


def test_full_after_a_lost_reply_does_not_deny_what_may_have_gone_in(
    redis_server: RedisServer, quick: None
) -> None:
    link = LossyLink(Settings(redis_url=redis_server.url), ["lost", "full"])
    with Client(Settings(), link=link) as client, pytest.raises(SubmitUnknown):
        client.submit("A", {})


def test_a_killed_redis_costs_a_producer_nothing_but_time(
    make_redis: Callable[..., RedisServer], quick: None
) -> None:
    server = make_redis()
    with Client(Settings(redis_url=server.url)) as client:
        client.submit("A", {})
        server.kill()
        made: list[bool] = []
        # The server is started by this thread: it dies with the thread that forked it.
        thread = threading.Thread(target=lambda: made.append(client.submit("A", {}).created))
        thread.start()
        server.start()
        thread.join()
        assert made == [True]
        assert client.status().lanes["normal"].queued == 2


# ------------------------------------------------------------------ servers that cannot be used


def test_a_server_that_is_not_there_is_said_at_once(tmp_path: Any) -> None:
    client = Client(Settings(redis_url=f"unix://{tmp_path}/none.sock"))
    with pytest.raises(RedisUnavailable, match="cannot be reached"):
        client.submit("A", {})


def test_a_wrong_password_and_an_evicting_server_are_said_at_once(
    make_redis: Callable[..., RedisServer],
) -> None:
    locked = make_redis(maxmemory_policy="allkeys-lru", maxmemory="100mb")
    with (
        Client(Settings(redis_url=locked.url)) as client,
        pytest.raises(ServerUnfit, match="noeviction"),
    ):
        client.submit("A", {})
    with Client(Settings(redis_url=f"unix://:wrong@{locked.socket}")) as client, pytest.raises(ServerUnfit):
        client.submit("A", {})


# ------------------------------------------------------------------ results


def test_results_and_why_there_is_none(client: Client, redis_client: redis.Redis) -> None:
    handles = client.submit_many([("A", {"i": i}) for i in range(6)])
    ends = [("C", {"x": [1]}), ("C", None), ("D", "boom"), ("X", "asked"), ("E", None), ("C", ValueError())]
    Hands(redis_client).fetch().settle(lambda name: ends[int(name.split(".")[1])])
    assert handles[0].result() == {"x": [1]} and handles[1].result() is None
    with pytest.raises(JobFailed, match="boom") as failed:
        handles[2].result(timeout=5)
    assert failed.value.job_id == handles[2].id
    with pytest.raises(JobWasCancelled, match="asked"):
        handles[3].result()
    with pytest.raises(JobWasCancelled, match="expired"):
        handles[4].result()
    with pytest.raises(ResultTooLarge, match="70000 bytes"):
        handles[5].result()
    assert [handle.status() for handle in handles] == [
        "completed", "completed", "dead", "cancelled", "cancelled", "completed",
    ]  # fmt: skip
    assert handles[0].job().attempts == 1 and handles[2].job().error == "boom"


@pytest.mark.alone
def test_nothing_to_wait_for(client: Client) -> None:
    untracked = client.submit("A", {}, track=False)
    assert untracked.status() == "untracked"
    with pytest.raises(ResultUnavailable, match="track=False"):
        untracked.result()
    with pytest.raises(ResultUnavailable, match="expired, or it never was"):
        client.handle("0" * 26 + ".0").result()
    with pytest.raises(ValueError, match="not a job id"):
        client.result("17")
    started = time.monotonic()
    with pytest.raises(ResultTimeout, match="is queued"):
        client.submit("A", {}).result(timeout=0.2)
    assert 0.15 < time.monotonic() - started < 2


def test_a_waiter_is_woken_and_does_not_poll(client: Client, redis_client: redis.Redis) -> None:
    handle = client.submit("A", {})
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append((handle.result(timeout=20), time.monotonic())))
    thread.start()
    wait_until(lambda: redis_client.zscore(KEYS.waiting, handle.frame_id), what="the waiter is entered")
    hands = Hands(redis_client).fetch()
    # Not at the start of the waiter's second: a re-read would hide that nobody woke it.
    before: Any = redis_client.info("commandstats")
    settled = time.monotonic()
    hands.settle(lambda name: ("C", 7))
    thread.join()
    after: Any = redis_client.info("commandstats")
    reads = after["cmdstat_hmget"]["calls"] - before["cmdstat_hmget"]["calls"]
    assert got[0][0] == 7 and got[0][1] - settled < 0.5 and reads < 10


def test_a_wake_up_that_was_lost_is_made_up_for(
    client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = client.submit("A", {})
    redis_client.zadd(KEYS.waiting, {"somebody long ago": 1})
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(handle.result(timeout=20)))
    thread.start()
    wait_until(lambda: redis_client.zscore(KEYS.waiting, handle.frame_id), what="the waiter is entered")
    wait_until(lambda: redis_client.zcard(KEYS.waiting) == 1, what="what is long over is taken out")
    redis_client.delete(KEYS.waiting)
    Hands(redis_client).fetch().settle(lambda name: ("C", 7))
    thread.join()
    assert got == [7]


@pytest.mark.parametrize("when", ["before it listens", "before it is entered"])
def test_an_end_between_looking_and_listening_is_not_missed(
    redis_server: RedisServer, redis_client: redis.Redis, when: str
) -> None:
    class Link(SyncLink):
        def _listen(self, door: Any, ear: Any, step: Any) -> Any:
            if when == "before it is entered":
                ear = super()._listen(door, ear, step)
            Hands(redis_client).fetch().settle(lambda name: ("C", 7))
            return ear if when == "before it is entered" else super()._listen(door, ear, step)

        def _hear(self, ear: Any, step: Any) -> bool:
            raise AssertionError("it waits for what has happened")

    with Client(Settings(), link=Link(Settings(redis_url=redis_server.url))) as client:
        assert client.submit("A", {}).result(timeout=5) == 7


def test_waiting_survives_a_restart_of_redis(make_redis: Callable[..., RedisServer], quick: None) -> None:
    server = make_redis()
    with Client(Settings(redis_url=server.url)) as client:
        handle = client.submit("A", {})
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(handle.result(timeout=20)))
        thread.start()
        with server.client() as redis_client:
            wait_until(lambda: redis_client.zscore(KEYS.waiting, handle.frame_id))
        server.restart()
        with server.client() as redis_client:
            Hands(redis_client).fetch().settle(lambda name: ("C", 7))
        thread.join()
        assert got == [7]


# ------------------------------------------------------------------ cancel


def test_cancelling(client: Client, redis_client: redis.Redis) -> None:
    late = client.submit("A", {}, delay=100)
    assert (late.cancel(), late.status(), redis_client.zcard(KEYS.delayed)) == ("cancelled", "cancelled", 0)
    with pytest.raises(JobWasCancelled):
        late.result()
    queued = client.submit("A", {})
    assert queued.cancel() == "requested" and queued.job().error == "cancellation requested"
    hands = Hands(redis_client).fetch()
    assert list(hands.cancels.values()) == [{0}]
    hands.settle(lambda name: ("X", "asked"))
    assert (queued.status(), queued.cancel()) == ("cancelled", "too_late")
    assert client.handle("0" * 26 + ".0").cancel() == "unknown"


@pytest.mark.parametrize("again", range(3))
def test_a_cancelled_job_wakes_who_waits_for_it(
    client: Client, redis_client: redis.Redis, again: int
) -> None:
    """More than once: a waiter that only reads again each second would be as quick by chance."""
    handle = client.submit("A", {}, delay=100)
    woken: list[float] = []

    def wait() -> None:
        with pytest.raises(JobWasCancelled):
            handle.result(timeout=20)
        woken.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: redis_client.zscore(KEYS.waiting, handle.frame_id), what="the waiter is entered")
    cancelled = time.monotonic()
    assert handle.cancel() == "cancelled"
    thread.join()
    assert woken[0] - cancelled < 0.5


# ------------------------------------------------------------------ dead letters


def kill(client: Client, redis_client: redis.Redis, type_name: str, count: int) -> list[str]:
    handles = client.submit_many([(type_name, {"i": i}) for i in range(count)])
    Hands(redis_client).fetch().settle(lambda name: ("D", f"boom {name}"))
    return list(handles.ids)


def test_replay_puts_a_job_back_as_if_new(client: Client, redis_client: redis.Redis) -> None:
    first, second = kill(client, redis_client, "A", 2)
    dead = client.dead_job(first)
    assert dead is not None and (dead.type, dead.reason, dead.attempts) == ("A", "failed", 1)
    assert dead.payload == {"i": 0} and dead.error == f"boom {first}"
    assert client.replay(first, "0" * 26 + ".0") == producing.Replayed(
        replayed=(first,), missing=("0" * 26 + ".0",)
    )
    assert client.replay(first).missing == (first,)
    (frame,) = frames(redis_client)
    header = codec.parse(frame)
    assert (header.attempts, header.crashes, header.run, header.base, header.total) == (0, 0, 2, 0, 2)
    assert client.job(first).status == "queued" and client.job(second).status == "dead"
    assert client.status().dead == 1 and client.status().totals["replayed"] == 1
    Hands(redis_client).fetch().settle(lambda name: ("C", "well"))
    assert client.result(first) == "well"


def test_replay_and_purge_by_filter(client: Client, redis_client: redis.Redis) -> None:
    kill(client, redis_client, "A", 700)
    kill(client, redis_client, "B", 600)
    seen: list[int] = []
    done = client.replay_all(type_name="B", progress=seen.append)
    assert len(done.replayed) == 600 and not done.missing and seen[-1] == 600
    assert client.status().dead == 700 and client.status().lanes["normal"].queued == 600
    assert client.replay_all(reason="crash").replayed == ()
    assert client.purge_all(reason="fail") == 700
    assert client.status().dead == 0 and redis_client.hlen(KEYS.dlq_meta) == 0


def test_a_job_that_dies_again_during_a_replay_is_not_met_again(
    client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(client, redis_client, "A", 4)
    monkeypatch.setattr(reading, "PAGE", 2)
    rounds: list[int] = []

    def die_again(count: int) -> None:
        rounds.append(count)
        assert len(rounds) < 10
        began: Any = redis_client.time()
        wait_until(lambda: redis_client.time() > (began[0], began[1] + 1000), what="a millisecond is over")
        Hands(redis_client).fetch().settle(lambda name: ("D", "again"))

    assert len(client.replay_all(progress=die_again).replayed) == 4
    assert rounds == [2, 4] and client.status().dead == 4


def test_purge_by_id(client: Client, redis_client: redis.Redis) -> None:
    first, second = kill(client, redis_client, "A", 2)
    assert client.purge(first, "0" * 26 + ".5") == 1
    assert client.dead_job(first) is None and client.dead_job(second) is not None


@pytest.mark.parametrize("how", ["lost", "gone", "late"])
def test_a_lost_reply_of_replay_and_purge_is_read_from_the_queue(
    redis_server: RedisServer, redis_client: redis.Redis, quick: None, how: str
) -> None:
    link = LossyLink(Settings(redis_url=redis_server.url), [])
    with Client(Settings(), link=link) as client:
        first, second = kill(client, redis_client, "A", 2)
        link.plan.append(how)
        done = client.replay(first)
        assert done.replayed + done.unknown == (first,) and not done.missing
        assert client.status().lanes["normal"].queued == 1 and client.job(first).status == "queued"
        link.plan.append(how)
        assert client.purge(second) == 1
        assert client.status().dead == 0


def test_a_damaged_dead_letter_is_left_where_it_is(client: Client, redis_client: redis.Redis) -> None:
    (first,) = kill(client, redis_client, "A", 1)
    frame: Any = redis_client.hget(KEYS.dlq, first)
    redis_client.hset(KEYS.dlq, first, frame[:-1] + b"?")
    assert client.replay(first).damaged == (first,)
    dead = client.dead_job(first)
    assert dead is not None and dead.payload is None and client.status().dead == 1


# ------------------------------------------------------------------ asyncio


async def test_the_async_twin(aclient: AsyncClient, redis_client: redis.Redis) -> None:
    handle = await aclient.submit("EMAIL", {"to": "a"}, idempotency_key="k")
    again = await aclient.submit("EMAIL", {"to": "a"}, idempotency_key="k")
    assert handle == again and (handle.created, again.created) == (True, False)
    with pytest.raises(IdempotencyConflict):
        await aclient.submit("EMAIL", {"to": "b"}, idempotency_key="k")
    with pytest.raises(ArgumentsError):
        await aclient.submit("EMAIL", {"to": 1})
    assert await handle.status() == "queued" and (await aclient.status()).lanes["normal"].queued == 1
    with pytest.raises(ResultTimeout):
        await handle.result(timeout=0.05)
    waiting = asyncio.create_task(handle.result(timeout=20))
    hands = Hands(redis_client).fetch()
    await await_until(lambda: redis_client.zscore(KEYS.waiting, handle.frame_id))
    hands.settle(lambda name: ("C", 7))
    assert await waiting == 7
    late = await aclient.submit("EMAIL", {"to": "b"}, delay=9)
    assert await late.cancel() == "cancelled"
    bulk = await aclient.submit_many([("EMAIL", {"to": "a", "n": i}) for i in range(3000)])
    alike = await aclient.submit_alike("EMAIL", [{"to": "a"}] * 3000)
    assert len(bulk) == 3000 and await alike[2999].status() == "queued"
    assert len(await aclient.workers()) == 0


async def test_submissions_of_one_turn_share_frames_and_keep_their_own_outcomes(
    aclient: AsyncClient, redis_client: redis.Redis
) -> None:
    await aclient.submit("A", {"first": True})  # connect

    def calls() -> int:
        stats: Any = redis_client.info("commandstats")
        # A connection's first call of a script carries its text.
        return sum(stats[name]["calls"] for name in ("cmdstat_eval", "cmdstat_evalsha") if name in stats)

    before = calls()

    def one(i: int) -> Any:
        if i % 100 == 7:
            return aclient.submit("EMAIL", {"to": i})
        if i % 100 == 8:
            return aclient.submit("A", {"i": i // 1000}, idempotency_key="shared")
        return aclient.submit("A", {"i": i}, priority="high" if i % 2 else "low", track=i % 3 != 0)

    outcomes = await asyncio.gather(*(one(i) for i in range(2500)), return_exceptions=True)
    assert calls() - before <= 9  # three flushes of a thousand, tracked and untracked apart, and spare
    payloads = {name: payload for name, _, payload in Hands(redis_client).fetch().jobs()}
    keyed = set()
    for i, outcome in enumerate(outcomes):
        if i % 100 == 7:
            assert isinstance(outcome, ArgumentsError)
        elif i % 100 == 8:
            if i // 1000 == 0:
                assert not isinstance(outcome, BaseException)
                keyed.add(outcome.id)
            else:
                assert isinstance(outcome, IdempotencyConflict)
        else:
            assert not isinstance(outcome, BaseException)
            assert payloads[outcome.id] == {"i": i} and outcome.tracked == (i % 3 != 0)
    assert len(keyed) == 1


async def test_a_lost_reply_of_a_shared_call_is_told_to_each_by_its_kind(
    redis_server: RedisServer, quick: None
) -> None:
    link = AsyncLossyLink(Settings(redis_url=redis_server.url), ["ok", "lost"])
    async with AsyncClient(Settings(), link=link) as client:
        tracked, untracked, other = await asyncio.gather(
            client.submit("A", {}),
            client.submit("A", {}, track=False),
            client.submit("A", {}, track=False),
            return_exceptions=True,
        )
        assert not isinstance(tracked, BaseException) and await tracked.status() == "queued"
        assert isinstance(untracked, SubmitUnknown) and isinstance(other, SubmitUnknown)
        assert untracked.job_id != other.job_id
        assert (await client.status()).lanes["normal"].queued == 3


async def test_who_finds_all_connections_in_use_waits_for_one(redis_server: RedisServer) -> None:
    """It used to be told that Redis cannot be reached."""
    door = AsyncDoor(connect_async(redis_server.url, max_connections=2))
    answers = await asyncio.gather(*(door.send([("PING",)]) for _ in range(40)))
    await door.close()
    assert answers == [[b"PONG"]] * 40


async def test_more_who_wait_than_listen(
    aclient: AsyncClient, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "EARS_MAX", 2)
    job = await aclient.submit("A", {})
    waits = [asyncio.create_task(aclient.result(job.id, 30)) for _ in range(5)]
    await await_until(lambda: redis_client.pubsub_numsub(KEYS.done(job.frame_id))[0][1] == 2)
    Hands(redis_client).fetch().settle(lambda name: ("C", 7))
    assert await asyncio.gather(*waits) == [7] * 5
    assert redis_client.pubsub_channels() == [] and aclient.link._ears == 0


async def test_closing_sends_what_waits(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    client = AsyncClient(Settings(redis_url=redis_server.url))
    task = asyncio.create_task(client.submit("A", {}))
    await asyncio.sleep(0)
    await client.close()
    assert (await task).created and len(frames(redis_client)) == 1


# ------------------------------------------------------------------ the app


def test_tasks_submit_with_checked_arguments(app: App, redis_client: redis.Redis) -> None:
    @app.task("EMAIL", priority="high", timeout=30)
    def send_email(to: str, subject: str = "") -> str:
        return f"{to}: {subject}"

    @app.task
    def plain(n: int) -> None: ...

    assert send_email("a", subject="s") == "a: s" and app.registry.names == ("EMAIL", "plain")
    send_email.submit(to="a")
    send_email.delay("b", subject="s")
    send_email.with_options(delay=5, idempotency_key="k").submit(to="c")
    handles = send_email.submit_many([{"to": "d"}, {"to": "e"}], max_retries=1)
    keyed = send_email.submit_many([({"to": "f"}, {"idempotency_key": "f"}), {"to": "g"}])
    app.submit("EMAIL", {"to": "h"}, priority="low")
    app.submit("ELSEWHERE", {"anything": 1})
    app.submit("plain", {"n": 1})
    app.submit_many([("EMAIL", {"to": "i"}), ("plain", {"n": 2})])
    assert len(handles) == 2 and keyed.created == 2
    high = [payload for _, _, payload in Hands(redis_client).fetch().jobs()]
    assert sorted(str(payload.get("to")) for payload in high if "to" in payload) == list("abdefghi")
    assert app.client.status().scheduled == 1
    with pytest.raises(ArgumentsError, match="no argument cc"):
        send_email.submit(to="a", cc="b")  # type: ignore[call-arg]
    with pytest.raises(ArgumentsError):
        app.submit("EMAIL", {"subject": "s"})
    nowhere = app.task("NOWHERE", priority="bulk")(lambda: None)
    with pytest.raises(UnknownLane, match="'bulk'"):
        nowhere.submit()
    with pytest.raises(InvalidOption, match="prio is not an option"):
        send_email.with_options(prio=1).submit(to="a")


async def test_async_methods_of_tasks_and_apps(app: App) -> None:
    @app.task("EMAIL", track=False)
    async def send_email(to: str) -> None: ...

    assert (await send_email.asubmit(to="a")).tracked is False
    assert (await send_email.with_options(track=True).asubmit(to="a")).tracked
    assert len(await send_email.asubmit_many([{"to": "a"}])) == 1
    assert len(await send_email.with_options(priority="low").asubmit_many([{"to": "a"}])) == 1
    assert (await app.asubmit("EMAIL", {"to": "b"})).created
    assert len(await app.asubmit_many([("EMAIL", {"to": "c"})])) == 1
    assert (await app.async_client.status()).lanes["low"].queued == 1
    await app.aclose()


async def test_a_blocking_submit_in_a_loop_warns_once(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_warned", False)
    with pytest.warns(UserWarning, match=r"await app\.asubmit"):
        app.submit("A", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        app.submit("A", {})


def test_a_forked_child_gets_a_client_of_its_own(app: App, redis_client: redis.Redis) -> None:
    app.submit("A", {"who": "parent"})
    parents = app.client
    pid = os.fork()
    if pid == 0:
        try:
            ok = app.submit("A", {"who": "child"}).created and app.client is not parents
        except BaseException:
            ok = False
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    app.submit("A", {"who": "parent again"})
    assert app.client is parents and app.client.status().lanes["normal"].queued == 3


def test_threads_share_a_client(app: App) -> None:
    def work() -> None:
        for _ in range(50):
            app.submit("A", {})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert app.client.status().lanes["normal"].queued == 200


def test_without_an_address_the_embedded_server_is_used(tmp_path: Any) -> None:
    # This handle's keeper ends soon after its last user; the app is the second user of the same server.
    with embedded.ensure(tmp_path, linger_s=0.05):
        app = App(data_dir=str(tmp_path))
        handle = app.submit("A", {})
        assert handle.status() == "queued"

        async def twin() -> str:
            status = (await app.async_client.job(handle.id)).status
            await app.aclose()
            return status

        assert asyncio.run(twin()) == "queued"
        app.close()


def test_an_app_reads_its_settings_late_and_takes_merged_ones_before_it_connects(
    redis_server: RedisServer,
) -> None:
    app = App(lease_ms=5_000)
    assert app.code_settings == {"lease_ms": 5_000} and app.settings.lease_ms == 5_000
    app.configure(Settings(redis_url=redis_server.url, lease_ms=7_000))
    assert app.settings.lease_ms == 7_000
    app.submit("A", {})
    with pytest.raises(SettingsError, match="connected already"):
        app.configure(Settings())
    app.close()
    with pytest.raises(SettingsError, match="leas_ms"):
        App(leas_ms=1).submit("A", {})


def test_registration_and_hooks() -> None:
    app = App()

    @app.task("A")
    def a() -> None: ...

    with pytest.raises(RegistrationError, match="registered twice"):
        app.task("A")(lambda: None)
    with pytest.raises(RegistrationError, match="is a task already"):
        app.task("B")(a)
    with pytest.raises(RegistrationError, match="retries is not an option"):
        app.task("B", retries=3)(lambda: None)
    ran: list[str] = []

    @app.on_worker_start
    def first() -> None:
        ran.append("first")

    app.on_worker_start(lambda: ran.append("second"))
    app.on_worker_stop(lambda: ran.append("last"))
    app.on_worker_stop(lambda: ran.append("before"))
    app.run_start_hooks()
    app.run_stop_hooks()
    assert ran == ["first", "second", "before", "last"]

    async def late() -> None: ...

    with pytest.raises(RegistrationError, match="async"):
        app.on_worker_start(late)


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("", "no_colon", "write module:attribute"),
        ("", "missing_module_x:app", "there is no module missing_module_x"),
        ("import missing_module_y", "{name}:app", "missing_module_y"),
        ("1/0", "{name}:app", r"ZeroDivisionError: division by zero \(.*:1\)"),
        ("raise SystemExit(3)", "{name}:app", "SystemExit: 3"),
        ("def", "{name}:app", "SyntaxError"),
        ("x = 1", "{name}:app", "has no attribute app"),
        ("app = 1", "{name}:app", "is no App, but int"),
    ],
)
def test_an_app_that_cannot_be_imported_is_explained(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, text: str, path: str, says: str
) -> None:
    name = f"user_app_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AppImportError, match=says):
        load_app(path.format(name=name))


def test_an_app_is_found_in_the_current_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_app_good.py").write_text("from tqe import App\nclass a:\n    app = App('found')\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert load_app("user_app_good:a.app").name == "found"
