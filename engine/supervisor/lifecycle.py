"""The supervisor's life: fork the steward and the workers, watch them, replace them, drain them.

It runs no job, starts no thread and talks to no Redis: what it knows of its children stands on the board.
Each life of a worker has a slot of its own; only the supervisor moves a slot to dead, only the steward to
recovered, and a slot is not used again in between, so nobody wipes what recovery still has to read.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from tqe import clock
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.errors import AppImportError, SettingsError, TQEError
from tqe.schedule import Timetable
from tqe.settings import Settings
from tqe.steward import steward
from tqe.steward.model import Models
from tqe.supervisor import affinity, preload, process
from tqe.supervisor.limits import Act, Limits
from tqe.telemetry import logs, procfs
from tqe.worker import loop
from tqe.worker.ordering import Predictor

_MS: Final = 1_000_000
_S: Final = 1_000_000_000

_RECYCLE: Final = {
    layout.RECYCLE_JOBS: "it has run its jobs",
    layout.RECYCLE_MEMORY: "it uses too much memory",
}

NEVER_NS: Final = 1 << 62

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1


class RunWorker(Protocol):
    """One worker's whole life; answers with its exit code."""

    def __call__(self, app: Any, settings: Settings, board: Board, slot: SlotView, redis_url: str) -> int: ...


class RunSteward(Protocol):
    """The steward's whole life; answers with its exit code."""

    def __call__(self, settings: Settings, board: Board, redis_url: str) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Times that only tests change."""

    poll_s: float = 0.05
    backoff_first_ns: int = _S // 10
    backoff_cap_ns: int = 30 * _S
    young_ns: int = 5 * _S  # who dies younger than this without having ended a job counts as failing
    start_failures_max: int = 5
    steward_stale_min_ns: int = _S  # its beat may be this old however short the lease
    stuck_min_ns: int = 10 * _S
    steward_stop_ns: int = 10 * _S  # to recover and to leave, once the workers are gone
    turn_pause_ns: int = 30 * _S  # after a replacement that did not start
    gap_ns: int = _S  # a poll that comes later than this means that we were stopped ourselves


@dataclass(slots=True)
class Life:
    """One process that runs as a worker."""

    number: int
    slot: SlotView
    pid: int
    started_ns: int
    stop_at_ns: int | None = None  # when it is killed if it has not drained by then
    killed: bool = False
    recycling: bool = False

    @property
    def ready(self) -> bool:
        return self.slot.get(layout.C_READY) != 0

    @property
    def busy(self) -> bool:
        return self.slot.get(layout.C_IN_USER) != 0 or self.slot.get(layout.C_ASYNC) != 0

    @property
    def ended_jobs(self) -> int:
        counters = self.slot.counters()
        return counters["completed"] + counters["failed"]


@dataclass(slots=True)
class Backoff:
    """Deaths in a row that came too early, and when the next start is due."""

    tuning: Tuning
    cap_ns: int = 0  # 0: the usual one
    failures: int = 0
    not_before_ns: int = 0

    def died(self, now_ns: int, *, young: bool) -> int:
        """Note a death; answers with the delay until the next start: half fixed, half random."""
        if not young:
            self.failures = 0
            self.not_before_ns = now_ns
            return 0
        self.failures += 1
        whole = min(
            self.cap_ns or self.tuning.backoff_cap_ns,
            self.tuning.backoff_first_ns << min(self.failures - 1, 30),
        )
        delay = whole // 2 + random.randrange(whole // 2 + 1)
        self.not_before_ns = now_ns + delay
        return delay


@dataclass(slots=True)
class _Turn:
    """One worker of a rolling replacement: the old life, and the new one once it runs."""

    old: Life
    new: Life | None = None


@dataclass(slots=True)
class _Stop:
    """A stop under way. `deadline_ns` is for the workers, `leave_ns` for the steward after them."""

    reason: str
    deadline_ns: int
    code: int = EXIT_DONE
    leave_ns: int | None = None
    requests: int = 1


def run(
    app_path: str,
    settings: Settings,
    load_app: Callable[[str], Any],
    *,
    redis_url: str,
    pins: affinity.Pins | None = None,
    run_worker: RunWorker | None = None,
    run_steward: RunSteward | None = None,
    revive: Callable[[], None] | None = None,
    predictor: Predictor | None = None,
    timetable: Timetable | None = None,
    models: Models | None = None,
    tuning: Tuning | None = None,
) -> int:
    """Run workers until told to stop, and answer with the exit code. Raises AppImportError before any fork.

    Nothing of Redis may be open in the calling process, and it should have no other threads. `load_app` is
    called here, or in each worker if the app is not imported before the fork. `pins` are decided here unless
    they are given. `revive` brings an embedded server back, and is called by the steward, which also sees to
    the schedules of `timetable` and to published `models`. `predictor` says how long jobs will take; its
    library should be open by now, since the workers then share its pages.
    """
    run_worker = run_worker or partial(work, predictor=predictor)
    run_steward = run_steward or partial(
        steward.run_steward, revive=revive, timetable=timetable, models=models
    )
    if settings.metrics_port:
        check_port(settings.metrics_host, settings.metrics_port)
    board = Board(slots_of(settings.procs))
    board.set(layout.H_SUPERVISOR_PID, os.getpid())
    board.set(layout.H_LEASE_MS, settings.lease_ms)
    if settings.autoscale is not None:
        board.set(layout.H_WANTED, settings.autoscale[0])
    app = preload.load(app_path, load_app) if settings.preload else None
    if pins is None:
        pins = affinity.plan(settings.procs, pin=settings.pin)
        _log.info(f"workers are {pins.reason}")
    supervisor = Supervisor(
        settings,
        board,
        work=_Work(app_path, app, settings, board, load_app, redis_url, run_worker),
        steward=lambda: run_steward(settings, board, redis_url),
        pins=pins,
        tuning=tuning or Tuning(),
        preloaded=app is not None,
    )
    gc.collect()
    gc.freeze()  # the collector of a child would otherwise write to every page that it shares with us
    return supervisor.run()


def work(
    app: Any,
    settings: Settings,
    board: Board,
    slot: SlotView,
    redis_url: str,
    *,
    predictor: Predictor | None = None,
) -> int:
    """A worker's life with the tasks and hooks of an app."""

    def start() -> None:
        logs.begin_worker()
        app.run_start_hooks()
        logs.note_threads()

    return loop.run_worker(
        app.registry,
        settings,
        board,
        slot,
        redis_url,
        install_limit_signal=process.install_limit_signal,
        on_start=start,
        on_stop=app.run_stop_hooks,
        predictor=predictor,
        on_error=app.error_hooks,
        tracing=app.tracing,
    )


