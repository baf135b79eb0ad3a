"""The plain-Python twin of the compiled board and dispatch: same names, same answers, same bytes on the
board.

It serves machines where the extension was not built, and the tests, which run every case over both. It is
unfit for exact recovery: its stores are not ordered against a kill as the compiled ones are, so after the
death of a worker that ran on it, jobs that had finished may run again. docs/WIRE_FORMAT.md, section 6, is the
contract.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextvars import ContextVar
from inspect import iscoroutine
from typing import Any, Final, final

import msgspec

from tqe import clock
from tqe._pure import Header, parse, walk
from tqe._pure import types as _types
from tqe.errors import DamagedFrame, FrameError, NewerFrame

COMPILED = False

# The layout, as it is compiled into the other backend; a test compares both with tqe.board.layout.
C_STOP: Final = 56
C_LEASE_UNTIL: Final = 96
C_STEP: Final = 136
C_IN_USER: Final = 144
C_ROW: Final = 152
C_INDEX: Final = 160
C_TASK: Final = 168
C_TIMEOUT_MS: Final = 176
C_HARD_MS: Final = 184
C_ASYNC: Final = 216
C_HALF: Final = 232
C_RETRIES: Final = 240
CONTROL_BYTES: Final = 4096
TASKS_MAX: Final = 512
TASK_BYTES: Final = 512
TASK_NAME_BYTES: Final = 64
T_COMPLETED: Final = 64
T_FAILED: Final = 72
T_SUM_NS: Final = 80
T_WAIT_SUM_US: Final = 88
T_MEAN_NS: Final = 96
T_TIMED: Final = 104
T_RUN_BINS: Final = 128
T_WAIT_BINS: Final = 320
ROWS: Final = 2048
ROW_BYTES: Final = 64
R_RANGE: Final = 0
R_BLOCK: Final = 8
R_ID: Final = 16
R_RUN: Final = 48
R_STATES: Final = 56
INLINE_JOBS: Final = 8
BLOCKS: Final = 256
BLOCK_BYTES: Final = 1024
_SUSPECT: Final = 4
JOB_LEASED: Final = 0
JOB_STARTED: Final = 1
JOB_DONE: Final = 2
JOB_RECORDED: Final = 3
JOB_RETURNED: Final = 4
HALVES: Final = 2
HALF_BYTES: Final = 524_288
RECORD_HEADER_BYTES: Final = 40
ROOM_BYTES: Final = 81_920
OUT_DONE: Final = 1
O_TASKS: Final = CONTROL_BYTES
O_ROWS: Final = O_TASKS + TASKS_MAX * TASK_BYTES
O_BLOCKS: Final = O_ROWS + ROWS * ROW_BYTES
O_HALVES: Final = O_BLOCKS + BLOCKS * BLOCK_BYTES
SLOT_BYTES: Final = O_HALVES + HALVES * HALF_BYTES
ROW_LIVE: Final = 1 << 48

RUN_ENDED: Final = 0
RUN_TIME: Final = 1
RUN_STOP: Final = 2
RUN_FULL: Final = 3
RUN_LEASE_END: Final = 4
RUN_SPECIAL: Final = 5
RUN_BLOCKED: Final = 6

_MODE_STRUCT: Final = 1
_MODE_KWARGS: Final = 2
_ARGS_MAX: Final = 255
_RUN_OF: Final = 32
# A synchronous job may run beside coroutines, on the thread that serves their timers, if at most one in
# twenty of its type's last hundred took longer than a millisecond; and no longer than two milliseconds of
# such jobs in one turn of the loop.
_SHORT_NS: Final = 1_000_000
_SHORT_OF: Final = 100
_BESIDE_NS: Final = 2_000_000
_TINY_NS: Final = 10_000
_BINS: Final = 24
_RESULT_BYTES_MAX: Final = 65_536
_NAMES: Final = (
    "C_STOP", "C_LEASE_UNTIL", "C_STEP", "C_IN_USER", "C_ROW", "C_INDEX", "C_TASK", "C_TIMEOUT_MS",
    "C_HARD_MS", "C_ASYNC", "C_HALF", "C_RETRIES", "CONTROL_BYTES", "TASKS_MAX", "TASK_BYTES",
    "TASK_NAME_BYTES",
    "T_COMPLETED", "T_FAILED", "T_SUM_NS", "T_WAIT_SUM_US", "T_MEAN_NS", "T_TIMED", "T_RUN_BINS",
    "T_WAIT_BINS", "ROWS", "ROW_BYTES", "R_RANGE", "R_BLOCK", "R_ID", "R_RUN", "R_STATES", "INLINE_JOBS",
    "BLOCKS", "BLOCK_BYTES", "JOB_LEASED", "JOB_STARTED", "JOB_DONE", "JOB_RECORDED", "JOB_RETURNED",
    "HALVES", "HALF_BYTES", "RECORD_HEADER_BYTES", "ROOM_BYTES", "OUT_DONE", "O_TASKS", "O_ROWS",
    "O_BLOCKS", "O_HALVES", "SLOT_BYTES", "ROW_LIVE",
)  # fmt: skip

_U64: Final = (1 << 64) - 1
_LENGTH: Final = struct.Struct("<I")
_RECORD: Final = struct.Struct("<IHBBIQQII")  # without the length word, which goes last
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


def records_of(board: Any, start: int) -> list[tuple[int, int, int, int, int, int, bytes, bytes]]:
    """Records of the outcome half that begins there, in the order in which they were written, up to the first
    unwritten one: [(row, index, status, delay_ms, started_ms, finished_ms, error, result)]."""
    half = memoryview(board).cast("B")[start : start + HALF_BYTES]
    if start < 0 or start % 8 or len(half) < HALF_BYTES:
        raise ValueError("the board is too small for this half")
    found = []
    at = 0
    while at <= HALF_BYTES - RECORD_HEADER_BYTES:
        (length,) = _LENGTH.unpack_from(half, at)
        if not RECORD_HEADER_BYTES <= length <= HALF_BYTES - at:
            break
        row, index, status, _, delay_ms, started_ms, finished_ms, error_n, result_n = _RECORD.unpack_from(
            half, at + 4
        )
        if error_n + result_n > length - RECORD_HEADER_BYTES:
            break
        body = at + RECORD_HEADER_BYTES
        error = bytes(half[body : body + error_n])
        result = bytes(half[body + error_n : body + error_n + result_n])
        found.append((row, index, status, delay_ms, started_ms, finished_ms, error, result))
        at += length
    return found


def board_constants() -> dict[str, int]:
    """The layout by name; tests compare it with tqe.board.layout."""
    return {name: globals()[name] for name in _NAMES}


@final
class Slot:
    """A worker's own slot: it alone writes rows, states and records; the steward reads them when the worker
    is dead."""

    def __init__(self, board: Any, offset: int) -> None:
        memory = memoryview(board)
        if offset < 0 or offset % 8 or memory.nbytes - offset < SLOT_BYTES:
            raise ValueError("the board is too small for this slot")
        self.bytes = memory.cast("B")[offset : offset + SLOT_BYTES]
        self.words = self.bytes.cast("Q")
        self._free_rows = list(range(ROWS - 1, -1, -1))
        self._free_blocks = list(range(BLOCKS - 1, -1, -1))
        self._half = 0
        self._used = [0, 0]

    def load(self, offset: int) -> int:
        """A word, by its offset in bytes."""
        return self.words[offset >> 3]

    def store(self, offset: int, value: int) -> None:
        """Store a word."""
        self.words[offset >> 3] = value & _U64

    def add(self, offset: int, value: int) -> None:
        """Raise a word."""
        self.words[offset >> 3] = (self.words[offset >> 3] + value) & _U64

    def free_rows(self) -> tuple[int, int]:
        """(rows, state blocks) that are free."""
        return len(self._free_rows), len(self._free_blocks)

    def open_row(self, frame_id: bytes, base: int, n: int, run: int) -> int:
        """Take a row for a lease as fetched; all its jobs are `leased`. Returns the row's number; IndexError
        when none is free."""
        if len(frame_id) != 26 or n < 1 or n > 1000 or base < 0 or base > 999:
            raise ValueError("not a lease")
        if not self._free_rows or (n > INLINE_JOBS and not self._free_blocks):
            raise IndexError("the board has no free row for another lease")
        row = self._free_rows.pop()
        at = O_ROWS + row * ROW_BYTES
        block = 0
        if n > INLINE_JOBS:
            block = self._free_blocks.pop() + 1
            states = O_BLOCKS + (block - 1) * BLOCK_BYTES
            self.bytes[states : states + n] = bytes(n)
        self.store(at + R_BLOCK, block)
        self.bytes[at + R_ID : at + R_ID + 26] = frame_id
        self.store(at + R_RUN, run)
        self.store(at + R_STATES, 0)
        self.store(at + R_RANGE, base | n << 16 | base << 32 | ROW_LIVE)
        return row

    def narrow_row(self, row: int, base: int, n: int) -> None:
        """The lease is now named by this part of the row: one store."""
        at = self._row(row)
        span = self.load(at + R_RANGE)
        if not span & ROW_LIVE or n < 1 or base < span & 0xFFFF or base + n > _end(span):
            raise ValueError("not a part of the row")
        self.store(at + R_RANGE, base | n << 16 | span & 0xFFFF << 32 | ROW_LIVE)

    def close_row(self, row: int) -> None:
        """Free a row whose settle has been answered."""
        at = self._row(row)
        block = self.load(at + R_BLOCK)
        if not self.load(at + R_RANGE) & ROW_LIVE:
            raise ValueError("the row is free already")
        self.store(at + R_RANGE, 0)
        if block:
            self._free_blocks.append(block - 1)
        self._free_rows.append(row)

    def close_rows(self, leases: list[Lease]) -> None:
        """The same for leases that are settled whole."""
        for lease in leases:
            self.close_row(lease.row)

    def states(self, row: int) -> bytes:
        """State bytes of the whole row, from the base that was fetched."""
        span = self.load(self._row(row) + R_RANGE)
        at = self.states_at(row)
        return bytes(self.bytes[at : at + _end(span) - (span >> 32 & 0xFFFF)])

    def set_state(self, row: int, index: int, state: int) -> None:
        """Write the state of one job, by its index in the frame."""
        self.bytes[self._job(row, index)] = state

    def room(self) -> int:
        """Bytes left in the outcome half in use: a record of so many, header included, still fits."""
        return HALF_BYTES - self._used[self._half] - 8  # records are padded to 8, and an end mark follows

    def record(
        self,
        row: int,
        index: int,
        status: int,
        *,
        delay_ms: int = 0,
        started_ms: int = 0,
        finished_ms: int = 0,
        error: bytes = b"",
        result: bytes = b"",
    ) -> None:
        """Append one outcome, then mark the job `recorded`. The length word goes last."""
        state = self._job(row, index)
        if not self.append(row, index, status, delay_ms, started_ms, finished_ms, error, result):
            raise MemoryError("the outcome half is full")
        self.bytes[state] = JOB_RECORDED

    def begin_settle(self, rows: Iterable[int]) -> int:
        """Switch halves: what the rows in this settle recorded stays in the old half, all else moves to the
        new one. Returns the old half's number. The other half must be idle: see end_settle."""
        old, new = self._half, 1 - self._half
        if self._used[new]:
            raise RuntimeError("two settles under way")
        settling = set(rows)
        self._half = new
        self.store(C_HALF, new)
        start = O_HALVES + old * HALF_BYTES
        at = start
        while at < start + self._used[old]:
            length, row = struct.unpack_from("<II", self.bytes, at)
            if row not in settling:
                self._put(self.bytes[at + 4 : at + length])
            at += length
        return old

    def end_settle(self, half: int) -> None:
        """The reply of the settle that took this half was read: reset it."""
        if self._used[half] and half != self._half:
            self._reset(half)

    def reset_halves(self) -> None:
        """All that was recorded is settled: begin anew."""
        for half in range(HALVES):
            self._reset(half)

    # -- for the other classes of this module

    def full(self) -> bool:
        """No room for the outcome of another job."""
        return self._used[self._half] > HALF_BYTES - ROOM_BYTES

    @property
    def half(self) -> int:
        """The outcome half in use."""
        return self._half

    def records(self, half: int) -> list[tuple[int, int, int, int, int, int, bytes, bytes]]:
        """Records of one outcome half."""
        return records_of(self.bytes, O_HALVES + half * HALF_BYTES) if self._used[half] else []

    def states_at(self, row: int) -> int:
        """Offset of a row's first state byte."""
        at = O_ROWS + row * ROW_BYTES
        block = self.load(at + R_BLOCK)
        return O_BLOCKS + (block - 1) * BLOCK_BYTES if block else at + R_STATES

    def append(
        self,
        row: int,
        index: int,
        status: int,
        delay_ms: int,
        started_ms: int,
        finished_ms: int,
        error: bytes,
        result: bytes,
    ) -> bool:
        """Write a record; False if there is no room for it."""
        head = _RECORD.pack(row, index, status, 0, delay_ms, started_ms, finished_ms, len(error), len(result))
        return self._put(b"".join((head, error, result)))

    def _put(self, body: bytes | memoryview) -> bool:
        length = (4 + len(body) + 7) & ~7
        used = self._used[self._half]
        if used + length + 4 > HALF_BYTES:
            return False
        at = O_HALVES + self._half * HALF_BYTES + used
        self.bytes[at + length : at + length + 4] = bytes(4)
        self.bytes[at + 4 : at + 4 + len(body)] = body
        _LENGTH.pack_into(self.bytes, at, length)
        self._used[self._half] = used + length
        return True

    def _reset(self, half: int) -> None:
        _LENGTH.pack_into(self.bytes, O_HALVES + half * HALF_BYTES, 0)
        self._used[half] = 0

    def _row(self, row: int) -> int:
        if row < 0 or row >= ROWS:
            raise IndexError(row)
        return O_ROWS + row * ROW_BYTES

    def _job(self, row: int, index: int) -> int:
        span = self.load(self._row(row) + R_RANGE)
        first = span >> 32 & 0xFFFF
        if index < first or index >= _end(span):
            raise IndexError(index)
        return self.states_at(row) + index - first


