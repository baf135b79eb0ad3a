"""Carries out steps over a connection, in a sync and in an async way; connects when first used."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Sequence
from typing import Any, Final

import redis
import redis.asyncio

from tqe import clock
from tqe.errors import RedisUnavailable, TQEError
from tqe.settings import Settings
from tqe.store import embedded, fitness
from tqe.store.call import (
    CONNECTIONS_MAX,
    AsyncDoor,
    Begun,
    Call,
    Reply,
    SyncDoor,
    connect,
    connect_async,
    pieces,
    unreachable,
)
from tqe.store.doors import AsyncProducerDoor, ProducerDoor, speaks
from tqe.store.steps import Begin, Finish, Hear, Listen, Pause, Reads, Step, Steps, T

LOADING_PATIENCE_S: Final = 60.0
_LOADING_PAUSE_S: Final = 0.1
_CONFIRM_S: Final = 5.0
EARS_MAX: Final = CONNECTIONS_MAX * 3 // 4  # each holds a connection; the others are for who only reads


class _Server:
    """Which Redis it is: the one of the settings, else the embedded one, started if need be."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._embedded: embedded.EmbeddedServer | None = None

    def url(self) -> str:
        if self._settings.redis_url is not None:
            return self._settings.redis_url
        if self._embedded is None:
            self._embedded = embedded.ensure(self._settings.data_dir)
        return self._embedded.url

    def revive(self) -> None:
        """After a lost connection: an embedded server whose keeper was killed comes back only if asked."""
        if self._embedded is not None:
            with contextlib.suppress(TQEError):  # whoever tries next will tell
                self._embedded.revive()

    def close(self) -> None:
        if self._embedded is not None:
            self._embedded.close()
            self._embedded = None


def _is_loading(error: RedisUnavailable) -> bool:
    return "loading" in str(error)


