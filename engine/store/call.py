"""Owns how a script call reaches Redis and what its errors mean; nothing here repeats a call by itself.

A repeat is a decision about jobs (may this have been applied?), so it belongs to whoever made the call:
redis-py's own retry, ten times by default and timeouts included, is switched off. The one exception is
NOSCRIPT: Redis says that nothing was applied, so the same call goes out again as EVAL, which also caches the
text. Scripts are never loaded by a command of its own, since careful ACLs deny it.
"""

import asyncio
import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from tqe import codec
from tqe.errors import LeaseLost, QueueFull, RedisUnavailable, ScriptError, TQEError
from tqe.store.scripts import SCRIPTS

CONNECTIONS_MAX: Final = 64  # of one client

Argument = bytes | str | int | float
Reply = Any

# Redis refused before it did anything. The last line needs an administrator, the others pass.
_NOT_APPLIED: Final = frozenset(
    (
        *("LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "NOSCRIPT"),
        *("READONLY", "MISCONF", "NOAUTH", "WRONGPASS", "NOPERM"),
    )
)
# Redis 6.2 puts an error that a command raised inside a script behind its own text: `ERR Error running script
# (call to f_…): @user_script:1: @user_script: 1: -MISCONF Errors …`. All of those above that a command can
# raise are refusals of a script's first write, so they mean the same there.
_WRAPPED: Final = re.compile(r"^ERR Error running script.*? -([A-Z]+) ", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a script: its name, and KEYS and ARGV as its header says."""

    script: str
    keys: tuple[bytes, ...]
    args: tuple[Argument, ...]

    def evalsha(self) -> tuple[Argument, ...]:
        """The command as it is sent first."""
        return ("EVALSHA", SCRIPTS[self.script].sha, len(self.keys), *self.keys, *self.args)

    def eval(self) -> tuple[Argument, ...]:
        """The command as it is sent after NOSCRIPT."""
        return ("EVAL", SCRIPTS[self.script].text, len(self.keys), *self.keys, *self.args)


def reply_error(text: str, script: str = "") -> TQEError:
    """What an error reply of Redis means, by its first word; `text` is the reply without its leading `-`."""
    code, _, rest = text.partition(" ")
    if wrapped := _WRAPPED.match(text):
        code = wrapped[1]
    if code == "LEASE":
        return LeaseLost(rest)
    if code in ("FULL", "OOM"):
        return QueueFull(rest)
    if code in _NOT_APPLIED:
        return RedisUnavailable(f"Redis refused: {text}", applied=False)
    return ScriptError(text, script)


def unreachable(cause: Exception, *, sent: bool) -> RedisUnavailable:
    """What a missing reply means: nothing was applied if nothing was sent, else nobody knows."""
    what = "did not answer" if sent else "cannot be reached"
    return RedisUnavailable(f"Redis {what}: {cause}", applied=None if sent else False)


def _options(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "retry_on_timeout": False,
        "decode_responses": False,
        "protocol": 2,
    }


def connect(url: str, *, timeout_s: float = 5.0, max_connections: int = CONNECTIONS_MAX) -> redis.Redis:
    """A client that answers in bytes, gives up after `timeout_s` and never repeats a command by itself."""
    options = _options(timeout_s)
    if url.startswith("unix:"):
        del options["socket_keepalive"]
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), max_connections=max_connections, **options)


def connect_async(
    url: str, *, timeout_s: float = 5.0, max_connections: int = CONNECTIONS_MAX
) -> redis.asyncio.Redis:
    """The same for asyncio. Who finds all connections in use waits for one, in turn: the usual pool raises,
    which looks like a Redis that is away."""
    options = _options(timeout_s)
    if url.startswith("unix:"):
        del options["socket_keepalive"]
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        retry=AsyncRetry(NoBackoff(), 0),
        max_connections=max_connections,
        timeout=timeout_s,
        **options,
    )
    return redis.asyncio.Redis.from_pool(pool)


# redis-py takes the code off the errors that it knows.
_CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (redis.exceptions.NoScriptError, "NOSCRIPT"),
    (redis.exceptions.OutOfMemoryError, "OOM"),
    (redis.exceptions.BusyLoadingError, "LOADING"),
    (redis.exceptions.ReadOnlyError, "READONLY"),
    (redis.exceptions.MasterDownError, "MASTERDOWN"),
    (redis.exceptions.ClusterDownError, "CLUSTERDOWN"),
    (redis.exceptions.TryAgainError, "TRYAGAIN"),
    (redis.exceptions.NoPermissionError, "NOPERM"),
    (redis.exceptions.AuthenticationError, "NOAUTH"),
)


def _text(error: Exception) -> str:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return f"{code} {error}"
    text = str(error)
    return text if text.partition(" ")[0].isupper() else f"ERR {text}"


class _NoScript(TQEError):
    """Redis does not know the script (any more): nothing was applied."""


def _judge(answer: Reply, script: str) -> Reply:
    """One reply of a pipeline, by itself: as it is, or as the exception that it means."""
    if not isinstance(answer, redis.ResponseError):
        return answer
    if isinstance(answer, redis.exceptions.NoScriptError):
        return _NoScript(script)
    return reply_error(_text(answer), script)


def _broken(answers: list[Reply], size: int, cause: Exception) -> list[Reply]:
    """Fill up with what is true of commands that were sent and whose replies did not come."""
    if isinstance(cause, redis.exceptions.BusyLoadingError | redis.exceptions.AuthenticationError):
        answers.append(reply_error(_text(cause)))
    answers += [unreachable(cause, sent=True) for _ in range(size - len(answers))]
    return answers


def _one(answers: Sequence[Reply]) -> Reply:
    (answer,) = answers
    if isinstance(answer, TQEError):
        raise answer
    return answer


Commands = Sequence[tuple[Argument, ...]]
_PIECE_BYTES: Final = 8 * 1024


def pieces(arguments: tuple[Argument, ...]) -> list[bytes]:
    """A command as it goes over the wire, in pieces, so that a large argument need not be copied."""
    found = [b"*%d\r\n" % len(arguments)]
    start = 0
    for at, argument in enumerate(arguments):
        if type(argument) is bytes and len(argument) >= _PIECE_BYTES:
            found.append(_joined(arguments[start:at], b"$%d\r\n" % len(argument)))
            found += (argument, b"\r\n")
            start = at + 1
    found.append(_joined(arguments[start:], b""))
    return found


def _joined(arguments: tuple[Argument, ...], behind: bytes) -> bytes:
    """Arguments as they go over the wire, without the count that stands before a whole command."""
    if not arguments:
        return behind
    packed = codec.pack_command(arguments)
    return packed[packed.index(b"\n") + 1 :] + behind


class Begun:
    """A call that was sent and whose answer was not read; or `failure`, the reason why it could not be
    sent."""

    __slots__ = ("call", "connection", "failure")

    def __init__(self, call: Call, connection: Any, failure: TQEError | None = None) -> None:
        self.call = call
        self.connection = connection
        self.failure = failure


class SyncDoor:
    """Runs calls through a `redis.Redis`, of which it takes no more than the connections."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.heard = 0  # answers that `send` has read

    def run(self, call: Call) -> Reply:
        """The reply of one call. Raises LeaseLost, QueueFull, RedisUnavailable or ScriptError."""
        return _one(self.run_many((call,)))

    def run_many(self, calls: Sequence[Call]) -> list[Reply | TQEError]:
        """One write for all calls, no transaction; a call that failed has its exception as its answer."""
        answers = self.send([call.evalsha() for call in calls], [call.script for call in calls])
        again = [at for at, answer in enumerate(answers) if isinstance(answer, _NoScript)]
        if again:
            texts = self.send([calls[at].eval() for at in again], [calls[at].script for at in again])
            for at, answer in zip(again, texts, strict=True):
                answers[at] = answer
        return answers

    def send(self, commands: Commands, scripts: Sequence[str] = ()) -> list[Reply | TQEError]:
        """Plain commands in one write; each answer is a reply or the exception that it means."""
        pool = self.client.connection_pool
        try:
            connection: Any = pool.get_connection()
        except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
            return [unreachable(e, sent=False) for _ in commands]
        except redis.ResponseError as e:  # the greeting was refused
            return [reply_error(_text(e)) for _ in commands]
        answers: list[Reply | TQEError] = []
        try:
            connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            while len(answers) < len(commands):
                try:
                    answer = connection.read_response(disconnect_on_error=True)
                except redis.ResponseError as e:
                    answer = e
                answers.append(_judge(answer, scripts[len(answers)] if scripts else ""))
            self.heard += len(answers)
        except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
            connection.disconnect()
            _broken(answers, len(commands), e)
        except BaseException:
            # Replies may still be on their way: the next user of this connection would read them as its own.
            connection.disconnect()
            raise
        finally:
            pool.release(connection)
        return answers

    def begin(self, call: Call, packed: list[bytes] | None = None) -> Begun:
        """Send one call and leave its answer for `finish`, which must follow, or `abandon`."""
        pool = self.client.connection_pool
        try:
            connection: Any = pool.get_connection()
        except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
            return Begun(call, None, unreachable(e, sent=False))
        except redis.ResponseError as e:  # the greeting was refused
            return Begun(call, None, reply_error(_text(e)))
        begun = Begun(call, connection)
        try:
            connection.send_packed_command(packed or [codec.pack_command(call.evalsha())], check_health=False)
        except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
            self.abandon(begun)
            (begun.failure,) = _broken([], 1, e)
        except BaseException:
            self.abandon(begun)
            raise
        return begun

    def finish(self, begun: Begun) -> Reply:
        """The reply of a call that was begun. Raises as `run` does."""
        if begun.failure is not None:
            raise begun.failure
        connection, begun.connection = begun.connection, None
        try:
            return connection.read_response(disconnect_on_error=True)
        except redis.ResponseError as e:
            answer = _judge(e, begun.call.script)
        except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
            connection.disconnect()
            (answer,) = _broken([], 1, e)
        except BaseException:
            connection.disconnect()  # as in `send`
            raise
        finally:
            self.client.connection_pool.release(connection)
        if isinstance(answer, _NoScript):
            (answer,) = self.send([begun.call.eval()], [begun.call.script])
        return _one([answer])

    def abandon(self, begun: Begun) -> None:
        """Forget a call that was begun: it may have been applied."""
        if begun.connection is not None:
            begun.connection.disconnect()
            self.client.connection_pool.release(begun.connection)
            begun.connection = None


class AsyncDoor:
    """The same through a `redis.asyncio.Redis`."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client = client

    async def run(self, call: Call) -> Reply:
        """The reply of one call. Raises LeaseLost, QueueFull, RedisUnavailable or ScriptError."""
        return _one(await self.run_many((call,)))

    async def begin(self, call: Call) -> Awaitable[Reply]:
        """Send one call; what is returned is awaited for its reply, and raises as `run` does."""
        answer = asyncio.ensure_future(self.run(call))
        await asyncio.sleep(0)
        return answer

    async def close(self) -> None:
        """Disconnect."""
        await self.client.aclose()

    async def run_many(self, calls: Sequence[Call]) -> list[Reply | TQEError]:
        """One write for all calls, no transaction; a call that failed has its exception as its answer."""
        answers = await self.send([call.evalsha() for call in calls], [call.script for call in calls])
        again = [at for at, answer in enumerate(answers) if isinstance(answer, _NoScript)]
        if again:
            texts = await self.send([calls[at].eval() for at in again], [calls[at].script for at in again])
            for at, answer in zip(again, texts, strict=True):
                answers[at] = answer
        return answers

    async def send(self, commands: Commands, scripts: Sequence[str] = ()) -> list[Reply | TQEError]:
        """Plain commands in one write; each answer is a reply or the exception that it means."""
        pool: Any = self.client.connection_pool
        try:
            connection = await pool.get_connection()
        except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
            return [unreachable(e, sent=False) for _ in commands]
        except redis.ResponseError as e:  # the greeting was refused
            return [reply_error(_text(e)) for _ in commands]
        answers: list[Reply | TQEError] = []
        try:
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            while len(answers) < len(commands):
                try:
                    answer = await connection.read_response(disconnect_on_error=True)
                except redis.ResponseError as e:
                    answer = e
                answers.append(_judge(answer, scripts[len(answers)] if scripts else ""))
        except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
            await connection.disconnect(nowait=True)
            _broken(answers, len(commands), e)
        except BaseException:
            # Replies may still be on their way: the next user of this connection would read them as its own.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)
        return answers
