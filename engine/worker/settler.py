"""Tells Redis what one worker has finished, one settle at a time, and reads the answers.

At most one settle is unanswered: its outcomes stay in one half of the outcome area while the next ones fill
the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tqe import clock
from tqe.board.board import Record, SlotView
from tqe.codec import hot
from tqe.settings import Settings
from tqe.store import settling
from tqe.store.call import Call
from tqe.store.keys import Keys
from tqe.worker.hold import Hold

log = logging.getLogger("tqe.worker")

# A lease that has begun to end is not kept waiting longer for its slowest job.
PARTIAL_AFTER_NS: Final = 50_000_000
APPLIED: Final = ord("1")
FENCED: Final = ord("0")


@dataclass(frozen=True, slots=True)
class Change:
    """What one lease in a settle becomes once it is applied: a claim of ours shrinks to what is kept of
    it."""

    lease: hot.Lease
    claim: tuple[int, int]
    kept: list[tuple[int, int]]
    then: Callable[[], None] | None = None  # called once it is applied


@dataclass(slots=True)
class Unanswered:
    """A settle whose replies were not read, and its half of the outcome area.

    The tickets of its calls are Change for a lease that is settled in part, the Lease for one that is settled
    whole.
    """

    half: int | None
    calls: list[settling.SettleCall]
    futures: list[asyncio.Future[Any]] = field(default_factory=list)
    sent_at: int = 0  # ns; a fetch of the same write has the same, and comes after it

    @property
    def done(self) -> bool:
        return bool(self.futures) and all(future.done() for future in self.futures)


class Settler:
    """One worker's settler. `fenced` counts leases that somebody else owned by the time we settled them."""

    def __init__(self, settings: Settings, keys: Keys, slot: hot.Slot, view: SlotView, hold: Hold) -> None:
        self._settings = settings
        self._keys = keys
        self._slot = slot
        self._view = view
        self._hold = hold
        self._returned: list[tuple[bytes, list[bytes]]] = []
        self._damaged: list[tuple[bytes, bytes]] = []
        self._told: list[tuple[settling.Item, Change]] = []
        self.unanswered: Unanswered | None = None
        self.trouble = False  # a lease was fenced or refused: what we hold must be compared with Redis

    def give_back(self, lease: bytes, frames: list[bytes]) -> None:
        """A frame that never became a lease here (no row was free, or others run first): it goes back, as
        these frames."""
        self._returned.append((lease, frames))

    def quarantine(self, lease: bytes, frame: bytes) -> None:
        """A frame that failed its check: settled as damaged, with its bytes."""
        self._damaged.append((lease, frame))

    def tell(self, item: settling.Item, change: Change) -> None:
        """Something about a lease that its row does not say."""
        change.lease.settling = True
        self._told.append((item, change))

    @property
    def busy(self) -> bool:
        """Something is to be told, or was told and not answered."""
        return self.unanswered is not None or self.urgent

    @property
    def returning(self) -> bool:
        """Frames that never became leases here are to go back."""
        return bool(self._returned)

    @property
    def urgent(self) -> bool:
        """Something goes back that others could take, or is damaged: do not wait for the next fetch."""
        return bool(self._returned or self._damaged or self._told or self._hold.cut)

    def due(self, now_ns: int, *, partial: bool, beside: bool = True) -> list[hot.Lease]:
        """Leases to settle now: those that have ended or were cut, and with `partial` whatever has something
        to tell.

        Without it, a lease with jobs beside others (`beside`: there may be some) tells 50 ms after the first
        of them has ended.
        """
        hold = self._hold
        found, unclaimed = hold.take_ended()
        for lease in unclaimed:
            self.release(lease)
        if partial or beside:
            known = set(hot.rows_of(found))
            for lease in hold:
                late = lease.first_done_ns and now_ns - lease.first_done_ns > PARTIAL_AFTER_NS
                if (partial or late) and not lease.settling and lease.row not in known and lease.to_settle():
                    found.append(lease)
        return found

    def begin(self, leases: list[hot.Lease], incarnation: str, *, switch: bool = True) -> list[Call]:
        """Build the settle of these leases. With `switch` its outcomes stay in their half until `finish`."""
        batch = self._build(leases)
        if not batch:
            return []
        calls = batch.calls(
            self._keys, incarnation, result_ttl_s=self._settings.result_ttl_s, dlq_max=self._settings.dlq_max
        )
        half = self._slot.begin_settle(hot.rows_of(leases)) if switch else None
        self.unanswered = Unanswered(half, calls)
        return [made.call for made in calls]

    def sent(self, futures: Sequence[asyncio.Future[Any]], at_ns: int) -> None:
        """The replies to the calls that `begin` built."""
        if self.unanswered is not None:
            self.unanswered.futures = list(futures)
            self.unanswered.sent_at = at_ns

    def finish(self) -> None:
        """Read the answers. Raises what a call raised: then nobody knows what was applied, and the worker
        takes itself over."""
        pending = self.unanswered
        if pending is None:
            return
        replies = [future.result() for future in pending.futures]
        self.unanswered = None
        for made, reply in zip(pending.calls, replies, strict=True):
            marks: bytes = reply[1]
            if made.alike and not marks.strip(b"1"):
                self._hold.close(made.tickets, self._slot)
                continue
            whole: list[hot.Lease] = []
            for name, ticket, mark in zip(made.leases, made.tickets, marks, strict=True):
                if isinstance(ticket, hot.Lease) and mark == APPLIED:
                    whole.append(ticket)
                else:
                    self._apply(name, mark, ticket)
            self._hold.close(whole, self._slot)
        self._view.add("settles", len(pending.calls))
        elapsed_us = max(0, clock.boottime_ns() - pending.sent_at) // 1000
        self._view.add("settle_us", elapsed_us * len(pending.calls))
        if pending.half is not None:
            self._slot.end_settle(pending.half)

    def forget(self) -> None:
        """The replies are lost; what they would have told is read from Redis."""
        self.unanswered = None
        self._returned.clear()
        self._damaged.clear()
        self._told.clear()
        self._hold.ended.clear()
        self._hold.cut.clear()
        for lease in self._hold:
            lease.settling = False

    def drop(self, lease: hot.Lease) -> None:
        """Nothing of a lease is ours any more; its row is free once nothing of it runs."""
        lease.claims = []
        lease.lost = True
        self._hold.unready(lease)
        self.release(lease)

    def release(self, lease: hot.Lease) -> None:
        """Free the row of a lease that is settled and idle."""
        if not lease.claims and not lease.running and self._hold.remove(lease):
            self._slot.close_row(lease.row)

    def _build(self, leases: list[hot.Lease]) -> settling.SettleBatch:
        batch = settling.SettleBatch()
        groups, others = hot.plain_done(leases)
        for (second, char, value), done in groups.items():
            bucket = (second, char) if value else None
            batch.add_done(bucket, value, hot.names_of(done), done)
        if others:
            ones, larger, others = hot.results_of(self._slot, others)
            for (second, char, value), (recorded, fields) in ones.items():
                batch.add_results((second, char), value, hot.names_of(recorded), fields, recorded)
            for lease, told in larger:
                self._add_completed(batch, lease, told)
        if others:
            records = self._records()
            for lease in others:
                self._add_claims(batch, lease, records.get(lease.row, {}))
        for name, frames in self._returned:
            batch.add(settling.returned(name, frames))
        for name, frame in self._damaged:
            batch.add(settling.quarantined(name, frame))
        for item, change in self._told:
            batch.add(item, change)
        self._returned.clear()
        self._damaged.clear()
        self._told.clear()
        return batch

    def _add_completed(self, batch: settling.SettleBatch, lease: hot.Lease, told: list[bytes]) -> None:
        """All that is left of a lease has completed, with these results."""
        ((base, n),) = lease.claims
        name = settling.lease_name(lease.frame_id, base, n, lease.run)
        item = settling.Item(
            name, lease.frame_id, True, lease.started_ms, lease.finished_ms, [(base, n, "C")]
        )
        item.results = told
        batch.add(item, Change(lease, (base, n), []))

    def _add_claims(self, batch: settling.SettleBatch, lease: hot.Lease, records: dict[int, Record]) -> None:
        row = self._view.row(lease.row)
        row.records = records
        header = lease.header
        for base, n in lease.claims:
            item = settling.claim(
                lease.frame,
                header,
                row,
                base,
                n,
                pieces=lease.pieces,
                started_ms=lease.started_ms,
                finished_ms=lease.finished_ms,
            )
            kept = item.kept
            if kept == [(base, n)]:
                continue  # nothing of it has ended
            batch.add(item, Change(lease, (base, n), kept))
            lease.settling = True
        lease.first_done_ns = 0
        lease.pieces = ()

    def _records(self) -> dict[int, dict[int, Record]]:
        found: dict[int, dict[int, Record]] = {}
        for row, record in self._view.all_records():
            found.setdefault(row, {})[record.index] = record
        return found

    def _apply(self, name: bytes, mark: int, ticket: object) -> None:
        change = ticket
        if isinstance(ticket, hot.Lease):
            change = Change(ticket, ticket.claims[0], [])
        applied = mark == APPLIED
        if applied:
            self._hold.expected += (len(change.kept) if isinstance(change, Change) else 0) - 1
        elif mark == FENCED:
            self._view.add("fenced")
        else:
            log.error(
                "settle refused the parts of lease %s: a defect of the engine; it stays leased", name.decode()
            )
        if not isinstance(change, Change):
            return
        lease = change.lease
        self.trouble = self.trouble or not (applied or lease.lost)
        lease.settling = False
        lease.claims = [claim for claim in lease.claims if claim != change.claim] + (
            change.kept if applied else []
        )
        if applied and change.then is not None:
            change.then()
        if applied and len(lease.claims) == 1:
            self._slot.narrow_row(lease.row, *lease.claims[0])
        if not lease.claims:
            if not applied:
                lease.lost = True
                lease.skip_rest()
                self._hold.unready(lease)
            self.release(lease)
