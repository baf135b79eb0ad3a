"""Owns what a campaign does to a real redis-server: each deed is on the fault timeline, start and end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from tests.chaos.journal import FaultLog, now_ns
from tests.support.redis_server import RedisServer


class RedisFaults:
    """Faults of one server. Call from the main thread: a server dies with the thread that started it."""

    def __init__(self, server: RedisServer, log: FaultLog) -> None:
        self.server = server
        self.log = log

    def kill(self, down_s: float = 0.0) -> None:
        """kill -9, stay down, start again over the same AOF; returns when it answers."""
        began, pid = now_ns(), self.server.pid
        self.server.kill()
        time.sleep(down_s)
        self.server.start()
        self.log.record("redis_kill", t_ns=began, until_ns=now_ns(), pid=pid, down_s=down_s)

    def pause(self, stopped_s: float) -> None:
        """Silent for a while, without a reset: connections stay, nothing answers, TIME goes on."""
        with self.paused():
            time.sleep(stopped_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = now_ns()
        self.server.pause()
        try:
            yield
        finally:
            self.server.resume()
            self.log.record("redis_stop", t_ns=began, until_ns=now_ns(), pid=self.server.pid)

    def flush_scripts(self) -> None:
        """No re-run may come of it, so it is not of the kinds that the checker accepts as a cause."""
        with contextlib.closing(self.server.client()) as client:
            client.script_flush()
        self.log.record("script_flush")

    def kill_clients(self) -> int:
        """Reset every connection but our own."""
        began = now_ns()
        with contextlib.closing(self.server.client()) as client:
            killed = sum(client.client_kill_filter(_type=kind) for kind in ("normal", "pubsub"))
        self.log.record("net_reset", t_ns=began, until_ns=now_ns(), connections=killed)
        return int(killed)
