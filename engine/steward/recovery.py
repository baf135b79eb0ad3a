"""Recovers what a dead worker held: its hash says what is leased, its board what is finished.

Finished jobs are settled with their results, the one that ran is charged, the rest goes back uncharged. If
we die on the way, the recovery id is on the board: our successor repeats the same takeover and goes on. Two
stewards never contradict each other, as both read the same board of a worker that writes no more, and every
lease changes only once.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from tqe.board import layout
from tqe.board.board import Row, SlotView
from tqe.errors import RedisUnavailable, ScriptError
from tqe.steward.context import Context
from tqe.store import housekeeping, settling, working
from tqe.telemetry import logs

_log = logs.get("steward")

PASSES_MAX = 4  # over one incarnation's leases in one go; each normally leaves none
BOARD_PASSES = 2  # after which the board is not believed any more
TRIES_MAX = 5  # of one slot, before its leases are left to the reaper


@dataclass(frozen=True)
class Recovered:
    """One worker that was recovered: how it died, leases settled, leases found fenced already."""

    slot: int
    worker: int
    reason: str
    leases: int
    fenced: int = 0


@dataclass(frozen=True)
class RecoveryReport:
    """Workers that were recovered, and slots that have to wait for the next try."""

    recovered: tuple[Recovered, ...] = ()
    failed: tuple[int, ...] = ()


class Recovery:
    """Brings every dead slot to recovered."""

    name = "recovery"
    period_s = 0.05

    def __init__(self, context: Context) -> None:
        self._context = context
        self.next_in_s: float | None = None
        self._tries: dict[int, int] = {}
        self._blamed: set[int] = (
            set()
        )  # slots whose features function was blamed, should recovery be repeated

    def run_once(self) -> RecoveryReport:
        recovered: list[Recovered] = []
        failed: list[int] = []
        for slot in self._context.board.in_state(layout.DEAD):
            try:
                recovered.append(self._recover(slot))
                self._tries.pop(slot.number, None)
            except RedisUnavailable:
                raise  # the next try goes on where this one ended
            except Exception:
                # A slot that cannot be read must not keep the others from being recovered.
                failed.append(slot.number)
                self._note_failure(slot)
        self.next_in_s = 1.0 if failed else None
        return RecoveryReport(tuple(recovered), tuple(failed))

    def _recover(self, slot: SlotView) -> Recovered:
        reason = death_of(slot)
        trust_board = self._tries.get(slot.number, 0) < BOARD_PASSES
        rows = slot.rows() if trust_board else []
        leases = fenced = 0
        # Before its jobs are back: whoever takes them would call the same function.
        self._blame_features(slot)
        # One that died during a takeover has two ids, and nobody knows which one Redis has seen.
        for incarnation in slot.incarnations:
            settled = self._drain(slot, incarnation, rows)
            leases, fenced = leases + settled.applied, fenced + settled.fenced
        self._end(slot)
        worker = slot.get(layout.C_NUMBER)
        if leases or reason != "exit:0":
            _log.info(f"recovered worker {worker} ({reason}): {leases} leases settled", fenced=fenced)
        return Recovered(slot.number, worker, reason, leases, fenced)

    def _drain(self, slot: SlotView, incarnation: str, rows: list[Row]) -> housekeeping.Settled:
        """Take over one incarnation and settle until nothing is left of it."""
        context, settings = self._context, self._context.settings
        board, keys, door = context.board, context.keys, context.door
        mine = board.recovery_id(slot.number)
        if not mine:
            mine = context.new_id()
            # Before it is sent: whatever happens from here on, the board says where the leases are.
            board.set_recovery_id(slot.number, mine)
        applied = fenced = 0
        for attempt in range(PASSES_MAX):
            call = working.takeover(keys, incarnation, mine, settings.lease_ms)
            taken = working.read_takeover(door.run(call))
            context.note_redis_ms(taken.now_us // 1000)
            if not taken.leases:
                break
            policy = crash_policy(slot, settings.crashes_max, taken.now_us // 1000)
            leases = housekeeping.sorted_out(door, keys, mine, taken.leases)
            batch = _build(leases, rows if attempt < BOARD_PASSES else [], policy, attempt)
            settled = housekeeping.settle(
                door, keys, mine, batch, result_ttl_s=settings.result_ttl_s, dlq_max=settings.dlq_max
            )
            applied, fenced = applied + settled.applied, fenced + settled.fenced
            if settled.bad:
                _log.error(
                    f"settle refused {len(settled.bad)} leases of worker {slot.get(layout.C_NUMBER)}",
                    first=settled.bad[0].decode("ascii", "replace"),
                )
        if not door.run(working.leave(keys, mine)):
            raise ScriptError(f"leases of {mine} are left after {PASSES_MAX} passes")
        board.set_recovery_id(slot.number, "")
        return housekeeping.Settled(applied, fenced, [])

    def _end(self, slot: SlotView) -> None:
        context = self._context
        self._blamed.discard(slot.number)
        scoring = 0 if slot.get(layout.C_FEATURES) else slot.get(layout.C_SCORING)
        if scoring and slot.get(layout.C_KILL_KIND) != layout.KILL_DRAIN:
            context.scoring_deaths.append(scoring)
        context.count("recovered")
        context.board.set_recovery_id(slot.number, "")
        slot.set(layout.C_STATE, layout.RECOVERED)

    def _blame_features(self, slot: SlotView) -> None:
        """It died in a task's features function: no job and no model is to blame, and each replacement
        would die the same way. One that never returned is as clear as two deaths."""
        number = slot.get(layout.C_FEATURES)
        if not number or slot.number in self._blamed or slot.get(layout.C_KILL_KIND) == layout.KILL_DRAIN:
            return
        self._blamed.add(slot.number)
        name = slot.task_name(number - 1)
        stuck = slot.get(layout.C_KILL_KIND) == layout.KILL_STUCK
        deaths = self._context.board.blame_features(name, layout.FEATURES_DEATHS_MAX if stuck else 1)
        said = f"a worker {'hung' if stuck else 'died'} in the features function of {name}"
        if deaths >= layout.FEATURES_DEATHS_MAX:
            said += ": it is not called any more on this host, and these jobs keep their places"
        _log.error(said)

    def _note_failure(self, slot: SlotView) -> None:
        context = self._context
        tries = self._tries[slot.number] = self._tries.get(slot.number, 0) + 1
        worker = slot.get(layout.C_NUMBER)
        context.count("recovery_failures")
        _log.exception(f"recovery of worker {worker} failed (try {tries})")
        if tries >= TRIES_MAX:
            _log.error(
                f"what worker {worker} held is left to the reaper: whole leases return when theirs ends"
            )
            del self._tries[slot.number]
            self._end(slot)


def _build(
    leases: list[tuple[bytes, bytes]], rows: list[Row], policy: settling.CrashPolicy, attempt: int
) -> settling.SettleBatch:
    if attempt < PASSES_MAX - 1:
        return settling.recover(leases, rows, policy)
    # Refused with the board and without it: nobody will ever settle it, so it is kept where people look.
    batch = settling.SettleBatch()
    for lease, frame in leases:
        batch.add(settling.quarantined(lease, frame))
    return batch


def death_of(slot: SlotView) -> str:
    """How a dead worker ended: `crash:SIGKILL`, `crash:exit 3`, `exit:0`, `hard_limit`, `drain`, `stuck`."""
    kind = slot.get(layout.C_KILL_KIND)
    if kind in _KILLS:
        return _KILLS[kind]
    number, code = slot.get(layout.C_SIGNAL), slot.get(layout.C_EXIT)
    if number:
        return f"crash:{_signal_name(number)}"
    if code == 0 and not slot.get(layout.C_IN_USER):
        return "exit:0"
    return f"crash:exit {code}"


_KILLS = {
    layout.KILL_HARD_LIMIT: "hard_limit",
    layout.KILL_DRAIN: "drain",
    layout.KILL_STUCK: "stuck",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def running(slot: SlotView) -> tuple[int, int] | None:
    """(row, index) of the job to blame for a death; it is charged only if its state is still `started`.

    Without coroutines it is the job on the board, also between its return and its record: what dies while
    its result is being encoded would otherwise come back for ever. Beside coroutines it is the one whose step
    ran, else the job on the helper thread, else nobody: a process that waits was killed from outside.
    """
    if slot.get(layout.C_IN_USER) or not slot.get(layout.C_ASYNC):
        return slot.get(layout.C_ROW), slot.get(layout.C_INDEX)
    helped = slot.get(layout.C_HELPER)
    return ((helped >> 32) - 1, helped & 0xFFFF) if helped else None


def crash_policy(slot: SlotView, crashes_max: int, now_ms: int) -> settling.CrashPolicy:
    """Who is charged for a death: the job on the board, unless the kill was ours and not meant for it."""
    step, kind = slot.get(layout.C_IN_USER), slot.get(layout.C_KILL_KIND)
    # The kill took a moment: a job that began in between is not the one that was too slow.
    hit = kind == layout.KILL_HARD_LIMIT and step == slot.get(layout.C_KILL_STEP)
    # A loop that stands still with none of its own steps running: the helper's job keeps it from running.
    held_up = kind == layout.KILL_STUCK and not step and slot.get(layout.C_HELPER) != 0
    # Neither a features function nor a predictor is a job's doing.
    apart = bool(slot.get(layout.C_FEATURES) or slot.get(layout.C_SCORING))
    return settling.CrashPolicy(
        reason=death_of(slot),
        current=running(slot),
        blame=hit or ((kind == layout.KILL_NONE or held_up) and not apart),
        hard_limit=hit,
        retries=slot.get(layout.C_RETRIES),
        crashes_max=crashes_max,
        now_ms=now_ms,
    )