def _end(span: int) -> int:
    return (span & 0xFFFF) + (span >> 16 & 0xFFFF)


@final
class Entry:
    """A task as the hot path sees it. `mean_ns` < 0 means never measured."""

    def __init__(
        self,
        *,
        name: str,
        number: int,
        func: Callable[..., Any],
        decode: Callable[[Any], Any],
        positional: tuple[str, ...],
        keyword_only: tuple[str, ...],
        mode: int,
        is_async: bool,
        timeout_ms: int = 0,
        hard_ms: int = 0,
        retries: int = 0,
        mean_ns: float = -1.0,
    ) -> None:
        if number < 0 or number >= TASKS_MAX:
            raise ValueError("task number out of range")
        if len(positional) + len(keyword_only) > _ARGS_MAX:
            raise ValueError("too many parameters")
        self.name = name
        self.key = name.encode()
        if not 1 <= len(self.key) <= TASK_NAME_BYTES:
            raise ValueError("a task's name has 1 to 64 bytes")
        self.number = number
        self.func = func
        self.decode = decode
        self.positional = positional
        self.keyword_only = keyword_only
        self.mode = mode
        self.is_async = is_async
        self.timeout_ms = timeout_ms
        self.hard_ms = hard_ms
        self.retries = retries
        self.mean_ns = mean_ns
        self.seen = 0
        self._long = 0.0  # part of the last jobs that took longer than _SHORT_NS
        self._slot: Slot | None = None
        self._block = O_TASKS + number * TASK_BYTES

    def bind(self, slot: Slot) -> None:
        """Count on this slot's board from now on."""
        slot.bytes[self._block : self._block + TASK_BYTES] = self.key.ljust(TASK_BYTES, b"\0")
        self._slot = slot

    def timed(self, jobs: int, ns: int) -> None:
        """Account a run of `jobs` that took `ns` together."""
        mean = ns / jobs
        slot = self._bound()
        self.seen += jobs
        self._long += (float(mean > _SHORT_NS) - self._long) * min(1.0, jobs / min(self.seen, _SHORT_OF))
        if self.mean_ns < 0:
            self.mean_ns = mean
        else:
            self.mean_ns += (mean - self.mean_ns) * (0.125 if jobs == 1 else 0.25)
        slot.add(self._block + T_SUM_NS, ns)
        slot.add(self._block + T_COMPLETED, jobs)
        slot.add(self._block + T_RUN_BINS + 8 * _bin(int(mean / 1000.0)), jobs)
        slot.store(self._block + T_MEAN_NS, int(self.mean_ns))
        slot.add(self._block + T_TIMED, jobs)

    def short(self) -> bool:
        """Whether jobs of this type are known to be so short that one may run between two steps of
        coroutines."""
        return self.seen >= _SHORT_OF and 0 <= self.mean_ns <= _SHORT_NS and self._long <= 0.05

    def waited(self, jobs: int, us: int) -> None:
        """Account the wait of `jobs` that were fetched together."""
        slot = self._bound()
        slot.add(self._block + T_WAIT_SUM_US, us * jobs)
        slot.add(self._block + T_WAIT_BINS + 8 * _bin(us), jobs)

    def count(self, word: int) -> None:
        """Add one to a counter of the task's block (layout.T_FAILED, T_RETRIED, T_DEAD)."""
        if self._slot is None or word < TASK_NAME_BYTES or word % 8 or word >= TASK_BYTES:
            raise ValueError(word)
        self._slot.add(self._block + word, 1)

    def _bound(self) -> Slot:
        if self._slot is None:
            raise RuntimeError("bind() first")
        return self._slot