def check_port(host: str, port: int) -> int:
    """Refuse an address that cannot be used, at the start and in one sentence, rather than in a line of the
    steward's log. The port, a free one for 0: the steward would take another each time that it starts anew.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as e:
        raise SettingsError(
            f"metrics_host = {host}, metrics_port = {port}: metrics cannot be served there ({e.strerror});"
            " choose another port, or 0 for any free one"
        ) from e


def slots_of(procs: int) -> int:
    """Twice the workers, since a dead life's slot is kept until it is recovered, and two for replacements."""
    if procs + 2 > layout.SLOTS_MAX:
        raise SettingsError(
            f"procs = {procs}: one supervisor runs at most {layout.SLOTS_MAX - 2} workers;"
            " start a second one on the same Redis for more"
        )
    return min(2 * procs + 2, layout.SLOTS_MAX)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a forked worker does before the worker's own code takes over."""

    app_path: str
    app: Any | None
    settings: Settings
    board: Board
    load_app: Callable[[str], Any]
    redis_url: str
    run_worker: RunWorker

    def __call__(self, slot: SlotView) -> int:
        try:
            app = self.app if self.app is not None else self.load_app(self.app_path)
            return self.run_worker(app, self.settings, self.board, slot, self.redis_url)
        except AppImportError as e:
            _log.error(str(e))
        except TQEError as e:
            _log.error(f"the worker cannot go on: {e}")
        return EXIT_FAILED


_log = logs.get("supervisor")