def _checked(answers: Sequence[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, TQEError):
            raise answer
    return list(answers)


class SyncLink:
    """Runs procedures one after another in each thread; threads share it and its pool of connections."""

    def __init__(self, settings: Settings) -> None:
        self._server = _Server(settings)
        self._lock = threading.Lock()
        self._door: SyncDoor | None = None

    def door(self) -> SyncDoor:
        """Connected, and to a server that may be used. Raises RedisUnavailable or ServerUnfit."""
        with self._lock:
            if self._door is None:
                url = self._server.url()
                client = connect(url)
                deadline_ns = clock.monotonic_ns() + int(LOADING_PATIENCE_S * 1e9)
                while True:
                    try:
                        fitness.require_fit(client, url=url)
                        break
                    except RedisUnavailable as e:
                        if not _is_loading(e) or clock.monotonic_ns() > deadline_ns:
                            raise
                    time.sleep(_LOADING_PAUSE_S)
                self._door = ProducerDoor(client)
            return self._door

    def run(self, steps: Steps[T]) -> T:
        """Carry out a procedure to its end; its result, or what it raised."""
        door = self.door()
        ear: Any = None
        begun: Begun | None = None
        answer: Any = None
        error: TQEError | None = None
        try:
            while True:
                try:
                    step: Step = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                answer = error = None
                try:
                    match step:
                        case Call():
                            answer = door.run(step)
                        case Begin():
                            begun = door.begin(step.call, pieces(step.call.evalsha()))
                        case Finish():
                            assert begun is not None
                            under_way, begun = begun, None
                            answer = door.finish(under_way)
                        case Reads():
                            answer = _checked(door.send(step.commands))
                        case Pause():
                            self._server.revive()
                            time.sleep(step.seconds)
                        case Listen():
                            ear = self._listen(door, ear, step)
                        case Hear():
                            answer = self._hear(ear, step)
                except TQEError as e:
                    error = e
        finally:
            steps.close()
            if begun is not None:
                door.abandon(begun)
            if ear is not None:
                ear.close()

    def _listen(self, door: SyncDoor, ear: Any, step: Listen) -> Any:
        try:
            if ear is None:
                ear = door.client.pubsub()  # type: ignore[no-untyped-call]
            ear.subscribe(step.channel)
            while (said := ear.get_message(timeout=_CONFIRM_S)) is not None:
                if said["type"] == "subscribe":
                    return ear
        except (redis.RedisError, OSError) as e:
            raise unreachable(e, sent=False) from e
        raise RedisUnavailable("Redis did not confirm a subscription", applied=False)

    def _hear(self, ear: Any, step: Hear) -> bool:
        try:
            return ear.get_message(timeout=step.seconds) is not None
        except (redis.RedisError, OSError) as e:
            # redis-py subscribes again by itself when it reconnects; what was said meanwhile is lost.
            raise unreachable(e, sent=False) from e

    def close(self) -> None:
        with self._lock:
            if self._door is not None:
                self._door.client.close()
                self._door = None
            self._server.close()


class AsyncLink:
    """The same inside of one event loop. Of those who wait for a message at the same moment `EARS_MAX`
    listen; the others hear nothing, and read again as often as anybody who wants to be sure."""

    def __init__(self, settings: Settings) -> None:
        self._server = _Server(settings)
        self._ears = 0
        self._opening: asyncio.Lock | None = None
        self._door: AsyncDoor | None = None

    async def door(self) -> AsyncDoor:
        """Connected, and to a server that may be used. Raises RedisUnavailable or ServerUnfit."""
        if self._door is not None:
            return self._door
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self._door is None:
                # In a thread: it may start a server, and waits for it.
                url = await asyncio.to_thread(self._server.url)
                client = connect_async(url)
                deadline_ns = clock.monotonic_ns() + int(LOADING_PATIENCE_S * 1e9)
                while True:
                    try:
                        await fitness.require_fit_async(client, url=url)
                        break
                    except RedisUnavailable as e:
                        if not _is_loading(e) or clock.monotonic_ns() > deadline_ns:
                            raise
                    await asyncio.sleep(_LOADING_PAUSE_S)
                self._door = AsyncProducerDoor(client, url) if speaks(url) else AsyncDoor(client)
            return self._door

    async def run(self, steps: Steps[T]) -> T:
        """Carry out a procedure to its end; its result, or what it raised."""
        door = await self.door()
        ear: Any = None
        begun: Awaitable[Reply] | None = None
        answer: Any = None
        error: TQEError | None = None
        try:
            while True:
                try:
                    step: Step = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                answer = error = None
                try:
                    match step:
                        case Call():
                            answer = await door.run(step)
                        case Begin():
                            begun = await door.begin(step.call)
                        case Finish():
                            assert begun is not None
                            under_way, begun = begun, None
                            answer = await under_way
                        case Reads():
                            answer = _checked(await door.send(step.commands))
                        case Pause():
                            await asyncio.to_thread(self._server.revive)
                            await asyncio.sleep(step.seconds)
                        case Listen():
                            if ear is None and self._ears < EARS_MAX:
                                ear = door.client.pubsub()
                                self._ears += 1
                            if ear is not None:
                                await self._listen(ear, step)
                        case Hear():
                            answer = await self._hear(ear, step)
                except TQEError as e:
                    error = e
        finally:
            steps.close()
            if begun is not None:
                asyncio.ensure_future(begun).cancel()
            if ear is not None:
                self._ears -= 1
                await ear.aclose()

    async def _listen(self, ear: Any, step: Listen) -> None:
        try:
            await ear.subscribe(step.channel)
            while (said := await ear.get_message(timeout=_CONFIRM_S)) is not None:
                if said["type"] == "subscribe":
                    return
        except (redis.RedisError, OSError) as e:
            raise unreachable(e, sent=False) from e
        raise RedisUnavailable("Redis did not confirm a subscription", applied=False)

    async def _hear(self, ear: Any, step: Hear) -> bool:
        if ear is None:
            await asyncio.sleep(step.seconds)
            return False
        try:
            return await ear.get_message(timeout=step.seconds) is not None
        except (redis.RedisError, OSError) as e:
            raise unreachable(e, sent=False) from e

    async def close(self) -> None:
        if self._door is not None:
            await self._door.close()
            self._door = None
        self._server.close()
