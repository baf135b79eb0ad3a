"""The steward's loop: runs the duties when they are due, and survives whatever goes wrong in one of them.

It is a process of its own because a job that holds a worker's interpreter would starve heartbeats there.
It owns no signal and no fork: it ends when the board says so, or with its parent.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tqe.board import layout
from tqe.board.board import Board
from tqe.clock import SYSTEM, Clock
from tqe.errors import RedisUnavailable, TQEError
from tqe.schedule import Timetable
from tqe.settings import Settings
from tqe.steward.auditor import Auditor
from tqe.steward.backlog import BacklogReader
from tqe.steward.burst import Burst
from tqe.steward.canceller import Canceller
from tqe.steward.context import Context, host_name
from tqe.steward.cron import Cron
from tqe.steward.delayed import Delayed, Unparker
from tqe.steward.exporter import Exporter, TotalsReader
from tqe.steward.model import ModelDuty, Models
from tqe.steward.publisher import Publisher
from tqe.steward.reaper import Reaper
from tqe.steward.recovery import Recovery
from tqe.steward.renewal import Renewal
from tqe.steward.reviver import Reviver
from tqe.steward.roles import Roles
from tqe.steward.takeback import TakeBack
from tqe.steward.trimmer import Trimmer
from tqe.steward.watchdog import Watchdog
from tqe.store import housekeeping
from tqe.store.keys import Keys
from tqe.telemetry import logs, metrics, user_metrics

TURN_S: Final = 0.05  # a death is seen within one turn
JITTER: Final = 0.2  # of a period, always earlier: stewards of many hosts must not knock at the same moment
RETRY_FIRST_S: Final = 0.1
RETRY_CAP_S: Final = 1.0  # well below any lease: healthy workers are renewed right after Redis is back
STOP_S: Final = 8.0  # to finish recoveries when told to stop

_log = logs.get("steward")


class Duty(Protocol):
    """Something periodic. `next_in_s`, set by a run, overrides the period once."""

    name: str
    period_s: float
    next_in_s: float | None

    def run_once(self) -> Any: ...


@dataclass
class _Entry:
    """A duty, when it is due, and how it went."""

    duty: Duty
    due_ns: int
    runs: int = 0
    failures: int = 0
    failed_in_row: int = 0
    last_s: float = 0.0
    lag_s: float = 0.0  # how late it began last

    def next_delay_s(self) -> float:
        """Until the next run: the period less some jitter, or what the duty asked for, or a retry."""
        if self.failed_in_row:
            whole = min(RETRY_CAP_S, RETRY_FIRST_S * 2.0 ** min(self.failed_in_row - 1, 10))
            return whole * random.uniform(0.5, 1.0)
        if self.duty.next_in_s is not None:
            return self.duty.next_in_s
        return self.duty.period_s * random.uniform(1 - JITTER, 1.0)


class Steward:
    """The duties of one steward in the order in which they matter when all are due."""

    def __init__(
        self,
        context: Context,
        duties: Sequence[Duty],
        *,
        clock: Clock = SYSTEM,
        turn_s: float = TURN_S,
        revive: Callable[[], None] | None = None,
    ) -> None:
        self._context = context
        self._clock = clock
        self._turn_s = turn_s
        now_ns = clock.monotonic_ns()
        self._entries = [_Entry(duty, now_ns) for duty in duties]
        self._redis_failed = False
        self._reviver = Reviver(revive)

    def run(self) -> int:
        """Until the stop word; then what is dead is still recovered, for a bounded time."""
        board = self._context.board
        while not board.get(layout.H_STEWARD_STOP):
            self.turn()
            time.sleep(self._pause_s())
        deadline_ns = self._clock.monotonic_ns() + int(STOP_S * 1e9)
        while board.in_state(layout.DEAD) and self._clock.monotonic_ns() < deadline_ns:
            self.turn(only=("recovery", "renewal"))
            time.sleep(self._pause_s())
        _log.debug("the steward leaves")
        return 0

    def turn(self, *, only: Sequence[str] = ()) -> None:
        """One look at the board and every duty that is due."""
        self.beat()
        self._context.sightings.observe(self._context.board, self._context.now_ns())
        for entry in self._entries:
            if only and entry.duty.name not in only:
                continue
            if self._clock.monotonic_ns() >= entry.due_ns:
                self._run(entry)
                self.beat()

    def beat(self) -> None:
        """Tell the supervisor that we move."""
        self._context.board.set(layout.H_STEWARD_BEAT, self._clock.boottime_ns())

    def duties(self) -> Mapping[str, metrics.DutySample]:
        """How the duties have gone so far."""
        return {e.duty.name: metrics.DutySample(e.runs, e.failures, e.last_s, e.lag_s) for e in self._entries}

    def redis_up(self) -> bool:
        """Whether the last run that asked Redis got an answer."""
        return not self._redis_failed

    def _pause_s(self) -> float:
        soonest_ns = min(entry.due_ns for entry in self._entries)
        return min(self._turn_s, max(0.001, (soonest_ns - self._clock.monotonic_ns()) / 1e9))

    def _run(self, entry: _Entry) -> None:
        begun_ns = self._clock.monotonic_ns()
        entry.lag_s = max(0.0, (begun_ns - entry.due_ns) / 1e9)
        entry.runs += 1
        heard = self._context.door.heard
        try:
            entry.duty.run_once()
        except RedisUnavailable as e:
            self._failed(entry)
            if not self._redis_failed:
                _log.warning(f"Redis does not answer ({e}); the steward tries again until it does")
            self._redis_failed = True
            self._reviver.look(entry.failed_in_row, begun_ns)
        except TQEError as e:
            self._failed(entry)
            self._tell(entry, f"{entry.duty.name} failed: {e}")
        except Exception:
            # Whatever it is, it is one duty's: leases are still renewed and the dead still recovered.
            self._failed(entry)
            if entry.failed_in_row == 1:
                _log.exception(f"{entry.duty.name} failed")
        else:
            entry.failed_in_row = 0
            # Most duties ask Redis nothing as long as there is nothing to do.
            if self._redis_failed and self._context.door.heard != heard:
                _log.info("Redis answers again")
                self._redis_failed = False
        now_ns = self._clock.monotonic_ns()
        entry.last_s = (now_ns - begun_ns) / 1e9
        entry.due_ns = now_ns + int(entry.next_delay_s() * 1e9)

    def _failed(self, entry: _Entry) -> None:
        entry.failures += 1
        entry.failed_in_row += 1

    def _tell(self, entry: _Entry, text: str) -> None:
        # The first of a row, and then ever more rarely.
        if entry.failed_in_row & (entry.failed_in_row - 1) == 0:
            _log.error(text, in_row=entry.failed_in_row)


def run_steward(
    settings: Settings,
    board: Board,
    redis_url: str,
    *,
    revive: Callable[[], None] | None = None,
    timetable: Timetable | None = None,
    models: Models | None = None,
) -> int:
    """Be the steward of this board until it says stop. Returns the exit code.

    `revive` is called, on a thread, when Redis stays away: it starts the embedded server's next keeper.
    `timetable` has the app's schedules; without one nothing is scheduled here.
    `models` brings published models to this host; without it nobody is told of any.
    """

    def beat() -> None:
        board.set(layout.H_STEWARD_BEAT, SYSTEM.boottime_ns())

    beat()
    door = open_door(settings, redis_url, beat)
    context = Context(settings, board, door, Keys(settings.namespace), host_name())
    reader = TotalsReader(context)
    duties = make_duties(context, reader, timetable, models)
    own = user_metrics.of_this_process()
    if own is not None:
        duties.append(user_metrics.FoldUserMetrics(own))
    steward = Steward(context, duties, revive=revive)
    served: metrics.Served | None = None
    if settings.metrics_port is not None:
        exporter = Exporter(context, reader, steward.duties, steward.redis_up)
        try:
            served = metrics.serve(
                exporter.sample,
                port=settings.metrics_port,
                address=settings.metrics_host,
                more=tuple if own is None else own.collect,
            )
            _log.info(f"metrics are served on {settings.metrics_host}, port {served.port}", port=served.port)
        except OSError as e:
            _log.error(f"metrics cannot be served on port {settings.metrics_port}: {e.strerror}")
    try:
        return steward.run()
    finally:
        with contextlib.suppress(OSError):
            door.close()
        if served is not None:
            served.close()
        if models is not None:
            models.close()


def open_door(settings: Settings, redis_url: str, beat: Callable[[], None]) -> housekeeping.Door:
    """The steward's way to Redis. It waits for less than half of what the supervisor grants our beat:
    connecting and asking may each take that long."""
    return housekeeping.Door(redis_url, timeout_s=settings.lease_ms / 8000, beat=beat)


def make_duties(
    context: Context,
    reader: TotalsReader,
    timetable: Timetable | None = None,
    models: Models | None = None,
) -> list[Duty]:
    """All duties, the most urgent first."""
    duties: list[Duty] = [
        Renewal(context),
        Recovery(context),
        Reaper(context),
        TakeBack(context),
        Roles(context),
        Delayed(context),
        Canceller(context),
        Publisher(context),
        Unparker(context),
        Watchdog(context),
        Auditor(context),
        Trimmer(context),
    ]
    if timetable is not None:
        duties.insert(4, Cron(context, timetable))
    if models is not None:
        duties.append(ModelDuty(context, models))
    if context.settings.burst:
        duties.append(Burst(context))
    if context.settings.metrics_port is not None:
        duties.append(reader)
    if context.settings.metrics_port is not None or context.settings.autoscale:
        duties.append(BacklogReader(context))
    return duties
