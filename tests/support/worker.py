"""Real workers of a test's own tasks: forked children on one board, a client, a steward, the books."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from tests.chaos.audit import read_store
from tests.chaos.checker import StoreAudit
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.app import App
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.client import Client
from tqe.job import bucket_of
from tqe.settings import Settings
from tqe.steward.steward import run_steward
from tqe.store.keys import Keys
from tqe.supervisor import lifecycle, process
from tqe.telemetry import logs
from tqe.worker.ordering import Predictor

TERMINAL = ("completed", "cancelled", "expired", "dead")


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the journal: when (CLOCK_MONOTONIC), by which process, what."""

    at_ns: int
    pid: int
    words: tuple[Any, ...]


class Journal:
    """What jobs say of themselves, one line each, kept whatever becomes of their process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._owner = 0

    def __call__(self, *words: Any) -> None:
        if self._owner != os.getpid():  # opened anew after a fork: the child has closed what it inherited
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            self._owner = os.getpid()  # last: another thread may write at this moment
        line = json.dumps([time.monotonic_ns(), os.getpid(), *words]) + "\n"
        os.write(self._fd, line.encode())

    def notes(self, word: str = "") -> list[Note]:
        """All lines, or those whose first word this is."""
        if not self._path.exists():
            return []
        found = []
        # What stands behind the last newline is a line that is being written.
        for line in self._path.read_text().rpartition("\n")[0].splitlines():
            at_ns, pid, *words = json.loads(line)
            if not word or words[0] == word:
                found.append(Note(at_ns, pid, tuple(words)))
        return found

    def count(self, word: str) -> Counter[Any]:
        """How often each second word stands behind this first one."""
        return Counter(note.words[1] for note in self.notes(word))


@dataclass
class WorkerProcess:
    """A forked worker and its slot of the board."""

    pid: int
    view: SlotView
    log: Path
    code: int | None = None  # exit code once it has ended, negative for a signal
    buried: bool = False  # its slot is not its own any more

    @property
    def incarnation(self) -> str:
        return self.view.text(layout.C_INCARNATION)

    @property
    def running(self) -> bool:
        """Whether it lives; notes its end."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def counter(self, name: str) -> int:
        return self.view.counters()[name]

    def say(self, word: int) -> None:
        """Set the stop word."""
        self.view.set(layout.C_STOP, word)

    def wait(self, timeout: float = 10.0) -> int:
        """Its exit code."""
        wait_until(lambda: not self.running, timeout, f"worker {self.view.number} ends\n{self.told()}")
        assert self.code is not None
        return self.code

    def drain(self, timeout: float = 10.0) -> int:
        self.say(layout.STOP_DRAIN)
        return self.wait(timeout)

    def kill(self) -> None:
        """kill -9, and nobody tells the steward yet (`bury` does)."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def bury(self) -> None:
        """What the supervisor does when a worker has ended: leave its slot to the steward."""
        code = self.wait()
        self.buried = True
        self.view.set(layout.C_SIGNAL, -code if code < 0 else 0)
        self.view.set(layout.C_EXIT, max(code, 0))
        self.view.set(layout.C_STATE, layout.DEAD)

    def condemn(self, kind: int = layout.CONDEMN_SOFT, step: int | None = None) -> None:
        """What the supervisor does at a soft limit: name the step, then send the signal."""
        self.view.set(layout.C_CONDEMN_KIND, kind)
        self.view.set(layout.C_CONDEMN_STEP, self.view.get(layout.C_IN_USER) if step is None else step)
        process.interrupt(self.pid)

    def told(self) -> str:
        """Its log."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""