def _bin(us: int) -> int:
    return min(max(us.bit_length() - 1, 0), _BINS - 1)


@final
class Lease:
    """A frame that this worker holds: where the walk stands, and its row on the board."""

    def __init__(self, frame: bytes, slot: Slot, rank: int = 0) -> None:
        header = parse(frame)
        self.options: dict[str, Any] | None = None
        if header.options:
            try:
                self.options = _decode(header.options)
            except msgspec.DecodeError as e:
                raise DamagedFrame("the options of the frame are no JSON object") from e
        self.row = slot.open_row(header.frame_id, header.base, header.n, header.run)
        self.frame = frame
        self.rank = rank
        self.next = header.base  # absolute index of the next job to start
        self.stop = header.base + header.n  # where this worker stops: the rest was given back
        self.running = 0  # coroutines and helper jobs under way
        self.cancels: set[int] | None = None
        self.claims: list[tuple[int, int]] = [(header.base, header.n)]  # the leases in Redis that hold it
        self.pieces: Sequence[tuple[int, int]] = ()  # how to cut what was given back
        self.settling = False  # a settle of it is unanswered
        self.lost = False  # fenced: whatever is settled of it will be refused
        self.started_ms = 0
        self.finished_ms = 0
        self.first_done_ns = 0
        self.predicted_ns = 0.0
        self.header: Header = header
        self._jobs = walk(frame)
        self._slot = slot
        self._states = slot.states_at(self.row)

    @property
    def frame_id(self) -> bytes:
        return self.header.frame_id

    @property
    def name(self) -> bytes:
        """Name of the lease as fetched."""
        return self.header.lease

    @property
    def lane(self) -> str:
        return self.header.lane

    @property
    def base(self) -> int:
        return self.header.base

    @property
    def n(self) -> int:
        return self.header.n

    @property
    def run(self) -> int:
        return self.header.run

    @property
    def tracked(self) -> bool:
        return bool(self.header.flags & 1)

    @property
    def attempts(self) -> int:
        return self.header.attempts

    @property
    def enqueued_us(self) -> int:
        return self.header.enqueued_us

    def ended(self) -> bool:
        """Nothing of what is kept here waits or runs."""
        return self.next >= self.stop and self.running == 0

    def plain_done(self) -> bool:
        """The frame as submitted, never cut, never tried before; all its jobs have completed with nothing to
        tell but that."""
        header = self.header
        if header.n != header.total or self.next < header.base + header.n or self.running:
            return False
        if header.attempts or header.crashes or len(self.claims) != 1 or self.claims[0][1] != header.n:
            return False
        return all(state == JOB_DONE for state in self._slot.bytes[self._states : self._states + header.n])

    def to_settle(self) -> bool:
        """Whether a claim holds a job that has ended or was given back."""
        for base, n in self.claims:
            at = self._states + base - self.header.base
            if any(state >= JOB_DONE for state in self._slot.bytes[at : at + n]):
                return True
        return False

    def next_type(self) -> bytes:
        """Type of the next job to start."""
        if self.next >= self.stop:
            raise IndexError("nothing left")
        return self.job(self.next)[1]

    def give_back(self, index: int) -> None:
        """Mark all jobs from `index` on as returned: this worker will not start them."""
        if index < self.next or index > self.stop:
            raise ValueError("only what is ahead can be given back")
        for k in range(index, self.stop):
            self.mark(k, JOB_RETURNED)
        self.stop = index

    def skip_rest(self) -> None:
        """Start nothing more of it, and say nothing about it: it is not ours any more."""
        self.stop = self.next

    def types_ahead(self) -> list[tuple[bytes, int]]:
        """(type, jobs) runs of what is not started yet, in order."""
        out: list[tuple[bytes, int]] = []
        for index in range(self.next, self.stop):
            key = self.job(index)[1]
            if out and out[-1][0] == key:
                out[-1] = (key, out[-1][1] + 1)
            else:
                out.append((key, 1))
        return out

    # -- for the other classes of this module

    def job(self, index: int) -> tuple[int, bytes, bytes, bytes, bool]:
        """(index, type, payload as stored, options, zstd)."""
        return self._jobs[index - self.header.base]

    def claimed_states(self) -> list[tuple[int, int]]:
        """(index, state byte) of each job under the one name by which it is held."""
        ((base, n),) = self.claims
        at = self._states - self.header.base
        return list(enumerate(self._slot.bytes[at + base : at + base + n], base))

    def ended_well(self) -> bool:
        """Held under one name, never tried before, and all jobs under that name have completed or have a
        record."""
        if self.settling or len(self.claims) != 1 or not self.tracked:
            return False
        if self.header.attempts or self.header.crashes:
            return False
        return all(state in (JOB_DONE, JOB_RECORDED) for _, state in self.claimed_states())

    def mark(self, index: int, state: int) -> None:
        """Write the state of one job."""
        self._slot.bytes[self._states + index - self.header.base] = state


