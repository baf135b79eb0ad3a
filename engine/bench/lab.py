"""Where runs take place: for each a Redis of its own, workers under a supervisor, producers as processes."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tqe import clock
from tqe.app import App
from tqe.bench import meters
from tqe.bench.ledger import Ledger
from tqe.bench.meters import Reading
from tqe.client import Client
from tqe.errors import TQEError
from tqe.settings import Settings
from tqe.store import embedded, reading
from tqe.supervisor import lifecycle, process
from tqe.telemetry import logs, procfs
from tqe.worker.ordering import Predictor

LANE: Final = "normal"
LINGER_S: Final = 0.1
PATIENCE_S: Final = 60.0  # without any progress
POLL_MIN_S: Final = 0.001
POLL_MAX_S: Final = 0.05
IDLE_SHARE: Final = 0.02  # of a CPU: workers that use less have finished starting
LOG_TAIL: Final = 600

Answer = dict[str, Any]
Produce = Callable[[App], Mapping[str, Any]]


class RunFailed(TQEError):
    """A run could not be carried out, so there is no figure. The text says what stood still or broke."""


class Lab:
    """What the runs of a session share. `scale` makes them smaller; `pulse` is called while one waits."""

    def __init__(
        self, folder: Path, *, app: App, ledger: Ledger, scale: float, pulse: Callable[[float], None]
    ) -> None:
        self.folder = folder
        self.app = app
        self.ledger = ledger
        self.scale = scale
        self.pulse = pulse
        self.cpus = os.sched_getaffinity(0)
        self.redis_version = ""
        self.foreign: list[float] = []  # of the run under way: part of the machine that others used
        self._stages = 0

    def size(self, jobs: int) -> int:
        """The number of jobs in this session, of those of a full run; whole frames."""
        return max(1_000, int(jobs * self.scale) // 1_000 * 1_000)

    def turns(self, count: int) -> int:
        """The same for what is counted one by one."""
        return max(20, int(count * self.scale))

    @contextmanager
    def stage(self) -> Iterator[Stage]:
        """An empty Redis; everything that was started on the stage is gone afterwards."""
        self._stages += 1
        self.ledger.clear()
        folder = self.folder / str(self._stages)
        stage = Stage(self, folder)
        try:
            stage.open()
            yield stage
        finally:
            stage.close()
            shutil.rmtree(folder, ignore_errors=True)


class Child:
    """A producer in a process of its own, which answers with one line of JSON."""

    def __init__(self, run: Callable[[], Mapping[str, Any]], log: Path) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)

        def tell() -> int:
            os.close(reader)
            _write_to(log)
            try:
                answer = dict(run())
            except TQEError as e:
                answer = {"failed": f"{type(e).__name__}: {e}"}
            with os.fdopen(writer, "wb") as stream:
                stream.write(json.dumps(answer).encode())
            return 0

        try:
            self.pid = process.fork(tell, name="producer")
        finally:
            os.close(writer)
        self._reader = reader
        self._text = b""
        self._over = False

    def ended(self, timeout_s: float) -> bool:
        """Whether it has answered; waits so long for it."""
        if not self._over and select.select([self._reader], [], [], timeout_s)[0]:
            part = os.read(self._reader, 65_536)
            self._text += part
            self._over = not part
        return self._over

    def answer(self) -> Answer:
        """What it found; RunFailed if it did not get so far."""
        while not self.ended(1.0):
            pass
        process.wait_for(self.pid)
        if not self._text:
            raise RunFailed("a producer ended without an answer")
        found: Answer = json.loads(self._text)
        if "failed" in found:
            raise RunFailed(f"a producer failed: {found['failed']}")
        return found

    def close(self) -> None:
        if not self._over:
            process.kill_group(self.pid)
            process.wait_for(self.pid)
        os.close(self._reader)


class Stage:
    """One run: server, workers, producers, and the clocks that watch them."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.log = folder / "log"
        self._folder = folder
        self._server: embedded.EmbeddedServer | None = None
        self._observer: Client | None = None
        self._supervisor = 0
        self._producers: list[Child] = []
        self.workers: list[int] = []

    # -------------------------------------------------------------- up and down

    def open(self) -> None:
        self._folder.mkdir(parents=True)
        self._server = embedded.ensure(self._folder, linger_s=LINGER_S)
        self.lab.redis_version = self.server.version

    def close(self) -> None:
        for child in self._producers:
            child.close()
        self.stop()
        self._unwatch()
        if self._server is not None:
            pid = self._server.pid
            self._server.close()
            until(lambda: procfs.state(pid) in ("", "Z"), 20.0)

    @property
    def server(self) -> embedded.EmbeddedServer:
        if self._server is None:
            raise RunFailed("the stage is closed")
        return self._server

    def settings(self, **given: Any) -> Settings:
        """Settings of a run: nothing of the user's environment or tqe.toml counts here."""
        return Settings(redis_url=self.server.url, log_level="warning", **given)

    @property
    def observer(self) -> Client:
        """The measuring process' own connection. Closed before each fork: no child inherits it."""
        if self._observer is None:
            self._observer = Client(self.settings())
        return self._observer

    def _unwatch(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    # -------------------------------------------------------------- workers

    def start(self, procs: int = 1, *, predictor: Predictor | None = None, **given: Any) -> None:
        """Workers as `tqe run` starts them; returns when all are registered and idle. `predictor` says how
        long jobs take."""
        settings = self.settings(procs=procs, grace_ms=5_000, **given)
        self._unwatch()
        self._supervisor = process.fork(lambda: self._supervise(settings, predictor), name="supervisor")
        until(lambda: self._look_for_workers(procs), PATIENCE_S, self._supervisor_lives)
        if len(self.workers) < procs:
            raise RunFailed(f"{len(self.workers)} of {procs} workers have started; {self._last_words()}")
        self._until_idle()

    def _supervise(self, settings: Settings, predictor: Predictor | None) -> int:
        _write_to(self.log)
        logs.configure(level="warning")

        def load(_: str) -> App:
            self.lab.app.configure(settings)
            return self.lab.app

        return lifecycle.run(
            "tqe.bench.tasks:app", settings, load, redis_url=self.server.url, predictor=predictor
        )

    def _look_for_workers(self, procs: int) -> bool:
        self.lab.pulse(0.0)
        found = [worker for worker in self.observer.workers() if worker.state != "starting"]
        self.workers = [worker.pid for worker in found]
        return len(found) >= procs

    def _until_idle(self) -> None:
        """What a start costs must not fall into the measurement."""
        end_ns = clock.monotonic_ns() + 10_000_000_000
        while clock.monotonic_ns() < end_ns:
            before, at_ns = meters.cpu_ns(self.workers), clock.monotonic_ns()
            time.sleep(0.1)
            spent = meters.cpu_ns(self.workers) - before
            if spent < IDLE_SHARE * (clock.monotonic_ns() - at_ns) * len(self.workers):
                return

    def _supervisor_lives(self) -> bool:
        return procfs.state(self._supervisor) not in ("", "Z")

    def stop(self) -> None:
        if not self._supervisor:
            return
        with suppress(ProcessLookupError):
            os.kill(self._supervisor, signal.SIGTERM)
        if not until(lambda: not self._supervisor_lives(), 15.0):
            process.kill_group(self._supervisor)
        process.wait_for(self._supervisor)
        self._supervisor, self.workers = 0, []

    def supervisor_and_children(self) -> tuple[int, list[int]]:
        return self._supervisor, meters.children(self._supervisor)

    # -------------------------------------------------------------- producers

    def begin(self, produce: Produce) -> Child:
        """Start a producer; it has its own connection to the stage's Redis."""
        settings = self.settings()
        self._unwatch()

        def run() -> Mapping[str, Any]:
            self.lab.app.configure(settings)
            self.lab.app.client.connect()
            return produce(self.lab.app)

        child = Child(run, self.log)
        self._producers.append(child)
        return child

    def produce(self, produce: Produce) -> Answer:
        """Let a producer do its work to the end."""
        child = self.begin(produce)
        while not child.ended(0.1):
            self.lab.pulse(0.0)
        return child.answer()

    # -------------------------------------------------------------- watching

    def pause(self, lane: str = LANE) -> None:
        self.observer.pause(lane)

    def resume(self, lane: str = LANE) -> None:
        self.observer.resume(lane)

    def ended(self) -> int:
        """Jobs that have ended so far, as Redis counts them."""
        keys = self.observer.core.keys
        answer = self.observer.run(reading.ask(("HMGET", keys.stats, "completed", "dead")))[0]
        return sum(int(count) for count in answer if count)

    def wait_for(self, jobs: int) -> int:
        """Until so many jobs have ended; the moment at which that was seen, at most a millisecond late.

        Asked rarely while much is left: each question costs Redis and this machine a little.
        """
        begun_ns = moved_ns = clock.monotonic_ns()
        first = ended = self.ended()
        while True:
            now_ns = clock.monotonic_ns()
            if ended >= jobs:
                return now_ns
            if now_ns - moved_ns > PATIENCE_S * 1e9 or not self._supervisor_lives():
                raise RunFailed(f"{ended:,} of {jobs:,} jobs have ended; {self._last_words()}")
            self.lab.pulse(ended / jobs)
            left_s = (now_ns - begun_ns) / 1e9 * (jobs - ended) / max(1, ended - first)
            time.sleep(min(POLL_MAX_S, max(POLL_MIN_S, left_s / 2)))
            before, ended = ended, self.ended()
            if ended != before:
                moved_ns = clock.monotonic_ns()

    def read(self) -> Reading:
        """All clocks now."""
        supervisor, others = self.supervisor_and_children()
        redis_ns = meters.cpu_ns([self.server.pid])
        family = [os.getpid(), supervisor, *others] if supervisor else [os.getpid()]
        producers = [child.pid for child in self._producers]
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        reaped_ns = int((reaped.ru_utime + reaped.ru_stime) * 1e9)
        return Reading(
            at_ns=clock.monotonic_ns(),
            workers_ns=meters.cpu_ns(self.workers),
            redis_ns=redis_ns,
            own_ns=meters.cpu_ns([*family, *producers]) + redis_ns + reaped_ns,
            machine_ns=meters.machine_busy_ns(self.lab.cpus),
        )

    def spent(self, before: Reading) -> Reading:
        """What was used since then; notes what others used meanwhile."""
        difference = self.read().since(before)
        self.lab.foreign.append(round(difference.foreign(len(self.lab.cpus)), 4))
        return difference

    def used_memory(self) -> int:
        return int(self._info("memory")["used_memory"])

    def log_bytes(self) -> int:
        """Size of the append-only file."""
        return int(self._info("persistence")["aof_current_size"])

    def _info(self, section: str) -> Mapping[str, str]:
        text = self.observer.run(reading.ask(("INFO", section)))[0]
        return embedded.parse_info(text.decode("utf-8", "replace"))

    def _last_words(self) -> str:
        with suppress(OSError):
            text = self.log.read_text("utf-8", "replace").strip()
            if text:
                return f"last words: {text[-LOG_TAIL:]}"
        return "nothing was logged"


def _write_to(log: Path) -> None:
    """What a child says goes into the stage's log: the terminal belongs to the table."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def until(
    condition: Callable[[], bool], patience_s: float, while_true: Callable[[], bool] = lambda: True
) -> bool:
    """Wait for it, at most so long and no longer than the other is true. Whether it came."""
    end_ns = clock.monotonic_ns() + int(patience_s * 1e9)
    while not condition():
        if clock.monotonic_ns() > end_ns or not while_true():
            return condition()
        time.sleep(0.01)
    return True
