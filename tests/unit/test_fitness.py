"""What INFO says about a server, and what errors of a client mean, each as one sentence."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
import redis
from redis import exceptions

from tqe.errors import RedisUnavailable, ServerUnfit
from tqe.store.fitness import check, explain, redact, require_fit, require_fit_async

GOOD: Mapping[str, Any] = {
    "redis_version": "8.2.3",
    "role": "master",
    "maxmemory_policy": "noeviction",
    "maxmemory": 0,
    "used_memory": 1_000_000,
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "loading": 0,
    "tcp_port": 6379,
}


def found(**changes: Any) -> list[tuple[str, str]]:
    return [(finding.level, finding.code) for finding in check({**GOOD, **changes})]


def test_a_good_server_has_no_findings() -> None:
    assert check(GOOD) == []
    assert check({field: str(value) for field, value in GOOD.items()}) == []  # not parsed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"redis_version": "6.0.16"}, [("error", "version")]),
        ({"redis_version": "5.0"}, [("error", "version")]),
        ({"redis_version": "6.2.19"}, [("warning", "cve")]),
        ({"redis_version": "6.2.14", "tcp_port": 0}, [("note", "cve")]),
        ({"redis_version": "6.2.20"}, []),
        ({"redis_version": "7.0.15"}, [("warning", "cve")]),  # a line that was never fixed
        ({"redis_version": "8.0.3"}, [("warning", "cve")]),
        ({"redis_version": "8.4.0"}, []),
        ({"redis_version": "10.0.0"}, []),
        ({"redis_version": ""}, [("warning", "version")]),
        # Valkey says 7.2.4 for compatibility, which would be judged as an old Redis.
        ({"redis_version": "7.2.4", "valkey_version": "8.1.4"}, []),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.5"}, [("warning", "cve")]),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.0"}, []),
        ({"redis_version": "7.4.0", "dragonfly_version": "df-v1.27.1"}, [("warning", "product")]),
        ({"role": "slave", "master_host": "10.0.0.1"}, [("error", "role")]),
        ({"maxmemory_policy": "allkeys-lru"}, [("error", "eviction")]),
        ({"maxmemory_policy": "volatile-ttl"}, [("error", "eviction")]),
        ({"maxmemory_policy": ""}, [("warning", "eviction")]),
        ({"aof_enabled": 0}, [("warning", "aof")]),
        ({"aof_last_write_status": "err"}, [("warning", "disk")]),
        ({"rdb_last_bgsave_status": "err"}, [("warning", "disk")]),
        ({"loading": 1}, [("error", "loading")]),
        ({"maxmemory": 1_250_000}, [("warning", "memory")]),
        ({"maxmemory": 1_250_001}, []),
        ({"maxmemory": "unlimited"}, []),
    ],
)
def test_each_finding(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert found(**changes) == expected


def test_the_worst_comes_first() -> None:
    levels = [level for level, _ in found(aof_enabled=0, role="slave", redis_version="6.2.1", tcp_port=0)]
    assert levels == ["error", "warning", "note"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "CONFIG SET maxmemory-policy noeviction"),
        ({"redis_version": "5.0.7"}, "Redis 5.0.7 and 6.2 or newer is needed: upgrade it"),
        ({"role": "slave", "master_host": "db1", "master_port": 7000}, "connect to its master (db1:7000)"),
        ({"aof_enabled": 0}, "CONFIG SET appendonly yes"),
    ],
)
def test_the_text_says_what_to_do(changes: dict[str, Any], words: str) -> None:
    assert words in check({**GOOD, **changes})[0].text


class Client:
    """Stands for a client whose `info()` gives or raises this."""

    def __init__(self, answer: Mapping[str, Any] | Exception) -> None:
        self.answer = answer

    def info(self) -> Mapping[str, Any]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class AsyncClient(Client):
    async def info(self) -> Mapping[str, Any]:  # type: ignore[override]
        return super().info()


def test_require_fit_returns_info_or_raises_all_errors_in_one() -> None:
    assert require_fit(Client({**GOOD, "aof_enabled": 0}))["aof_enabled"] == 0  # a warning forbids nothing
    bad = {**GOOD, "role": "slave", "maxmemory_policy": "allkeys-lfu"}
    with pytest.raises(ServerUnfit, match=r"at redis://:\*\*\*@h cannot be used: .*replica.*allkeys-lfu"):
        require_fit(Client(bad), url="redis://:secret@h")
    with pytest.raises(RedisUnavailable, match="still loading"):
        require_fit(Client({**GOOD, "loading": 1}))


def test_require_fit_async_is_the_same() -> None:
    assert asyncio.run(require_fit_async(AsyncClient(GOOD))) == GOOD
    with pytest.raises(ServerUnfit, match="allkeys-lru"):
        asyncio.run(require_fit_async(AsyncClient({**GOOD, "maxmemory_policy": "allkeys-lru"})))
    with pytest.raises(RedisUnavailable, match="cannot be reached"):
        asyncio.run(require_fit_async(AsyncClient(redis.ConnectionError("refused"))))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            exceptions.AuthenticationError("invalid username-password pair"),
            ServerUnfit,
            "check user and password",
        ),
        (exceptions.AuthenticationError("Authentication required."), ServerUnfit, "check user and password"),
        (exceptions.ResponseError("NOAUTH Authentication required."), ServerUnfit, "check user and password"),
        (exceptions.ResponseError("WRONGPASS invalid"), ServerUnfit, "check user and password"),
        (exceptions.NoPermissionError("this user has no permissions"), ServerUnfit, "ACL"),
        (exceptions.ReadOnlyError("You can't write against a read only replica."), ServerUnfit, "master"),
        (
            exceptions.ResponseError("DENIED Redis is running in protected mode"),
            ServerUnfit,
            "protected mode",
        ),
        (exceptions.BusyLoadingError("loading"), RedisUnavailable, "still loading"),
        (exceptions.MaxConnectionsError("max number of clients reached"), RedisUnavailable, "maxclients"),
        (exceptions.TimeoutError("Timeout connecting"), RedisUnavailable, "does not answer in time"),
        (TimeoutError("timed out"), RedisUnavailable, "does not answer in time"),
        (
            exceptions.ConnectionError("Error 111 connecting to h:6379. Connection refused."),
            RedisUnavailable,
            "cannot be reached",
        ),
        (OSError(2, "No such file or directory"), RedisUnavailable, "cannot be reached"),
        (exceptions.ResponseError("MISCONF stop"), RedisUnavailable, "answered with an error: MISCONF stop"),
    ],
)
def test_errors_of_a_client_are_one_clear_sentence(error: Exception, kind: type, words: str) -> None:
    explained = explain(error, url="redis://h")
    assert type(explained) is kind
    assert words in str(explained) and "redis://h" in str(explained) and "\n" not in str(explained)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:secret@h:6379/0", "redis://:***@h:6379/0"),
        ("rediss://user:secret@h", "rediss://user:***@h"),
        ("redis://secret@h", "redis://:***@h"),
        ("redis://:sec/r@e?t@h/0", "redis://:***@h/0"),
        ("redis://h/0?password=secret&db=1", "redis://h/0?password=***&db=1"),
        ("redis://h/0?ssl_keyfile_PASSWORD=secret", "redis://h/0?ssl_keyfile_PASSWORD=***"),
        ("unix:///run/r.sock?db=0", "unix:///run/r.sock?db=0"),
        ("unix:///home/a@b/r.sock", "unix:///home/a@b/r.sock"),
        ("unix://user:secret@/run/r.sock", "unix://user:***@/run/r.sock"),
        ("user:secret@h", "***"),
        ("", ""),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_no_password_is_shown_when_a_library_quotes_it() -> None:
    error = redis.ConnectionError("cannot parse 'p w@1' or p%20w%401")
    text = str(explain(error, url="redis://:p%20w%401@h"))
    assert "p w@1" not in text and "p%20w" not in text and "***" in text
