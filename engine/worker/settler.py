"""Tells Redis what one worker has finished, one settle at a time, and reads the answers.

At most one settle is unanswered: its outcomes stay in one half of the outcome area while the next ones fill the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqe.board import layout
from tqe.board.board import Record, SlotView
from tqe.codec import hot
from tqe.settings import Settings
from tqe.store import settling
from tqe.store.call import Call
from tqe.store.keys import Keys
from tqe.worker.hold import Hold

log = logging.getLogger("tqe.worker")

# A lease that has begun to end is not kept waiting longer for its slowest job.
PARTIAL_AFTER_NS = 50_000_000


@dataclass(slots=True)
class Change:
    """What one lease in a settle becomes once it is applied."""

    lease: hot.Lease
    claim: tuple[int, int]
    kept: list[tuple[int, int]]


@dataclass(slots=True)
class Unanswered:
    """A settle whose reply was not read: its half of the outcome area, its leases in the order of the marks."""

    half: int | None
    calls: list[settling.SettleCall]
    changes: dict[bytes, Change]
    futures: list[asyncio.Future[Any]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(future.done() for future in self.futures)


class Settler:
    """One worker's settler. `fenced` counts leases that somebody else owned by the time we settled them."""

    def __init__(self, settings: Settings, keys: Keys, slot: hot.Slot, view: SlotView, hold: Hold) -> None:
        self._settings = settings
        self._keys = keys
        self._slot = slot
        self._view = view
        self._hold = hold
        self._returned: list[tuple[bytes, bytes]] = []
        self._damaged: list[tuple[bytes, bytes]] = []
        self.unanswered: Unanswered | None = None
        self.trouble = False  # a lease was fenced or refused: what we hold must be compared with Redis

    def give_back(self, lease: bytes, frame: bytes) -> None:
        """A frame that never became a lease here (no row was free): it goes back whole."""
        self._returned.append((lease, frame))

    def quarantine(self, lease: bytes, frame: bytes) -> None:
        """A frame that failed its check: settled as damaged, with its bytes."""
        self._damaged.append((lease, frame))

    @property
    def urgent(self) -> bool:
        """Something goes back that others could take, or is damaged: do not wait for the next fetch."""
        return bool(self._returned or self._damaged)

    def due(self, now_ns: int, *, partial: bool) -> list[hot.Lease]:
        """Leases to settle now: those that have ended, and with `partial` whatever has something to tell."""
        found = []
        for lease in self._hold:
            if lease.settling or lease.lost:
                continue
            if lease.ended():
                found.append(lease)
            elif partial or (lease.first_done_ns and now_ns - lease.first_done_ns > PARTIAL_AFTER_NS) or lease.pieces:
                if lease.to_settle():
                    found.append(lease)
        return found

    def begin(self, leases: Iterable[hot.Lease], incarnation: str, *, switch: bool = True) -> list[Call]:
        """Build the settle of these leases. With `switch` its outcomes stay in their half until `finish`."""
        batch, changes = self._build(leases)
        if not batch:
            return []
        calls = batch.calls(
            self._keys, incarnation, result_ttl_s=self._settings.result_ttl_s, dlq_max=self._settings.dlq_max
        )
        rows = [change.lease.row for change in changes.values()]
        half = self._slot.begin_settle(rows) if switch else None
        self.unanswered = Unanswered(half, calls, changes)
        return [made.call for made in calls]

    def sent(self, futures: Sequence[asyncio.Future[Any]]) -> None:
        """The replies to the calls that `begin` built."""
        if self.unanswered is not None:
            self.unanswered.futures = list(futures)

    def finish(self) -> None:
        """Read the answers. Raises what a call raised: then nobody knows what was applied, and the worker takes itself over."""
        pending = self.unanswered
        if pending is None:
            return
        replies = [future.result() for future in pending.futures]
        self.unanswered = None
        for made, reply in zip(pending.calls, replies, strict=True):
            marks: bytes = reply[1]
            for lease, mark in zip(made.leases, marks, strict=True):
                self._apply(lease, mark, pending.changes.get(lease))
        self._view.add("settles", len(pending.calls))
        if pending.half is not None:
            self._slot.end_settle(pending.half)

    def forget(self) -> None:
        """The replies are lost; what they would have told is read from Redis."""
        pending, self.unanswered = self.unanswered, None
        self._returned.clear()
        self._damaged.clear()
        if pending is not None:
            for change in pending.changes.values():
                change.lease.settling = False

    def drop(self, lease: hot.Lease) -> None:
        """Nothing of a lease is ours any more; its row is free once nothing of it runs."""
        lease.claims = []
        lease.lost = True
        self._hold.unready(lease)
        self.release(lease)

    def release(self, lease: hot.Lease) -> None:
        """Free the row of a lease that is settled and idle."""
        if not lease.claims and not lease.running:
            self._hold.remove(lease)
            self._slot.close_row(lease.row)

    def _build(self, leases: Iterable[hot.Lease]) -> tuple[settling.SettleBatch, dict[bytes, Change]]:
        batch = settling.SettleBatch()
        changes: dict[bytes, Change] = {}
        records: dict[int, dict[int, Record]] | None = None
        for lease in leases:
            header = lease.header
            if lease.plain_done() and not (lease.attempts or header.crashes) and lease.claims == [(lease.base, lease.n)]:
                value = b""
                if lease.tracked:
                    value = settling.snapshot_done(header, lease.frame, lease.started_ms, lease.finished_ms)
                batch.add_done(lease.frame_id, header.lease, value)
                changes[header.lease] = Change(lease, lease.claims[0], [])
                lease.settling = True
                continue
            if records is None:
                records = self._records()
            self._add_claims(batch, changes, lease, records.get(lease.row, {}))
        for name, frame in self._returned:
            batch.add(settling.returned(name, frame))
        for name, frame in self._damaged:
            batch.add(settling.quarantined(name, frame))
        self._returned.clear()
        self._damaged.clear()
        return batch, changes

    def _add_claims(
        self,
        batch: settling.SettleBatch,
        changes: dict[bytes, Change],
        lease: hot.Lease,
        records: dict[int, Record],
    ) -> None:
        row = self._view.row(lease.row)
        row.records = records
        for base, n in lease.claims:
            item = settling.claim(
                lease.frame,
                lease.header,
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
            batch.add(item)
            changes[item.lease] = Change(lease, (base, n), kept)
            lease.settling = True
        lease.first_done_ns = 0
        lease.pieces = ()

    def _records(self) -> dict[int, dict[int, Record]]:
        found: dict[int, dict[int, Record]] = {}
        for half in range(layout.HALVES):
            for row, record in self._view.records(half):
                found.setdefault(row, {})[record.index] = record
        return found

    def _apply(self, name: bytes, mark: int, change: Change | None) -> None:
        hold = self._hold
        if mark == ord("1"):
            hold.expected += (len(change.kept) if change else 0) - 1
        else:
            self.trouble = True
            if mark == ord("0"):
                self._view.add("fenced")
            else:
                log.error("settle refused the parts of lease %s: a defect of the engine; it stays leased", name.decode())
        if change is None:
            return
        lease = change.lease
        lease.settling = False
        lease.claims = [claim for claim in lease.claims if claim != change.claim] + (change.kept if mark == ord("1") else [])
        if mark == ord("1") and len(lease.claims) == 1:
            self._slot.narrow_row(lease.row, *lease.claims[0])
        if not lease.claims:
            hold.unready(lease)
            if mark != ord("1"):
                lease.lost = True
        self.release(lease)