def admit(
    frames: list[bytes],
    slot: Slot,
    ranks: dict[str, int],
    other_rank: int,
    suspects: list[Lease] | None = None,
) -> tuple[list[Lease], int, list[tuple[bytes, FrameError | None]]]:
    """Make leases of fetched frames: ([Lease], jobs, [(frame, error)]). An error is a FrameError, or None
    where no row is free. Those of suspects are appended to `suspects` instead, if it is given, and not
    counted."""
    leases: list[Lease] = []
    odd: list[tuple[bytes, FrameError | None]] = []
    jobs = 0
    for frame in frames:
        try:
            lease = Lease(frame, slot)
        except (DamagedFrame, NewerFrame) as e:
            odd.append((frame, e))
            continue
        except IndexError:
            odd.append((frame, None))
            continue
        lease.rank = ranks.get(lease.lane, other_rank)
        if suspects is not None and lease.header.flags & _SUSPECT:
            suspects.append(lease)
            continue
        jobs += lease.n
        leases.append(lease)
    return leases, jobs, odd


def hold_all(
    leases: list[Lease], held: dict[Lease, None], ready: list[list[Lease]], per_job_ns: float
) -> tuple[int, float]:
    """Take in leases that all have jobs to start; `ready` has a list a rank. Returns (bytes, predicted ns)
    that they add."""
    for lease in leases:
        held[lease] = None
        lease.predicted_ns = per_job_ns * lease.n
        ready[lease.rank].append(lease)
    return sum(len(lease.frame) for lease in leases), sum(lease.predicted_ns for lease in leases)


