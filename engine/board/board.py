"""The shared board as the supervisor and the steward see it: slots, their words, and the rows of a worker
that is dead."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tqe import formats
from tqe.board import layout
from tqe.codec import hot


class Record(NamedTuple):
    """Outcome of one job that is finished and not settled. Times in ms of Redis; `error` and `result` are
    JSON or empty."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name, which no record needs
    status: int
    delay_ms: int
    started_ms: int
    finished_ms: int
    error: bytes
    result: bytes


@dataclass(slots=True)
class Row:
    """One lease as it was fetched, with what became of its jobs. `states[k]` is the job `first + k`."""

    number: int
    frame_id: bytes
    base: int
    n: int
    first: int
    run: int
    states: bytes
    records: dict[int, Record] = field(default_factory=dict)

    def state(self, index: int) -> int:
        """State byte of a job, by its index in the frame."""
        return self.states[index - self.first]

    def contains(self, frame_id: bytes, base: int, n: int, run: int) -> bool:
        """Whether a lease of Redis lies inside this row: same frame, same run, a part of the range (see
        WIRE_FORMAT 6)."""
        return (
            self.frame_id == frame_id
            and self.run == run
            and self.base <= base
            and base + n <= self.base + self.n
        )


def find_row(rows: list[Row], frame_id: bytes, base: int, n: int, run: int) -> Row | None:
    """The row that a lease belongs to: the smallest range that contains it, so an exact match wins."""
    found = [row for row in rows if row.contains(frame_id, base, n, run)]
    return min(found, key=lambda row: row.n, default=None)


