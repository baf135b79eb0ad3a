"""Renews the leases of this host's workers, and of what is being recovered, as long as they deserve it.

A worker that is stopped, or whose loop stands still, lives and yet does nothing: renewing it for ever would
keep its jobs from everybody. So a lease is renewed only on signs of life; otherwise it ends, is reaped, and
the worker, should it ever go on, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.steward.context import MS, Context
from tqe.store import housekeeping
from tqe.telemetry import logs

_STOPPED: Final = {"T": "stopped", "t": "traced", "Z": "dead", "X": "dead", "": "gone"}
_log = logs.get("steward")


@dataclass(frozen=True)
class RenewalReport:
    """Incarnations that were renewed, that Redis no longer knows, and slots that were not renewed with the
    reason.

    `resynced`: slots that were told to take themselves over.
    """

    renewed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    withheld: dict[int, str] = field(default_factory=dict)
    resynced: tuple[int, ...] = ()


class Renewal:
    """One renewal of everything that stands on the board."""

    name = "renewal"

    def __init__(self, context: Context) -> None:
        self._context = context
        self.period_s = context.settings.lease_ms / 3000
        self.next_in_s: float | None = None
        self._told: dict[int, str] = {}
        self._surplus: dict[
            str, int
        ] = {}  # idle incarnation → how often it held leases that it does not know

    def run_once(self) -> RenewalReport:
        context = self._context
        now_ns = context.now_ns()
        withheld: dict[int, str] = {}
        slots: dict[str, SlotView] = {}
        for slot in context.live_slots():
            names = slot.incarnations
            reason = self._reason_against(slot, now_ns) if names else ""
            if reason:
                withheld[slot.number] = reason
            else:
                slots |= dict.fromkeys(names, slot)
        recoveries = [one for slot in context.board.slots if (one := context.board.recovery_id(slot.number))]
        self._tell(withheld)
        # A worker that was only late must not lose its lease for one unlucky look.
        self.next_in_s = min(1.0, self.period_s / 4) if withheld else None
        incarnations = list(dict.fromkeys([*slots, *recoveries]))
        if not incarnations:
            return RenewalReport(withheld=withheld)
        lease_ms = context.settings.lease_ms
        sent_ns = context.now_ns()
        call = housekeeping.renew(context.keys, incarnations, lease_ms)
        reply = housekeeping.read_renew(incarnations, context.door.run(call))
        context.note_redis_ms(reply.now_us // 1000)
        until_ns = sent_ns + lease_ms * MS
        resynced = [
            slot.number
            for slot in {slot.number: slot for slot in slots.values()}.values()
            if self._apply(slot, reply, until_ns)
        ]
        return RenewalReport(
            renewed=tuple(one for one in incarnations if reply.leases[one][0]),
            gone=tuple(one for one in incarnations if not reply.leases[one][0]),
            withheld=withheld,
            resynced=tuple(resynced),
        )

    def _reason_against(self, slot: SlotView, now_ns: int) -> str:
        context = self._context
        state = context.process_state(slot.get(layout.C_PID))
        if state in _STOPPED:
            return f"its process is {_STOPPED[state]}"
        if now_ns - slot.get(layout.C_BEAT) <= context.settings.lease_ms * MS // 3:
            return ""
        step, hard_ms = slot.get(layout.C_IN_USER), slot.get(layout.C_HARD_MS)
        if not step:
            return "its loop stands still"
        since_ns = context.sightings.since_ns(slot, step)
        if hard_ms and since_ns is not None and now_ns - since_ns > hard_ms * MS:
            return "its job has run past its hard limit"
        return ""

    def _apply(self, slot: SlotView, reply: housekeeping.Renewed, until_ns: int) -> bool:
        """Write the new end of the lease on the board; True if the worker was told to take itself over."""
        names = slot.incarnations
        if not all(name in reply.leases for name in names):
            return False  # a takeover came in between: it has its own lease end
        if any(reply.leases[name][0] for name in names):
            if until_ns > slot.get(layout.C_LEASE_UNTIL):
                slot.set(layout.C_LEASE_UNTIL, until_ns)
            return self._audit(slot, names, reply)
        # Neither id is registered: reaped, or Redis lost it. A busy worker learns it at its next fetch, an
        # idle one would not for as long as no token comes.
        return self._resync(slot, f"worker {slot.get(layout.C_NUMBER)} has lost its lease")

    def _audit(self, slot: SlotView, names: list[str], reply: housekeeping.Renewed) -> bool:
        """A worker that has nothing to do and holds leases in Redis does not know of them: found twice, it
        looks."""
        held = sum(reply.leases[name][1] for name in names)
        name = names[0]
        idle = len(names) == 1 and slot.get(layout.C_PHASE) == layout.PHASE_IDLE
        if not held or not idle or slot.rows(records=False):
            self._surplus.pop(name, None)
            return False
        if name not in self._surplus:
            self._surplus = {name: held, **{k: v for k, v in self._surplus.items() if k in reply.leases}}
            return False
        del self._surplus[name]
        return self._resync(slot, f"idle worker {slot.get(layout.C_NUMBER)} holds {held} unknown leases")

    def _resync(self, slot: SlotView, why: str) -> bool:
        if slot.get(layout.C_STOP) != layout.STOP_NONE or not slot.get(layout.C_READY):
            return False
        # If the supervisor says `drain` at this very moment it is overwritten here; it says it again at
        # each poll.
        slot.set(layout.C_STOP, layout.STOP_RESYNC)
        _log.warning(f"{why}: it takes itself over")
        self._context.count("resynced")
        return True

    def _tell(self, withheld: dict[int, str]) -> None:
        for number, reason in withheld.items():
            if self._told.get(number) != reason:
                worker = self._context.board.slots[number].get(layout.C_NUMBER)
                _log.warning(
                    f"worker {worker} is not renewed: {reason}; its jobs go to others when its lease ends"
                )
                self._context.count("withheld")
        self._told = withheld
