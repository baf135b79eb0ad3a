"""Submits the jobs of schedules when their slots come, each slot once among all stewards.

Every steward of an app looks at the same table in Redis and tries to submit what is due; the idempotency key
of a slot lets one of them through. Only then is the slot noted: who dies in between leaves a slot that is
tried again and found to be a duplicate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tqe.codec import payload as codec_payload
from tqe.errors import SubmitError
from tqe.job import IDS, TERMINAL, job_id
from tqe.schedule import Schedule, Timetable
from tqe.steward.context import Context
from tqe.store import housekeeping, producing, scheduling
from tqe.store.reading import parse_snapshot
from tqe.store.scheduling import Move, Row, View
from tqe.telemetry import logs

_log = logs.get("steward")

PERIOD_S: Final = 1.0
SOONEST_S: Final = 0.005
SLOTS_MAX: Final = 100  # submitted in one pass: other duties want their turn
LATE_MS: Final = 60_000  # a slot seen to later than this was missed
AHEAD_MS: Final = 60_000  # a schedule further ahead of Redis' clock than this stands wrong: the clock was set
REGISTER_TRIES: Final = 5


@dataclass(frozen=True)
class CronReport:
    """Slots of this pass: submitted here, found submitted by another steward, and passed over."""

    submitted: int = 0
    duplicates: int = 0
    skipped: int = 0


class _Slot(NamedTuple):
    """A slot that is to be submitted."""

    schedule: Schedule
    slot_ms: int


class Cron:
    """The cron duty. `redis_now_ms` makes of Redis' time the one that counts, for tests."""

    name = "cron"

    def __init__(
        self,
        context: Context,
        timetable: Timetable,
        *,
        redis_now_ms: Callable[[int], int] = lambda told_ms: told_ms,
    ) -> None:
        self._context = context
        self._timetable = timetable
        self._now_ms = redis_now_ms
        self._registered = False
        self._idle = False
        self._damaged: tuple[str, ...] = ()
        self._told_ms: dict[str, int] = {}  # by schedule: the newest slot when the log told of missed ones
        self._next: dict[str, tuple[Schedule, int, int | None]] = {}  # name -> state, and the next slot then
        self.period_s = PERIOD_S
        self.next_in_s: float | None = None

    def run_once(self) -> CronReport:
        self.next_in_s = None
        if not self._registered:
            self._register()
        if self._idle or not self._registered:
            return CronReport()
        context = self._context
        view = self._look()
        mine = [row for row in view.rows.values() if row.app == self._timetable.app and not row.paused]
        due, moves, skipped = self._due(mine, view.now_ms)
        due, held_back = self._without_overlaps(due, view)
        moves += held_back
        submitted, duplicates = self._submit(due, moves, view.now_ms)
        skipped += len(held_back)
        context.count("cron_submitted", submitted)
        context.count("cron_skipped", skipped)
        if self.next_in_s is None:
            self._rest(mine, view.now_ms)
        return CronReport(submitted, duplicates, skipped)

    # -------------------------------------------------------------- what stands in Redis

    def _register(self) -> None:
        context = self._context
        for _ in range(REGISTER_TRIES):
            done = housekeeping.watched(
                context.door,
                context.keys.cron,
                lambda pipe: scheduling.register(pipe, context.keys, self._timetable, now_ms=self._now_ms),
            )
            if done is None:
                continue  # another steward was quicker
            self._registered = True
            if done.written or done.removed:
                _log.info("schedules are registered", written=len(done.written), removed=len(done.removed))
            if done.followed:
                _log.info("a younger supervisor of this app has registered its schedules: they count")
            for name, app in done.taken:
                _log.warning(f"schedule {name} was one of {app}: rename one of the two, or only ours runs")
            self._idle = not self._timetable.schedules and not done.followed
            return

    def _look(self) -> View:
        context = self._context
        view = scheduling.read_look(
            housekeeping.ask(context.door, *scheduling.look_commands(context.keys)), self._now_ms
        )
        if view.damaged != self._damaged:
            self._damaged = view.damaged
            if view.damaged:
                _log.error(f"schedules that cannot be read: {', '.join(view.damaged)}; start the app anew")
        return view

    # -------------------------------------------------------------- what is due

    def _due(self, rows: Sequence[Row], now_ms: int) -> tuple[list[_Slot], list[Move], int]:
        """The slots to submit, the schedules that only go forward, and how many slots are passed over."""
        due: list[_Slot] = []
        moves: list[Move] = []
        skipped = 0
        for row in rows:
            schedule, last_ms = row.schedule, row.last_ms
            if last_ms is None or last_ms > now_ms + AHEAD_MS:
                self._begin_anew(row, now_ms)
                continue
            next_ms = self._next_slot(schedule, last_ms)
            if next_ms is None or next_ms > now_ms:
                continue
            slots, more = schedule.due(last_ms, now_ms)
            chosen = _chosen(schedule, slots, now_ms)
            room = SLOTS_MAX - len(due)
            if chosen and not room:
                self.next_in_s = 0.0  # counted and told when its turn comes
                continue
            passed = len(slots) + more - len(chosen)
            skipped += passed
            if passed or (chosen and now_ms - chosen[-1] > LATE_MS):
                self._tell_missed(schedule, slots[-1] if slots else now_ms, len(slots) + more, len(chosen))
            if len(chosen) > room:
                self.next_in_s = 0.0
                chosen = chosen[:room]
            elif not chosen:
                # Without a slot: all of them lie beyond the horizon.
                moves.append(Move(schedule.name, slots[-1] if slots else now_ms))
            due += [_Slot(schedule, slot) for slot in chosen]
        return due, moves, skipped

    def _tell_missed(self, schedule: Schedule, newest_ms: int, due: int, chosen: int) -> None:
        """Once, although many slots take several passes, and a full Redis takes them later."""
        if newest_ms > self._told_ms.get(schedule.name, 0):
            self._told_ms[schedule.name] = newest_ms
            _log.warning(
                f"schedule {schedule.name} missed slots", due=due, submitted=chosen, policy=schedule.missed
            )

    def _begin_anew(self, row: Row, now_ms: int) -> None:
        _log.warning(f"schedule {row.schedule.name} stood at no time that has been; it counts from now on")
        housekeeping.ask(self._context.door, scheduling.begin_anew(self._context.keys, row, now_ms))

    def _next_slot(self, schedule: Schedule, last_ms: int) -> int | None:
        """The first slot behind the last; remembered, since it is asked for each second."""
        known = self._next.get(schedule.name)
        if known is None or known[0] != schedule or known[1] != last_ms:
            known = self._next[schedule.name] = (schedule, last_ms, schedule.next_after(last_ms))
        return known[2]

    def _without_overlaps(self, due: list[_Slot], view: View) -> tuple[list[_Slot], list[Move]]:
        """Slots whose schedule's last job goes on are passed over where overlaps are not wanted."""
        context = self._context
        asked = [
            (at, job)
            for at, (schedule, _) in enumerate(due)
            if not schedule.overlap and (job := view.rows[schedule.name].last_job)
        ]
        if not asked:
            return due, []
        values = housekeeping.ask(
            context.door, *scheduling.state_commands(context.keys, [job for _, job in asked])
        )
        held = set()
        for (at, _), value in zip(asked, values, strict=True):
            snapshot = parse_snapshot(value)
            if snapshot is not None and snapshot.state_of(0) not in TERMINAL:
                held.add(at)
        moves = [Move(due[at].schedule.name, due[at].slot_ms) for at in sorted(held)]
        return [slot for at, slot in enumerate(due) if at not in held], moves

    # -------------------------------------------------------------- submitting

    def _submit(self, due: Sequence[_Slot], moves: Sequence[Move], now_ms: int) -> tuple[int, int]:
        """Submit and note; how many were submitted here, and how many another steward had submitted."""
        context = self._context
        held: dict[int, tuple[str, str]] = {}
        noted = {move.name: move for move in moves}
        frames: list[producing.Outgoing] = []
        sent: list[_Slot] = []
        for slot in due:
            try:
                frames.append(self._frame(slot, now_ms))
                sent.append(slot)
            except SubmitError as e:
                # It is one schedule's fault: the others go on.
                _log.error(f"schedule {slot.schedule.name} cannot submit its job: {e}")
                noted[slot.schedule.name] = Move(slot.schedule.name, slot.slot_ms)
        if frames:
            call, positions = producing.enqueue_call(context.keys, frames)
            held = producing.read_enqueue(context.door.run(call), positions).held
            for at, (schedule, slot_ms) in enumerate(sent):
                name = held[at][0] if at in held else job_id(frames[at].frame_id, 0)
                noted[schedule.name] = Move(schedule.name, slot_ms, name)
        # If we die here, the slots are submitted again and found to be duplicates.
        if noted:
            context.door.run(scheduling.advance_call(context.keys, list(noted.values())))
        return len(sent) - len(held), len(held)

    def _frame(self, slot: _Slot, now_ms: int) -> producing.Outgoing:
        schedule, slot_ms = slot
        settings = self._context.settings
        return producing.frame_of_one(
            IDS.frame_id(),
            schedule.type,
            codec_payload.encode(schedule.payload_of(slot_ms), payload_max_bytes=settings.payload_max_bytes),
            schedule.options_at(slot_ms, now_ms),
            schedule.key(slot_ms),
            key_ttl_s=schedule.key_ttl_s,
            zstd_threshold_bytes=settings.zstd_threshold_bytes,
        )

    def _rest(self, rows: Sequence[Row], now_ms: int) -> None:
        """Sleep until the next slot, at most the period: somebody may resume a schedule."""
        nexts = [
            known[2]
            for row in rows
            if (known := self._next.get(row.schedule.name)) is not None and known[2] is not None
        ]
        left_ms = min(nexts, default=now_ms + 60_000) - now_ms
        if 0 < left_ms < PERIOD_S * 1000:
            self.next_in_s = max(SOONEST_S, left_ms / 1000)


def _chosen(schedule: Schedule, slots: Sequence[int], now_ms: int) -> list[int]:
    """Which of the due slots are submitted. All but the last were missed, and so was the last if it is
    late."""
    if schedule.missed == "all":
        return list(slots)
    if not slots or (schedule.missed == "skip" and now_ms - slots[-1] > LATE_MS):
        return []
    return [slots[-1]]