@dataclass
class Rig:
    """One Redis, one board, one app; workers are forked with whatever tasks stand in `app` by then."""

    server: RedisServer
    folder: Path
    settings: Settings
    app: App = field(init=False)
    board: Board = field(init=False)
    client: Client = field(init=False)
    redis: redis.Redis = field(init=False)
    journal: Journal = field(init=False)
    keys: Keys = field(init=False)
    workers: list[WorkerProcess] = field(default_factory=list)
    predictor: Predictor | None = None  # of the workers that are forked from now on
    ids: list[str] = field(default_factory=list)  # every job that was submitted by `submit` and `frame`
    _steward: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.app = App("rig")
        self.app.configure(self.settings)
        self.board = Board(8)
        self.board.set(layout.H_LEASE_MS, self.settings.lease_ms)
        self.client = Client(self.settings)
        self.redis = self.server.client()
        self.journal = Journal(self.folder / "journal")
        self.keys = Keys(self.settings.namespace)

    # -- processes

    def worker(self, *, url: str | None = None, ready: bool = True) -> WorkerProcess:
        """Fork a worker. `url`: where its Redis is, if it is not to be reached directly."""
        for ended in self.workers:
            if not ended.running and ended.code == 0 and not ended.buried:
                ended.buried = True
                ended.view.set(layout.C_STATE, layout.FREE)  # it left in order: there is nothing to recover
        view = self.board.free_slot()
        assert view is not None, "the board has no free slot"
        view.wipe()
        view.set(layout.C_NUMBER, view.number)
        view.set(layout.C_STATE, layout.LIVE)
        log = self.folder / f"worker-{len(self.workers)}.log"

        def be_worker() -> int:
            return lifecycle.work(
                self.app,
                self.settings,
                self.board,
                view,
                url or self.server.url,
                predictor=self.predictor,
            )

        with warnings.catch_warnings():
            # Newer Pythons warn of a fork beside threads (a proxy's loop): the child touches none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = process.fork(be_worker, name=f"worker {view.number}", before=lambda: _alone(log))
        view.set(layout.C_PID, pid)
        made = WorkerProcess(pid, view, log)
        self.workers.append(made)
        if ready:
            wait_until(lambda: view.get(layout.C_READY) or not made.running, 10, "the worker registers")
            assert made.running, made.told()
        return made

    def steward(self) -> None:
        """Run the steward's loop in a thread until the rig is closed."""
        self._steward = threading.Thread(
            target=run_steward, args=(self.settings, self.board, self.server.url), name="steward", daemon=True
        )
        self._steward.start()

    def close(self, *, failed: bool = False) -> None:
        """End everything. After a failure each worker says first what its threads are doing."""
        self.board.set(layout.H_STEWARD_STOP, 1)
        for worker in self.workers:
            if failed and worker.running:
                os.kill(worker.pid, signal.SIGUSR1)
                time.sleep(0.1)
            worker.kill()
            print(f"--- worker {worker.view.number}, exit {worker.code}\n{worker.told()}", end="")
        if self._steward is not None:
            self._steward.join(15)
        self.client.close()
        self.app.close()
        self.redis.close()

    # -- jobs

    def submit(self, kind: str, payload: Any = None, **options: Any) -> Any:
        """One job; its handle."""
        handle = self.client.submit(kind, {} if payload is None else payload, **options)
        self.ids.append(handle.id)
        return handle

    def frame(self, kind: str, payloads: Iterable[Any], **options: Any) -> Any:
        """Jobs in bulk; their handles."""
        handles = self.client.submit_many([(kind, payload) for payload in payloads], **options)
        self.ids += [handle.id for handle in handles]
        return handles

    def told(self, handle: Any) -> dict[str, Any]:
        """What the snapshots say of this job alone: attempts, error, result."""
        frame, _, index = handle.id.partition(".")
        value = self.redis.hget(self.keys.bucket(*bucket_of(frame)), f"{frame}.{index}")
        return json.loads(value) if value else {}

    def stats(self) -> dict[str, int]:
        return {name.decode(): int(n) for name, n in self.redis.hgetall(self.keys.stats).items() if int(n)}

    def leases(self) -> dict[str, list[str]]:
        """Incarnation → names of its leases, without the frame ids' first characters."""
        start = len(self.keys.processing(""))
        return {
            key[start:].decode(): sorted(name.decode()[20:] for name in self.redis.hkeys(key))
            for key in self.redis.keys(self.keys.processing("*"))
        }

    def incarnations(self) -> list[str]:
        return [name.decode() for name in self.redis.zrange(self.keys.incarnations, 0, -1)]

    def wait_ended(self, jobs: int | None = None, timeout: float = 15.0) -> dict[str, int]:
        """Wait until so many jobs (all that were submitted) have ended; the totals."""
        wanted = len(self.ids) if jobs is None else jobs

        def ended() -> bool:
            stats = self.stats()
            return sum(stats.get(name, 0) for name in TERMINAL) >= wanted

        wait_until(ended, timeout, f"{wanted} jobs have ended; totals: {self.stats()}, held: {self.leases()}")
        return self.stats()

    def wait_held(self, timeout: float = 10.0) -> None:
        """Wait until nothing is in flight."""
        wait_until(lambda: not self.leases(), timeout, "nothing is in flight")

    # -- books

    def books(self) -> Books:
        """Read everything; only when nothing moves."""
        return Books(read_store(self.redis, self.settings.namespace), list(self.ids))