def start_all(leases: list[Lease], at: int, end: int, ended: list[Lease]) -> float:
    """All jobs of leases[at:end] have been started: take them out; those of which nothing runs have ended.
    Returns the predicted ns that are no longer ahead."""
    started = leases[at:end]
    ns = sum(lease.predicted_ns for lease in started)
    for lease in started:
        lease.predicted_ns = 0.0
    ended += [lease for lease in started if not lease.running]
    del leases[at:end]
    return ns


def still_held(leases: list[Lease], held: dict[Lease, None]) -> tuple[list[Lease], list[Lease]]:
    """The leases that are held, each once: ([those with claims], [those without, which wait to be
    released])."""
    found = [lease for lease in dict.fromkeys(leases) if lease in held]
    return [lease for lease in found if lease.claims], [lease for lease in found if not lease.claims]


def close_all(leases: list[Lease], held: dict[Lease, None], slot: Slot) -> int:
    """These are settled whole: free their rows. Returns the bytes that they held."""
    size = 0
    for lease in leases:
        lease.claims = []
        if held.pop(lease, lease) is None:
            size += len(lease.frame)
            slot.close_row(lease.row)
    return size


def names_of(leases: list[Lease]) -> list[bytes]:
    """Names of the leases as fetched."""
    return [lease.name for lease in leases]


def rows_of(leases: list[Lease]) -> list[int]:
    """Rows of the leases."""
    return [lease.row for lease in leases]


def waited(leases: list[Lease], entries: dict[bytes, Entry], now_us: int) -> None:
    """Account how long these waited in their lane, under the type of their next job."""
    for lease in leases:
        if lease.next < lease.stop:
            entry = entries.get(lease.next_type())
            if entry is not None:
                entry.waited(lease.stop - lease.next, max(0, now_us - lease.enqueued_us))


def types_of(leases: list[Lease]) -> set[bytes] | None:
    """The types of the leases' jobs, each once, or None if a frame mixes types."""
    runs = [_types(lease.frame) for lease in leases]
    return None if any(";" in run for run in runs) else {run.rpartition("*")[0].encode() for run in runs}


def plain_done(
    leases: list[Lease],
) -> tuple[dict[tuple[int, str, bytes], list[Lease]], list[Lease]]:
    """Split leases that have ended: ({(bucket second, bucket char, snapshot): [Lease]}, [the others]).

    The first are whole, uncut frames whose jobs all completed with nothing to tell; their key is what
    `settle` wants to know of all of them at once. Untracked ones have an empty snapshot.
    """
    groups: dict[tuple[int, str, bytes], list[Lease]] = {}
    others: list[Lease] = []
    for lease in leases:
        if lease.settling or not lease.plain_done():
            others.append(lease)
            continue
        groups.setdefault(_done_key(lease), []).append(lease)
        lease.settling = True
    return groups, others


def results_of(
    slot: Slot, leases: list[Lease]
) -> tuple[
    dict[tuple[int, str, bytes], tuple[list[Lease], list[bytes]]],
    list[tuple[Lease, list[bytes]]],
    list[Lease],
]:
    """Split leases further, by their records: (ones, larger, others).

    The jobs of the first two have all completed at their first try, and tell nothing but their results.
    `ones` are frames of one, by their key as above: {key: ([Lease], [field])}; `larger` are
    [(Lease, [name, field, name, field, …])].
    """
    records: dict[tuple[int, int], bytes | None] = {}
    for half in (1 - slot.half, slot.half):
        for row, index, status, _, started_ms, finished_ms, error, result in slot.records(half):
            plain = status == OUT_DONE and not error
            field = _RESULT % (started_ms, finished_ms, result or b"null") if plain else None
            records[row, index] = field
    ones: dict[tuple[int, str, bytes], tuple[list[Lease], list[bytes]]] = {}
    larger: list[tuple[Lease, list[bytes]]] = []
    others: list[Lease] = []
    for lease in leases:
        told = _told_of(lease, records) if lease.ended_well() else None
        if told is None:
            others.append(lease)
            continue
        lease.settling = True
        if lease.header.total > 1:
            larger.append((lease, told))
        else:
            same, fields = ones.setdefault(_done_key(lease), ([], []))
            same.append(lease)
            fields.append(told[1])
    return ones, larger, others


_RESULT: Final = b'{"attempts":1,"started_at":%d,"finished_at":%d,"result":%b}'


def _told_of(lease: Lease, records: dict[tuple[int, int], bytes | None]) -> list[bytes] | None:
    """[name, field, …] of the claim's recorded jobs, or None if one of them has something else to tell."""
    told: list[bytes] = []
    for index, state in lease.claimed_states():
        if state == JOB_RECORDED:
            field = records.get((lease.row, index))
            if field is None:
                return None
            told += [b"%b.%d" % (lease.frame_id, index), field]
    return told if told or lease.header.total > 1 else None  # a frame of one is settled with its field


def _done_key(lease: Lease) -> tuple[int, str, bytes]:
    if not lease.tracked:
        return 0, "", b""
    # Crockford's base 32 leaves out I, L, O and U; int() wants the digits that follow 9 in a row.
    ms = int(lease.frame_id[:10].translate(_DIGITS), 32)
    times = f"{lease.started_ms},{lease.finished_ms}"
    told = f"C,{lease.header.total},0,{times},{lease.lane},{_types(lease.frame)}"
    return ms // 1000, chr(lease.frame_id[10]), told.encode()


_DIGITS: Final = bytes.maketrans(b"0123456789ABCDEFGHJKMNPQRSTVWXYZ", b"0123456789abcdefghijklmnopqrstuv")


class _Worker:
    """The process that is the worker: whoever made a runner last."""

    pid = 0


_worker: Final = _Worker()


