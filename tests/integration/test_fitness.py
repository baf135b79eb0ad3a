"""Real servers that may not be used, and why."""

import contextlib
import socket
from collections.abc import Callable

import pytest
import redis

from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.errors import RedisUnavailable, ServerUnfit
from tqe.store.fitness import check, require_fit

Make = Callable[..., RedisServer]


def test_every_version_that_we_support_is_fit(any_redis: RedisServer) -> None:
    with contextlib.closing(any_redis.client()) as client:
        info = require_fit(client, url=any_redis.url)
    assert [finding for finding in check(info) if finding.level != "note"] == []


def test_an_evicting_policy_is_refused(redis_server: RedisServer) -> None:
    with contextlib.closing(redis_server.client()) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ServerUnfit, match=r"allkeys-lru.*CONFIG SET maxmemory-policy noeviction"):
            require_fit(client)


def test_a_replica_is_refused(make_redis: Make, redis_server: RedisServer) -> None:
    server = make_redis()
    with contextlib.closing(server.client()) as client:
        client.replicaof("127.0.0.1", 1)
        wait_until(lambda: client.info("replication")["role"] == "slave")
        with pytest.raises(ServerUnfit, match=r"read-only replica: connect to its master \(127\.0\.0\.1:1\)"):
            require_fit(client)


def test_a_wrong_password_is_named_and_never_shown(make_redis: Make) -> None:
    server = make_redis()
    with contextlib.closing(server.client()) as admin:
        admin.config_set("requirepass", "right")
    for login in ("", ":w5r8ongpw@", "nobody:w5r8ongpw@"):
        url = f"unix://{login}{server.socket}"
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            with pytest.raises(ServerUnfit, match="check user and password in the URL") as caught:
                require_fit(client, url=url)
            assert "w5r8ongpw" not in str(caught.value)


def test_a_server_that_is_not_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        url = f"redis://:w5r8ongpw@127.0.0.1:{taken.getsockname()[1]}/0"
        with contextlib.closing(redis.Redis.from_url(url, socket_timeout=2, retry=None)) as client:
            with pytest.raises(RedisUnavailable, match=r"cannot be reached.*is it running") as caught:
                require_fit(client, url=url)
            assert "w5r8ongpw" not in str(caught.value)