@dataclass(frozen=True)
class Books:
    """Where every job is, as read from Redis without the engine."""

    audit: StoreAudit
    ids: list[str]

    def states(self) -> Counter[str]:
        """How many jobs are in which state."""
        return Counter(self.audit.states.get(job, "untracked") for job in self.ids)

    def problems(self, *, incarnations: int = 0) -> list[str]:
        """Whatever is wrong: a job that is nowhere or twice, something left behind, a sum that is off.

        `incarnations`: how many may be registered; none may hold a lease.
        """
        return list(self._problems(incarnations))

    def _problems(self, incarnations: int) -> Iterator[str]:
        audit = self.audit
        yield from audit.mismatches
        yield from audit.residue
        if audit.processing:
            yield f"leases are left: {audit.processing}"
        if len(audit.incarnations) != incarnations:
            yield f"{len(audit.incarnations)} incarnations are registered, not {incarnations}"
        places = Counter(job for jobs in audit.places.values() for job in jobs)
        for job in self.ids:
            yield from self._problems_of(job, places[job])
        yield from (f"job {job} was never submitted" for job in places.keys() - set(self.ids))
        if audit.dlq.keys() != audit.dlq_meta or audit.dlq.keys() != audit.dlq_index:
            yield "the parts of the dead-letter queue differ"
        waiting = {name: n for name, n in audit.depth_counted.items() if n}
        if {name: n for name, n in audit.depth.items() if n} != waiting:
            yield f"depth says {audit.depth}, there are {waiting}"
        yield from self._totals()

    def _problems_of(self, job: str, places: int) -> Iterator[str]:
        state = self.audit.states.get(job, "untracked")
        dead = job in self.audit.dlq
        if state in ("queued", "retrying"):
            if places != 1 or dead:
                yield f"job {job} is {state} and stands in {places} places"
        elif state == "dead":
            if places or not dead:
                yield f"job {job} is dead, in the DLQ: {dead}, and stands in {places} places"
        elif state == "untracked":
            if places + dead > 1:
                yield f"job {job} stands in {places + dead} places"
        elif places or dead:
            yield f"job {job} is {state} and still stands in {places + dead} places"

    def _totals(self) -> Iterator[str]:
        said, states = self.audit.totals, self.states()
        if states["untracked"]:
            return
        for name, counted in (
            ("submitted", len(self.ids)),
            ("completed", states["completed"]),
            ("cancelled", states["cancelled"]),
            ("expired", states["expired"]),
            ("dead", states["dead"]),
        ):
            if said.get(name, 0) != counted:
                yield f"the totals say {said.get(name, 0)} {name}, there are {counted}"


def make_rig(server: RedisServer, folder: Path, **settings: Any) -> Rig:
    """A rig with quick retries and no limits of its own."""
    defaults = {"redis_url": server.url, "backoff_base_ms": 20, "backoff_cap_ms": 2_000, "procs": 1}
    return Rig(server, folder, Settings(**{**defaults, **settings}))


def _alone(log: Path) -> None:
    """In the child: its own log, and none of the parent's files. A copy of a socket would keep a connection
    open that a proxy has closed."""
    gc.freeze()  # or the collector would close, by number, files that are the child's by then
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    # Their numbers stay taken: an object of the parent's that is dropped here closes its file by number, and
    # the journal of a job must not be behind it by then.
    empty = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2 and number != empty:
            os.dup2(empty, number)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2)
    # Of connections that jobs leave open: raised while uvloop closes them, it ends the process.
    warnings.simplefilter("ignore", ResourceWarning)
    # What asyncio and others say goes to sys.stderr, which is still the test runner's.
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logs.configure(level="info")