def end_if_forked(error: BaseException | None = None) -> None:
    """End this process if it is the child of a fork that a task made: coming back from the task it would go
    on as a second worker, on the same connections and the same board. `error` is what the task raised."""
    if os.getpid() == _worker.pid:
        return
    code = 1
    try:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        else:
            logging.getLogger("tqe.worker").error(
                "a task forked, and the child came back from the task: it ends here"
            )
    finally:
        os._exit(code & 0xFF)


@final
class Runner:
    """Runs the jobs of leases: synchronous ones at once, on the calling thread, coroutines as tasks of its
    loop. One a worker.

    `on_failure(lease, index, entry, exception, in_arguments)` writes the record of a job that raised and
    returns nothing; `on_result(lease, index, entry, result)` writes that of a tracked job whose result is too
    long, or no JSON. See `beside()` for what coroutines need.
    """

    def __init__(
        self,
        slot: Slot,
        entries: dict[bytes, Entry],
        *,
        on_failure: Callable[[Lease, int, Entry, BaseException, bool], object],
        on_result: Callable[[Lease, int, Entry, Any], object],
        encode: Callable[[Any], bytes],
        result_max_bytes: int = _RESULT_BYTES_MAX,
    ) -> None:
        for entry in entries.values():
            entry.bind(slot)
        _worker.pid = os.getpid()
        self.slot = slot
        self.entries = entries
        self.until_ns = 0  # end of the lease, CLOCK_BOOTTIME
        self.redis_offset_ms = 0  # Redis time - CLOCK_BOOTTIME
        self._on_failure = on_failure
        self._on_result = on_result
        self._encode = encode
        self._result_max = min(result_max_bytes, _RESULT_BYTES_MAX)
        self._step = slot.load(C_STEP)
        self._lease: Lease | None = None  # the job that runs inline, for current()
        self._index = 0
        self._entry: Entry | None = None
        # of the walk under way
        self._since = 0  # when the clock was last read
        self._end = 0  # when the time given is over
        self._counted = 0  # jobs since then
        self.beside_until_ns = 0  # when this turn's time for jobs beside coroutines is over; 0: none ran
        # of jobs beside others
        self.ended = 0  # jobs that have ended here, however
        self.active: set[Any] = set()
        self.late: list[tuple[Any, Any, BaseException | None, bool]] | None = None
        self.apart = False  # synchronous jobs run as if coroutines did, even if none does
        self._slots = 0
        self._starved = False
        self._ended_leases: list[Lease] = []

    def beside(
        self,
        *,
        slots: int,
        spawn: Callable[[Any], Any],
        limit: Callable[[Any], object],
        failed: Callable[[Any, BaseException, bool], object],
        changed: Callable[[], object],
        context: ContextVar[Any],
        ended: list[Lease],
    ) -> None:
        """Say how coroutines run: at most `slots` at once, each started by `spawn(job)`, an event loop's
        create_task.

        `limit(job)` is called for a job with a time limit; `failed(job, exception, in_arguments)` writes the
        outcome of one that raised; `changed()` is called when a lease has ended, or a slot is free that was
        missed. `context` is the context variable that gets the job; leases that have ended are appended to
        `ended`.
        """
        self._slots = slots
        self._spawn = spawn
        self._limit = limit
        self.failed_beside = failed
        self._changed = changed
        self.context = context
        self._ended_leases = ended

    def start(
        self,
        lease: Lease,
        index: int,
        entry: Entry,
        payload: bytes,
        own: Any,
        *,
        timeout_ms: int,
        hard_ms: int,
        retries: int,
    ) -> AsyncJob:
        """Start a coroutine for a job that take() gave out, with its own limits, which stay with it as
        `own`."""
        if lease.started_ms == 0:
            lease.started_ms = self.now_ms()
        job = AsyncJob(self, lease, index, entry, payload, own, (timeout_ms, hard_ms, retries))
        lease.mark(index, JOB_STARTED)
        lease.running += 1
        self.active.add(job)
        self.slot.store(C_ASYNC, len(self.active))
        job.task = self._spawn(job)
        if timeout_ms:
            self._limit(job)
        return job

    def leave(self, job: Any) -> None:
        """A job beside others has ended, of whatever kind: its slot is free. Call it after its lease has been
        told."""
        self.active.discard(job)
        self.slot.store(C_ASYNC, len(self.active))
        if self._starved or not self.active:
            self._starved = False
            self._changed()

    def conclude(self, lease: Lease, index: int, entry: Entry, result: Any) -> None:
        """Write the outcome of a job beside others that returned."""
        if lease.lost:
            return  # it will be refused; and its row may be another lease's before the record is gone
        if result is None or not lease.tracked:
            lease.mark(index, JOB_DONE)
            return
        self._since = clock.boottime_ns()
        self._keep(lease, index, entry, result)

    def end(self, job: AsyncJob) -> None:
        """The last step of a coroutine is over, and its outcome written or put off."""
        lease, now = job.lease, clock.boottime_ns()
        job.entry.timed(1, now - job.begun_ns)
        self.ended += 1
        lease.running -= 1
        lease.finished_ms = now // 1_000_000 + self.redis_offset_ms
        if not lease.first_done_ns:
            lease.first_done_ns = now
        if lease.running == 0 and lease.next >= lease.stop:
            self._ended_leases.append(lease)
            self._starved = True
        self.leave(job)

    def current(self) -> tuple[Lease, int, Entry] | None:
        """(lease, index, entry) of the job that runs inline now, or None."""
        if self._lease is None or self._entry is None:
            return None
        return self._lease, self._index, self._entry

    def now_ms(self) -> int:
        """Redis time in ms, as of the last fetch and this machine's clock."""
        return clock.boottime_ns() // 1_000_000 + self.redis_offset_ms

    def stopped(self) -> int:
        """The stop word."""
        return self.slot.load(C_STOP)

    def run(self, leases: list[Lease], head: int, limit_ns: int) -> tuple[int, int, int]:
        """Run the jobs of leases[head:] in order, for about `limit_ns`.

        Returns (code, head, jobs): why it ended (RUN_*), the lease where it stands (those before have nothing
        left to start), and how many jobs it started.
        """
        code, at, jobs = RUN_ENDED, head, 0
        self._since = clock.boottime_ns()
        self._end = self._since + limit_ns
        self._counted = 0
        self._entry = None
        if self._since >= self.until_ns:
            return RUN_LEASE_END, head, 0
        try:
            while at < len(leases):
                lease = leases[at]
                start = lease.next
                try:
                    code = self._walk(lease)
                finally:
                    jobs += lease.next - start
                if lease.next >= lease.stop:
                    at += 1
                    lease.finished_ms = self._since_ms
                if code != RUN_ENDED:
                    break
        finally:
            self._lease = None
            self._account()
        return code, at, jobs

    def take(self, lease: Lease) -> tuple[int, bytes, bytes, bytes, bool]:
        """Hand the next job to Python, which must start it or settle it: (index, type, payload as stored,
        options, zstd)."""
        if lease.next >= lease.stop:
            raise IndexError("nothing left to take")
        lease.next += 1
        return lease.job(lease.next - 1)

    def done(self, lease: Lease, index: int) -> None:
        """Mark a job that ended with nothing to tell."""
        lease.mark(index, JOB_DONE)

    def started(self, lease: Lease, index: int) -> None:
        """Mark a job that runs as a coroutine or on the helper thread."""
        lease.mark(index, JOB_STARTED)

    def call(
        self,
        lease: Lease,
        index: int,
        entry: Entry,
        payload: bytes,
        *,
        timeout_ms: int,
        hard_ms: int,
        retries: int,
    ) -> None:
        """Run one job inline that take() gave out, with its own limits. Outcome as in run()."""
        self._since = clock.boottime_ns()
        if lease.started_ms == 0:
            lease.started_ms = self._since_ms
        self._lease = lease
        self.limits(entry, timeout_ms, hard_ms, retries)
        try:
            self._execute(lease, index, entry, payload)
        finally:
            self._lease = None
            self._counted = 1
            self._look(entry)
            lease.finished_ms = self._since_ms

    def invoke(self, entry: Entry, args: Any) -> Any:
        """Call a task with its decoded arguments, off the board: for coroutines and the helper thread."""
        return _call_task(entry, args)

    # -- for jobs beside others

    def limits(self, entry: Entry, timeout_ms: int, hard_ms: int, retries: int) -> None:
        """Say on the board which task runs, and its limits."""
        self.slot.store(C_TASK, entry.number)
        self.slot.store(C_TIMEOUT_MS, timeout_ms)
        self.slot.store(C_HARD_MS, hard_ms)
        self.slot.store(C_RETRIES, retries)

    def enter(self, lease: Lease, index: int) -> None:
        """User code begins."""
        self.slot.store(C_ROW, lease.row)
        self.slot.store(C_INDEX, index)
        self._step += 1
        self.slot.store(C_STEP, self._step)
        self.slot.store(C_IN_USER, self._step)

    def left(self) -> None:
        """User code has returned."""
        self.slot.store(C_IN_USER, 0)

    # -- the walk

    @property
    def _since_ms(self) -> int:
        return self._since // 1_000_000 + self.redis_offset_ms

    def _walk(self, lease: Lease) -> int:
        """Run the lease's jobs until it has none left, or until something ends the walk."""
        if lease.options is not None or lease.cancels is not None:
            return RUN_SPECIAL if lease.next < lease.stop else RUN_ENDED
        if lease.started_ms == 0:
            lease.started_ms = self._since_ms
        self._lease = lease
        while lease.next < lease.stop:
            if self.slot.load(C_STOP):
                return RUN_STOP
            _, key, payload, options, zstd = lease.job(lease.next)
            entry = self._entry
            if entry is None or entry.key != key:
                code = self._account()  # what was counted belongs to the task before
                if code != RUN_ENDED:
                    return code
                entry = self._switch(key)
                if entry is None:
                    return RUN_SPECIAL
            if zstd or options:
                return RUN_SPECIAL
            if entry.is_async:
                code = self._start(lease, entry, payload)
                if code != RUN_ENDED:
                    return code
                continue
            beside = self.apart or bool(self.active)
            if beside:
                # Timers and connections of coroutines must not wait for a job that runs inline.
                now = clock.boottime_ns()
                if self.beside_until_ns and now >= self.beside_until_ns:
                    return RUN_TIME
                if not entry.short():
                    return RUN_SPECIAL
                if not self.beside_until_ns:
                    self.beside_until_ns = now + _BESIDE_NS
                if not self._counted:
                    self._since = now
            if self.slot.full():
                return RUN_FULL
            lease.next += 1
            self._execute(lease, lease.next - 1, entry, payload)
            self._counted += 1
            if self._counted >= _RUN_OF or beside or entry.mean_ns >= _TINY_NS or entry.seen < _RUN_OF:
                code = self._look(entry)
                if code != RUN_ENDED:
                    return code
        return RUN_ENDED

    def _start(self, lease: Lease, entry: Entry, payload: bytes) -> int:
        """Start the next job as a coroutine."""
        if len(self.active) >= self._slots:
            self._starved = True
            return RUN_BLOCKED
        lease.next += 1
        self.start(
            lease, lease.next - 1, entry, payload, None,
            timeout_ms=entry.timeout_ms, hard_ms=entry.hard_ms, retries=entry.retries,
        )  # fmt: skip
        return RUN_ENDED if len(self.active) % _RUN_OF else self._look(entry)

    def _switch(self, key: bytes) -> Entry | None:
        """The task of another type."""
        self._entry = entry = self.entries.get(key)
        if entry is not None:
            self.limits(entry, entry.timeout_ms, entry.hard_ms, entry.retries)
        return entry

    def _account(self) -> int:
        """Look at the clock if anything ran since the last look."""
        return self._look(self._entry) if self._counted and self._entry is not None else RUN_ENDED

    def _look(self, entry: Entry) -> int:
        """Read the clock: account what ran since the last look, and say whether the walk must end."""
        now = clock.boottime_ns()
        if self._counted:
            entry.timed(self._counted, now - self._since)
        self._since = now
        self._counted = 0
        if now >= self.until_ns:
            return RUN_LEASE_END
        return RUN_TIME if now >= self._end else RUN_ENDED

    def rehearse(self, lease: Lease, entry: Entry, jobs: int) -> int:
        """Do for so many jobs what is done around a job for the board, the clock and the metrics, and nothing
        else: it tells what they cost. Returns how many it did."""
        done = 0
        self._since = self._end = clock.boottime_ns()
        self._counted = 0
        while done < jobs and not self.stopped():
            index = lease.base + done % lease.n
            lease.mark(index, JOB_STARTED)
            self.enter(lease, index)
            self.left()
            lease.mark(index, JOB_DONE)
            done += 1
            self._counted += 1
            if self._counted >= _RUN_OF:
                self._look(entry)
        return done

    def _execute(self, lease: Lease, index: int, entry: Entry, payload: bytes) -> None:
        """Run one job. From here it counts as started."""
        self.ended += 1
        self._index = index
        self._entry = entry
        lease.mark(index, JOB_STARTED)
        self.enter(lease, index)
        try:
            args = entry.decode(payload)
        except BaseException as e:
            self.left()
            # A limit that struck while they were decoded says nothing about the arguments.
            self._on_failure(lease, index, entry, e, isinstance(e, Exception))
            return
        try:
            result = _call_task(entry, args)
        except BaseException as e:
            end_if_forked(e)
            self.left()
            self._on_failure(lease, index, entry, e, False)
            return
        end_if_forked()
        self.left()
        if result is None or not lease.tracked:
            lease.mark(index, JOB_DONE)
        else:
            self._keep(lease, index, entry, result)

    def _keep(self, lease: Lease, index: int, entry: Entry, result: Any) -> None:
        """Record a result; what cannot be encoded or is too long goes to Python. The times are those of the
        last look at the clock."""
        try:
            encoded = self._encode(result)
        except Exception:
            self._on_result(lease, index, entry, result)
            return
        at = self._since_ms
        if len(encoded) > self._result_max or not self.slot.append(
            lease.row, index, OUT_DONE, 0, at, at, b"", encoded
        ):
            self._on_result(lease, index, entry, result)
            return
        lease.mark(index, JOB_RECORDED)