class SlotView:
    """One slot, read and written word by word by the supervisor or the steward. Never used on a worker's hot
    path."""

    def __init__(self, memory: memoryview, number: int) -> None:
        start = layout.slot_offset(number)
        self.number = number
        self._bytes = memory[start : start + layout.SLOT_BYTES]
        self._words = self._bytes.cast("Q")

    def get(self, offset: int) -> int:
        """A control word."""
        return self._words[offset // layout.WORD]

    def set(self, offset: int, value: int) -> None:
        """Store a control word; an aligned 8-byte store is atomic."""
        self._words[offset // layout.WORD] = value

    def text(self, offset: int, size: int = 26) -> str:
        """A fixed-width ASCII field, without its padding."""
        return bytes(self._bytes[offset : offset + size]).rstrip(b"\0").decode("ascii", "replace")

    def set_text(self, offset: int, value: str, size: int = 32) -> None:
        """Write a fixed-width ASCII field."""
        self._bytes[offset : offset + size] = value.encode("ascii").ljust(size, b"\0")

    @property
    def incarnations(self) -> list[str]:
        """The worker's incarnation, and the next one while a takeover is under way."""
        names = [self.text(layout.C_INCARNATION), self.text(layout.C_NEXT_INCARNATION)]
        return [name for name in dict.fromkeys(names) if name]

    def counters(self) -> dict[str, int]:
        """The worker's own counters by name."""
        base = layout.C_COUNTERS // layout.WORD
        return {name: self._words[base + k] for k, name in enumerate(layout.COUNTERS)}

    def add(self, counter: str, by: int = 1) -> None:
        """Raise a counter (only its worker does)."""
        self._words[layout.C_COUNTERS // layout.WORD + layout.COUNTERS.index(counter)] += by

    def put(self, counter: str, value: int) -> None:
        """Store a counter (only its worker does)."""
        self._words[layout.C_COUNTERS // layout.WORD + layout.COUNTERS.index(counter)] = value

    def tasks(self) -> Iterator[tuple[str, memoryview]]:
        """(name, words of its block) of each task that the worker has bound."""
        for k in range(layout.TASKS_MAX):
            start = layout.O_TASKS + k * layout.TASK_BYTES
            name = bytes(self._bytes[start : start + layout.TASK_NAME_BYTES]).rstrip(b"\0")
            if not name:
                return
            yield (
                name.decode("ascii", "replace"),
                self._words[start // layout.WORD : (start + layout.TASK_BYTES) // layout.WORD],
            )

    def bind(self, number: int, name: str) -> memoryview:
        """Name a task's block; the words of it."""
        start = layout.O_TASKS + number * layout.TASK_BYTES
        self.set_text(start, name, layout.TASK_NAME_BYTES)
        return self._words[start // layout.WORD : (start + layout.TASK_BYTES) // layout.WORD]

    def task_name(self, number: int) -> str:
        """Name of a task by its number on this slot, '' if none."""
        start = layout.O_TASKS + number * layout.TASK_BYTES
        return (
            bytes(self._bytes[start : start + layout.TASK_NAME_BYTES])
            .rstrip(b"\0")
            .decode("ascii", "replace")
        )

    def rows(self, *, records: bool = True) -> list[Row]:
        """Every live row, with its records. Exact for a dead worker: all its stores are visible, in program
        order."""
        found: list[Row] = []
        for number in range(layout.ROWS):
            start = layout.O_ROWS + number * layout.ROW_BYTES
            span = self._words[start // layout.WORD]
            if not span & layout.ROW_LIVE:
                continue
            found.append(self._row(number, start, span))
        if records:
            by_number = {row.number: row for row in found}
            for row_number, record in self.all_records():
                row = by_number.get(row_number)
                if row is not None:
                    row.records[record.index] = record
        return found

    def row(self, number: int) -> Row:
        """One live row without its records."""
        start = layout.O_ROWS + number * layout.ROW_BYTES
        return self._row(number, start, self._words[start // layout.WORD])

    def _row(self, number: int, start: int, span: int) -> Row:
        base, n, first = span & 0xFFFF, span >> 16 & 0xFFFF, span >> 32 & 0xFFFF
        size = base + n - first
        block = self._words[(start + layout.R_BLOCK) // layout.WORD]
        at = layout.O_BLOCKS + (block - 1) * layout.BLOCK_BYTES if block else start + layout.R_STATES
        return Row(
            number=number,
            frame_id=bytes(self._bytes[start + layout.R_ID : start + layout.R_ID + 26]),
            base=base,
            n=n,
            first=first,
            run=self._words[(start + layout.R_RUN) // layout.WORD],
            states=bytes(self._bytes[at : at + size]),
        )

    def all_records(self) -> Iterator[tuple[int, Record]]:
        """Records of both halves, the one in use last: where a job stands in both, the later one is the
        truth."""
        half = self.get(layout.C_HALF) & 1
        yield from self.records(1 - half)
        yield from self.records(half)

    def records(self, half: int) -> Iterator[tuple[int, Record]]:
        """(row number, record) of one outcome half, in the order in which they were written; ends at the
        first unwritten one."""
        for row, *rest in hot.records_of(self._bytes, layout.O_HALVES + half * layout.HALF_BYTES):
            yield row, Record._make(rest)

    def wipe(self) -> None:
        """Make the slot ready for a new life: words, rows and the marks of the outcome halves are zero."""
        self._bytes[: layout.O_BLOCKS] = bytes(layout.O_BLOCKS)
        for half in range(layout.HALVES):
            start = layout.O_HALVES + half * layout.HALF_BYTES
            self._bytes[start : start + layout.WORD] = bytes(layout.WORD)


class Board:
    """The whole mapping. The supervisor creates it before it forks; children find it at the same address.

    A memfd, never a file in a folder: it vanishes with its last process, and what a lost host held comes back
    by its leases.
    """

    def __init__(self, slots: int) -> None:
        if not 1 <= slots <= layout.SLOTS_MAX:
            raise ValueError(f"a board has 1 to {layout.SLOTS_MAX} slots, not {slots}")
        fd = os.memfd_create("tqe-board", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, layout.board_bytes(slots))
            self._map = mmap.mmap(fd, layout.board_bytes(slots), mmap.MAP_SHARED)
        finally:
            os.close(fd)
        self.memory = memoryview(self._map)
        self._words = self.memory[: layout.HEADER_BYTES].cast("Q")
        self.slots = [SlotView(self.memory, k) for k in range(slots)]
        self.retired = SlotView(self.memory, slots)  # counters and tasks only
        self.set(layout.H_MAGIC, layout.MAGIC)
        self.set(layout.H_VERSION, formats.BOARD)
        self.set(layout.H_SLOTS, slots)
        self.set(layout.H_SLOT_BYTES, layout.SLOT_BYTES)

    def get(self, offset: int) -> int:
        """A word of the header page."""
        return self._words[offset // layout.WORD]

    def set(self, offset: int, value: int) -> None:
        """Store a word of the header page."""
        self._words[offset // layout.WORD] = value

    def count(self, counter: str, by: int = 1) -> None:
        """Raise one of layout.HOST_COUNTERS (only its writer does)."""
        self._words[layout.H_COUNTERS // layout.WORD + layout.HOST_COUNTERS.index(counter)] += by

    def counted(self) -> dict[str, int]:
        """What happened on this host, by layout.HOST_COUNTERS."""
        base = layout.H_COUNTERS // layout.WORD
        return {name: self._words[base + k] for k, name in enumerate(layout.HOST_COUNTERS)}

    def retire(self, slot: SlotView) -> None:
        """Add the counters of a life that has ended to those of its predecessors, and free its slot.

        H_RETIRING is odd meanwhile: who sums over all lives would count this one twice or not at all.
        """
        self.set(layout.H_RETIRING, self.get(layout.H_RETIRING) + 1)
        try:
            for counter, value in slot.counters().items():
                if counter not in layout.GAUGES:
                    self.retired.add(counter, value)
            homes = dict(self.retired.tasks())
            for name, words in slot.tasks():
                home = homes.get(name)
                if home is None:
                    # The last block takes what no block is left for: after many deploys with new names.
                    home = homes[name] = self.retired.bind(min(len(homes), layout.TASKS_MAX - 1), name)
                for k in range(layout.TASK_NAME_BYTES // layout.WORD, len(words)):
                    home[k] += words[k]
            slot.wipe()
        finally:
            self.set(layout.H_RETIRING, self.get(layout.H_RETIRING) + 1)

    def lives(self) -> list[SlotView]:
        """Slots in use, and what of ended lives was added up: the sum over all of them never falls."""
        return [self.retired, *(slot for slot in self.slots if slot.get(layout.C_STATE) != layout.FREE)]

    def recovery_id(self, slot: int) -> str:
        """The incarnation under which the steward recovers this slot's leases, '' if none is under way."""
        start = layout.H_RECOVERY + slot * layout.RECOVERY_BYTES
        return bytes(self.memory[start : start + 26]).rstrip(b"\0").decode("ascii", "replace")

    def set_recovery_id(self, slot: int, incarnation: str) -> None:
        """Name the recovery incarnation before it is sent, so that the next steward can take it over ('' when
        done)."""
        start = layout.H_RECOVERY + slot * layout.RECOVERY_BYTES
        self.memory[start : start + layout.RECOVERY_BYTES] = incarnation.encode("ascii").ljust(
            layout.RECOVERY_BYTES, b"\0"
        )

    def blame_features(self, name: str, deaths: int = 1) -> int:
        """So many workers died in the features function of tasks of this name; how many have by now."""
        for number in range(layout.FEATURES_MAX):
            start = layout.H_FEATURES + number * layout.FEATURES_BYTES
            before, held = self.get(start), self._features_name(start)
            if before and held not in (name, layout.FEATURES_ALL):
                continue
            if not before:
                told = layout.FEATURES_ALL if number == layout.FEATURES_MAX - 1 else name
                self.memory[start + layout.WORD : start + layout.FEATURES_BYTES] = told.encode("ascii").ljust(
                    layout.TASK_NAME_BYTES, b"\0"
                )
            self.set(start, before + deaths)  # last: whoever sees the count sees the name
            return before + deaths
        raise AssertionError("the last entry takes whatever comes")

    def features_off(self, name: str) -> bool:
        """Whether the features function of tasks of this name is not to be called on this host."""
        for number in range(layout.FEATURES_MAX):
            start = layout.H_FEATURES + number * layout.FEATURES_BYTES
            deaths = self.get(start)
            if not deaths:
                return False
            if deaths >= layout.FEATURES_DEATHS_MAX and self._features_name(start) in (
                name,
                layout.FEATURES_ALL,
            ):
                return True
        return False

    def _features_name(self, start: int) -> str:
        raw = bytes(self.memory[start + layout.WORD : start + layout.FEATURES_BYTES])
        return raw.rstrip(b"\0").decode("ascii", "replace")

    def free_slot(self) -> SlotView | None:
        """A slot that no life uses, or None: then nothing may be forked."""
        return next((slot for slot in self.slots if slot.get(layout.C_STATE) == layout.FREE), None)

    def in_state(self, state: int) -> list[SlotView]:
        """Slots in a state (layout.FREE, LIVE, DEAD, RECOVERED)."""
        return [slot for slot in self.slots if slot.get(layout.C_STATE) == state]