@dataclass
class Supervisor:
    """The loop and what it remembers. All times are CLOCK_BOOTTIME, in ns."""

    settings: Settings
    board: Board
    work: Callable[[SlotView], int]
    steward: Callable[[], int]
    pins: affinity.Pins
    tuning: Tuning
    preloaded: bool = True

    def __post_init__(self) -> None:
        self._lives: dict[int, Life] = {}  # by pid
        self._posts: dict[int, Life] = {}  # the life that holds each worker number
        self._backoffs = {number: Backoff(self.tuning) for number in range(self.settings.procs)}
        self._limits = Limits()
        self._steward_pid = 0
        self._steward_started_ns = 0
        # Without a steward no lease is renewed, so its next one never waits for long.
        self._steward_backoff = Backoff(self.tuning, cap_ns=min(2 * _S, self.settings.lease_ms * _MS // 6))
        self._awake_since_ns = clock.boottime_ns()
        self._looked_ns = self._awake_since_ns
        self._start_failures = 0
        self._turn: _Turn | None = None
        self._recycle: deque[int] = deque()
        self._turns_from_ns = 0
        self._started: set[int] = set()  # numbers of workers that have had a life
        self._stop: _Stop | None = None
        self._told: set[str] = set()
        self._signals: process.Signals | None = None

    # ------------------------------------------------------------------ the loop

    def run(self) -> int:
        """Until the end; every child is gone when it returns."""
        self._signals = process.Signals()
        try:
            while True:
                code = self._once(self._signals.wait(self.tuning.poll_s))
                if code is not None:
                    return code
        finally:
            self._kill_all()
            self._signals.close()
            self._signals = None

    def _once(self, signals: list[int]) -> int | None:
        now_ns = clock.boottime_ns()
        if now_ns - self._looked_ns > self.tuning.gap_ns:
            # We were stopped or the machine slept: nobody's beat may be held against him for that time.
            self._awake_since_ns = now_ns
        self._looked_ns = now_ns
        for number in signals:
            self._on_signal(number, now_ns)
        for death in process.reap(self._lives.keys() | {self._steward_pid}):
            self._on_death(death, now_ns)
        self._free_recovered()
        self._watch_steward(now_ns)
        self._watch_workers(now_ns)
        if self._stop is not None:
            return self._go_on_stopping(self._stop, now_ns)
        self._hire(now_ns)
        self._let_go(now_ns)
        self._replace_in_turn(now_ns)
        if self.settings.burst and self.board.get(layout.H_BURST_DONE):
            self._begin_stop("no job is left", now_ns)
        return None

    def _kill_all(self) -> None:
        for pid in [*self._lives, *([self._steward_pid] if self._steward_pid else [])]:
            process.kill_group(pid)
        own = set(self._lives) | {self._steward_pid}
        for pid in own - {0}:
            process.wait_for(pid)

    # ------------------------------------------------------------------ signals

    def _on_signal(self, number: int, now_ns: int) -> None:
        if number == signal.SIGHUP:
            self._ask_recycle()
        elif self._stop is None:
            self._begin_stop(process.signal_name(number), now_ns)
        else:
            self._stop.requests += 1
            self._stop.deadline_ns = now_ns
            if self._stop.requests == 2:
                _log.warning(f"{process.signal_name(number)} again: stopping now")
            else:
                # Nobody asks three times who wants to wait for the steward.
                self._stop.leave_ns = now_ns

    def _ask_recycle(self) -> None:
        picks = (
            "the app was imported before the fork, so no new code is picked up"
            if self.preloaded
            else "each worker imports the app anew"
        )
        _log.info(f"SIGHUP: replacing the workers one by one; {picks}")
        self._recycle = deque(range(self.settings.procs))
        self._turns_from_ns = 0

    # ------------------------------------------------------------------ births

    @property
    def _wanted(self) -> int:
        """How many workers should live: procs, or with autoscale what the steward has decided on."""
        return min(self.board.get(layout.H_WANTED) or self.settings.procs, self.settings.procs)

    def _hire(self, now_ns: int) -> None:
        room = self._wanted - len(self._posts)
        for number in [one for one in range(self.settings.procs) if one not in self._posts][: max(0, room)]:
            # A number that waits after an early death takes its room: another one would be no pause at all.
            if now_ns >= self._backoffs[number].not_before_ns:
                life = self._fork_worker(number, now_ns)
                if life is None:
                    return
                self._posts[number] = life

    def _fork_worker(self, number: int, now_ns: int) -> Life | None:
        slot = self.board.free_slot()
        if slot is None:
            self._tell_once(
                "slots", "no slot is free: dead workers wait for the steward, so no replacement is started"
            )
            return None
        self._told.discard("slots")
        cpu = self.pins.cpu(number)
        slot.set(layout.C_NUMBER, number)
        slot.set(layout.C_CPU, 0 if cpu is None else cpu + 1)
        slot.set(layout.C_STARTED_NS, now_ns)
        slot.set(layout.C_STATE, layout.LIVE)

        def begin() -> int:
            slot.set(layout.C_PID, os.getpid())
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
            return self.work(slot)

        try:
            pid = process.fork(begin, name=f"worker {number}", before=self._leave_parent)
        except OSError as e:
            slot.wipe()
            delay_ns = self._backoffs[number].died(now_ns, young=True)
            _log.error(f"worker {number} cannot be forked: {e.strerror}; next try in {delay_ns / _S:.1f} s")
            return None
        slot.set(layout.C_PID, pid)
        life = self._lives[pid] = Life(number, slot, pid, now_ns)
        if number in self._started:
            self.board.count("worker_restarts")
        self._started.add(number)
        _log.debug("worker started", worker=number, worker_pid=pid, slot=slot.number)
        return life

    def _fork_steward(self, now_ns: int) -> None:
        self.board.set(layout.H_STEWARD_BEAT, 0)
        try:
            pid = process.fork(self.steward, name="steward", before=self._leave_parent)
        except OSError as e:
            delay_ns = self._steward_backoff.died(now_ns, young=True)
            _log.error(f"the steward cannot be forked: {e.strerror}; next try in {delay_ns / _S:.1f} s")
            return
        self.board.set(layout.H_STEWARD_PID, pid)
        self._steward_pid, self._steward_started_ns = pid, now_ns

    def _leave_parent(self) -> None:
        if self._signals is not None:
            self._signals.forget_in_child()

    # ------------------------------------------------------------------ deaths

    def _on_death(self, death: process.Death, now_ns: int) -> None:
        if death.pid == self._steward_pid:
            self._on_steward_death(death, now_ns)
            return
        life = self._lives.pop(death.pid, None)
        if life is None:
            return  # an orphan that was given to us as PID 1
        slot = life.slot
        slot.set(layout.C_SIGNAL, death.signal)
        slot.set(layout.C_EXIT, death.code)
        slot.set(layout.C_STATE, layout.DEAD)
        self._limits.forget(slot)
        if self._posts.get(life.number) is life:
            del self._posts[life.number]
        if self._stop is not None or life.stop_at_ns is not None:
            _log.info(f"worker {life.number} ended ({death.how})", worker_pid=death.pid)
            self._backoffs[life.number].died(now_ns, young=False)
            return
        self._on_unexpected_death(life, death, now_ns)

    def _on_unexpected_death(self, life: Life, death: process.Death, now_ns: int) -> None:
        self.board.count("worker_crashes")
        if not life.ready:
            self._start_failures += 1
        young = not life.ready or (
            now_ns - life.started_ns < self.tuning.young_ns and life.ended_jobs == 0 and not life.killed
        )
        delay_ns = self._backoffs[life.number].died(now_ns, young=young)
        again = f"in {delay_ns / _S:.1f} s" if delay_ns else "now"
        what = "before it was ready" if not life.ready else "unexpectedly"
        if life.killed:
            what = "as it was killed for its job's hard time limit"
            if life.slot.get(layout.C_KILL_KIND) == layout.KILL_STUCK:
                what = "as it was killed because its loop stood still"
        _log.warning(
            f"worker {life.number} ended {what} ({death.how}); a replacement starts {again}",
            worker_pid=death.pid,
        )
        if self._start_failures >= self.tuning.start_failures_max and not self._anyone_ready():
            _log.error(
                f"giving up: {self._start_failures} workers in a row ended before they were ready"
                f" (the last one with {death.how}); see the lines above for the cause"
            )
            self._begin_stop("workers cannot start", now_ns, code=EXIT_FAILED)

    def _anyone_ready(self) -> bool:
        return any(life.ready for life in self._lives.values())

    def _on_steward_death(self, death: process.Death, now_ns: int) -> None:
        self._steward_pid = 0
        if self._stop is not None and self._stop.leave_ns is not None and death.how == "exit 0":
            return
        self.board.count("steward_restarts")
        beat = self.board.get(layout.H_STEWARD_BEAT) != 0
        young = not beat or now_ns - self._steward_started_ns < self.tuning.young_ns
        delay_ns = self._steward_backoff.died(now_ns, young=young)
        _log.warning(f"the steward ended ({death.how}); a new one starts in {delay_ns / _S:.1f} s")

    def _free_recovered(self) -> None:
        for slot in self.board.in_state(layout.RECOVERED):
            self.board.retire(slot)

    # ------------------------------------------------------------------ watching

    def _watch_steward(self, now_ns: int) -> None:
        stopping = self._stop is not None and self._stop.leave_ns is not None
        if not self._steward_pid:
            done = stopping and not self.board.in_state(layout.DEAD)
            if not done and now_ns >= self._steward_backoff.not_before_ns:
                self._fork_steward(now_ns)
            return
        alive_ns = max(self.board.get(layout.H_STEWARD_BEAT), self._steward_started_ns, self._awake_since_ns)
        stale_ns = max(self.settings.lease_ms * _MS // 3, self.tuning.steward_stale_min_ns)
        if now_ns - alive_ns > stale_ns:
            # A steward that hangs would fence the whole host: leases end while their workers work.
            _log.error(f"the steward has not moved for {(now_ns - alive_ns) / _S:.1f} s: killing it")
            process.kill_group(self._steward_pid)
            self._awake_since_ns = now_ns  # one kill is enough until it is reaped

    def _watch_workers(self, now_ns: int) -> None:
        for life in list(self._lives.values()):
            if self._start_failures and life.ready:
                self._start_failures = 0
            if life.killed:
                continue
            if life.stop_at_ns is not None:
                self._keep_telling(life, now_ns)
            elif life.slot.get(layout.C_RECYCLE) and not life.recycling:
                life.recycling = True
                _log.info(
                    f"worker {life.number} asks to be replaced: {_RECYCLE[life.slot.get(layout.C_RECYCLE)]}"
                )
                self._recycle.append(life.number)
            self._enforce_limits(life, now_ns)
            self._watch_beat(life, now_ns)

    def _enforce_limits(self, life: Life, now_ns: int) -> None:
        verdict = self._limits.look(life.slot, now_ns)
        if verdict is None or life.killed:
            return
        if verdict.act is Act.KILL:
            _log.warning(
                f"worker {life.number} is killed: its job ran past its hard time limit", worker_pid=life.pid
            )
            self._kill(life, layout.KILL_HARD_LIMIT, verdict.step)
            return
        # The kind first: the step is what the handler in the worker compares.
        life.slot.set(layout.C_CONDEMN_KIND, verdict.condemn)
        life.slot.set(layout.C_CONDEMN_STEP, verdict.step)
        process.interrupt(life.pid)

    def _watch_beat(self, life: Life, now_ns: int) -> None:
        """A loop that stands still between jobs holds leases that nobody renews any more: replace it."""
        slot = life.slot
        if life.killed or not life.ready or slot.get(layout.C_IN_USER):
            return
        alive_ns = max(slot.get(layout.C_BEAT), self._awake_since_ns, life.started_ns)
        stuck_ns = max(2 * self.settings.lease_ms * _MS, self.tuning.stuck_min_ns)
        # Stopped by a debugger or a freezer is not stuck: it goes on when it is let go.
        if now_ns - alive_ns > stuck_ns and procfs.state(life.pid) not in "Tt":
            _log.error(f"worker {life.number} has not moved for {(now_ns - alive_ns) / _S:.0f} s: killing it")
            self._kill(life, layout.KILL_STUCK, 0)

    def _kill(self, life: Life, kind: int, step: int) -> None:
        # Why before the kill: recovery reads these words after the death, and they decide who is charged.
        life.slot.set(layout.C_KILL_STEP, step)
        life.slot.set(layout.C_KILL_KIND, kind)
        life.killed = True
        process.kill_group(life.pid)

    # ------------------------------------------------------------------ draining

    def _drain(self, life: Life, deadline_ns: int) -> None:
        life.stop_at_ns = deadline_ns
        life.slot.set(layout.C_STOP, layout.STOP_DRAIN)

    def _keep_telling(self, life: Life, now_ns: int) -> None:
        """Say it again at each poll: steward and worker write that word too, and may have overwritten it."""
        if life.slot.get(layout.C_STOP) not in (layout.STOP_DRAIN, layout.STOP_NOW):
            life.slot.set(layout.C_STOP, layout.STOP_DRAIN)
        if life.stop_at_ns is not None and now_ns >= life.stop_at_ns:
            step = life.slot.get(layout.C_IN_USER)
            _log.warning(f"worker {life.number} did not end within its grace: it is killed")
            self._kill(life, layout.KILL_DRAIN, step)

    def _let_go(self, now_ns: int) -> None:
        """Autoscale: one worker too many drains, for as long as its job takes, since nobody is in a hurry.
        Its post is free at once, so that a new backlog does not wait for it."""
        leaving = len(self._lives) > len(self._posts)
        if leaving or self._turn is not None or len(self._posts) <= self._wanted:
            return
        life = max(self._posts.values(), key=lambda one: (not one.busy, one.number))
        del self._posts[life.number]
        _log.info(f"worker {life.number} is let go: {self._wanted} are enough", worker_pid=life.pid)
        self._drain(life, NEVER_NS)

    def _replace_in_turn(self, now_ns: int) -> None:
        """SIGHUP: one worker at a time, the new one before the old one ends if there is a slot for it."""
        turn = self._turn
        if turn is None:
            if not self._recycle or now_ns < self._turns_from_ns:
                return
            old = self._posts.get(self._recycle.popleft())
            if old is None or old.stop_at_ns is not None:
                return
            turn = self._turn = _Turn(old, self._fork_worker(old.number, now_ns))
            if turn.new is None:
                self._drain(old, now_ns + self.settings.grace_ms * _MS)
            else:
                self._posts[old.number] = turn.new
            return
        if turn.old.pid not in self._lives:
            self._turn = None
        elif turn.new is not None and turn.new.pid not in self._lives:
            other = self._posts.get(turn.old.number)
            if other is not None or turn.old.stop_at_ns is not None:
                # Who is hired in its place is the replacement now. Given back to the old one, the post would
                # be filled once more when that one ends, and nobody would count the other.
                turn.new = other
                return
            _log.error(f"the replacement of worker {turn.old.number} did not start: the old ones stay")
            self._posts[turn.old.number] = turn.old
            self._turn = None
            self._recycle.clear()
            # Who asked to be replaced, because it has grown too large, say, is heard again after a while.
            self._turns_from_ns = now_ns + self.tuning.turn_pause_ns
            for life in self._lives.values():
                life.recycling = False
        elif turn.old.stop_at_ns is None and (turn.new is None or turn.new.ready):
            self._drain(turn.old, now_ns + self.settings.grace_ms * _MS)

    # ------------------------------------------------------------------ stopping

    def _begin_stop(self, reason: str, now_ns: int, *, code: int = EXIT_DONE) -> None:
        if self._stop is not None:
            return
        grace_ns = self.settings.grace_ms * _MS
        self._stop = _Stop(reason, now_ns + grace_ns, code)
        _log.info(f"{reason}: draining; running jobs have {grace_ns / _S:g} s to end")
        for life in self._lives.values():
            self._drain(life, self._stop.deadline_ns)

    def _go_on_stopping(self, stop: _Stop, now_ns: int) -> int | None:
        for life in list(self._lives.values()):
            life.stop_at_ns = min(life.stop_at_ns or stop.deadline_ns, stop.deadline_ns)
            if not life.ready and not life.slot.incarnations and not life.killed:
                # Still importing: it holds nothing, and would not look at the board for a while.
                self._kill(life, layout.KILL_DRAIN, 0)
        if self._lives:
            return None
        if stop.leave_ns is None:
            stop.leave_ns = now_ns + self.tuning.steward_stop_ns
            self.board.set(layout.H_STEWARD_STOP, 1)
        if self._steward_pid and now_ns < stop.leave_ns:
            return None
        left = self.board.in_state(layout.DEAD)
        if left and now_ns < stop.leave_ns:
            return None  # the steward died at it: the next one goes on
        if left:
            _log.error(
                f"stopped, but what {len(left)} workers held could not be given back: their leases end within"
                f" {self.settings.lease_ms / 1000:g} s and others take their jobs over"
            )
            return EXIT_FAILED
        _log.info("stopped: nothing is left behind")
        return stop.code

    def _tell_once(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            _log.warning(text)