def _call_task(entry: Entry, args: Any) -> Any:
    if entry.mode == _MODE_STRUCT:
        return entry.func(args)
    if entry.mode == _MODE_KWARGS:
        return entry.func(**args)
    return entry.func(
        *[getattr(args, name) for name in entry.positional],
        **{name: getattr(args, name) for name in entry.keyword_only},
    )


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@final
class AsyncJob:
    """A job that runs as a coroutine, and is the coroutine that the event loop's task drives.

    It decodes the payload at its first step, marks each step on the board, and writes the outcome at its last
    one. For the loop it always returns None: nothing of a job ends in a task's exception.
    """

    def __init__(
        self,
        runner: Runner,
        lease: Lease,
        index: int,
        entry: Entry,
        payload: bytes,
        own: Any,
        limits: tuple[int, int, int],
    ) -> None:
        self.lease = lease
        self.index = index
        self.entry = entry
        self.own = own
        self.task: Any = None
        self.ending = ""
        self.timer: Any = None
        self.begun_ns = clock.boottime_ns()
        self._runner = runner
        self._payload = payload
        self._limits = limits
        self._coroutine: Coroutine[Any, Any, Any] | None = None

    @property
    def timeout_ms(self) -> int:
        return self._limits[0]

    def __await__(self) -> Generator[Any, Any, Any]:
        return self

    def __iter__(self) -> AsyncJob:
        return self

    def __next__(self) -> Any:
        return self._step(None)

    def send(self, value: Any) -> Any:
        return self._step(None)

    def throw(self, kind: Any, value: Any = None, traceback: Any = None) -> Any:
        return self._step(kind if isinstance(kind, BaseException) else kind() if value is None else value)

    def close(self) -> None:
        if self._coroutine is not None:
            self._coroutine.close()
            self._coroutine = None

    def mark(self) -> bool:
        """A step of a task that the job has started begins. False if that need not be told: the job's own
        step runs, of which this one is a part, or the job is over, and its row may be another's."""
        runner = self._runner
        if runner.slot.load(C_IN_USER) or self not in runner.active:
            return False
        runner.limits(self.entry, *self._limits)
        runner.enter(self.lease, self.index)
        return True

    def unmark(self) -> None:
        """The step that `mark` began is over."""
        end_if_forked()
        self._runner.left()

    def _step(self, thrown: BaseException | None) -> Any:
        runner = self._runner
        runner.limits(self.entry, *self._limits)
        runner.enter(self.lease, self.index)
        in_arguments = False
        try:
            if self._coroutine is None:
                if thrown is not None:
                    raise thrown  # cancelled before it began
                runner.context.set(self)
                in_arguments = True
                arguments = self.entry.decode(self._payload)
                in_arguments = False
                made = _call_task(self.entry, arguments)
                self._coroutine = made if iscoroutine(made) else _awaited(made)
            value = self._coroutine.send(None) if thrown is None else self._coroutine.throw(thrown)
        except StopIteration as e:
            end_if_forked()
            runner.left()
            self._end(e.value, None, False)
        except BaseException as e:
            end_if_forked(e)
            runner.left()
            self._end(None, e, in_arguments and isinstance(e, Exception))
        else:
            end_if_forked()
            runner.left()
            return value
        raise StopIteration

    def _end(self, result: Any, error: BaseException | None, in_arguments: bool) -> None:
        """The last step is over. Outcomes wait while the worker takes itself over."""
        runner = self._runner
        self._coroutine = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if runner.late is not None:
            runner.late.append((self, result, error, in_arguments))
        elif error is None:
            runner.conclude(self.lease, self.index, self.entry, result)
        else:
            runner.failed_beside(self, error, in_arguments)
        runner.end(self)
