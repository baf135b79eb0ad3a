"""Owns real queues for tests: a private Redis that goes away with them, and workers forked from the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final

from tqe import clock
from tqe.app import App
from tqe.errors import QueueStuck, RegistrationError
from tqe.settings import Settings, override
from tqe.store import embedded, housekeeping, reading
from tqe.supervisor import affinity, lifecycle, process
from tqe.telemetry import logs

LINGER_S: Final = 0.5  # for the embedded server, once its last user is gone
POLL_S: Final = 0.005
STOP_S: Final = 30.0

_numbers: Final = count(1)


@contextlib.contextmanager
def private_redis(folder: Path | str) -> Iterator[str]:
    """The URL of a Redis of one's own with its data in `folder`. It ends soon after us, however we end."""
    with embedded.ensure(folder, linger_s=LINGER_S) as server:
        yield server.url


@contextlib.contextmanager
def queue(app: App, redis_url: str, **settings: Any) -> Iterator[Queue]:
    """Meanwhile `app` submits to an empty queue of its own on that Redis; further settings count as well.

    Retries come at once unless a setting or the task says otherwise.
    """
    given = {
        "redis_url": redis_url,
        "namespace": f"test-{os.getpid()}-{next(_numbers)}",
        "procs": 1,
        "pin": False,
        "backoff_base_ms": 1,
        "log_level": "warning",
        **settings,
    }
    merged = override(app.settings, given)
    with app.replaced(merged):
        yield Queue(app, merged)


class Queue:
    """An app's queue in a test. Workers run only inside of `worker()` and of `drain()`.

    They are forked from the test, so they see what it has defined and patched by then, and what they change
    in memory the test does not see.
    """

    def __init__(self, app: App, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self._pid = 0

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        """Workers that run beside the test; at the end they finish what they have begun."""
        if self._pid:
            raise RegistrationError("a worker of this queue runs already")
        self._pid = self._fork()
        try:
            yield
        finally:
            pid, self._pid = self._pid, 0
            if not process.end(pid, timeout_s=STOP_S):
                process.kill_group(pid)
                process.wait_for(pid)

    def drain(self, timeout: float = 30.0) -> None:
        """Run what there is, and what that submits, until no job is left. QueueStuck after `timeout` seconds:
        also jobs that wait for their time count as left."""
        with contextlib.nullcontext() if self._pid else self.worker():
            deadline_ns = clock.monotonic_ns() + int(timeout * 1e9)
            quiet = 0
            while quiet < 2:  # a lease may change hands while the first look lists them
                self._look(deadline_ns, timeout)
                quiet = quiet + 1 if self._is_quiet() else 0
                time.sleep(POLL_S)

    async def adrain(self, timeout: float = 30.0) -> None:
        """`drain` for async tests."""
        # Forked here: the kernel ends workers with the thread that forked them.
        with contextlib.nullcontext() if self._pid else self.worker():
            await asyncio.to_thread(self.drain, timeout)

    # -------------------------------------------------------------- what is left

    def _is_quiet(self) -> bool:
        client = self.app.client
        return housekeeping.is_quiet(client.link.door(), client.core.keys, self.settings.lanes)

    def _look(self, deadline_ns: int, timeout_s: float) -> None:
        """Raises if it makes no sense to wait any longer."""
        if process.has_ended(self._pid):
            raise QueueStuck("the workers ended before all jobs had; what they said stands above")
        if clock.monotonic_ns() > deadline_ns:
            raise QueueStuck(f"not all jobs ended within {timeout_s:g} s: {_left(self.app.client.status())}")

    # -------------------------------------------------------------- workers

    def _fork(self) -> int:
        if threading.current_thread() is not threading.main_thread():
            raise RegistrationError(
                "workers are started from the main thread: elsewhere no process can be forked"
            )
        with warnings.catch_warnings():
            # Newer Pythons warn of any fork beside threads; the child uses none of their things.
            warnings.simplefilter("ignore", DeprecationWarning)
            return process.fork(self._supervise, name="supervisor", supervises=True)

    def _supervise(self) -> int:
        # Not imported before the fork: it has been, here.
        settings = override(self.settings, {"preload": False})
        logs.configure(level=settings.log_level, style=settings.log_format)
        return lifecycle.run(
            "the app of the test",
            settings,
            lambda _: self.app,
            redis_url=settings.redis_url or "",
            pins=affinity.plan(settings.procs, pin=False),
        )


def _left(status: reading.QueueStatus) -> str:
    waiting = [f"{lane.queued} in lane {name}" for name, lane in status.lanes.items() if lane.queued]
    waiting += [f"{status.scheduled} wait for their time"] if status.scheduled else []
    return ", ".join(waiting) or "the last one runs"
