"""The one builder of `settle` messages: from a leased frame and its row of the board to the script's
arguments.

It has two callers: the worker, for what it has finished, and the steward, on behalf of a worker that is dead.
So a result that was recorded and not yet sent is settled by whoever is left, in the same words.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import msgspec

from tqe import codec, formats
from tqe.board import layout
from tqe.board.board import Record, Row, find_row
from tqe.errors import FrameError
from tqe.job import bucket_of, is_frame_id
from tqe.store.call import Call
from tqe.store.keys import Keys

OPEN_TTL_S: Final = 7 * 86_400  # how long the record of a job that has not ended is kept after its due time
# One call stays below these, so that Redis is never busy with it for more than a few milliseconds.
LEASES_MAX: Final = 1_000
PARTS_MAX: Final = 128
RESULTS_MAX: Final = 250  # frames of one with a result, which may be large
BYTES_MAX: Final = 2 * 1024 * 1024
CRASH_DELAY_MS: Final = 1_000
CRASH_DELAY_CAP_MS: Final = 60_000
# The first lease that ends without a word is forgiven: the death of a spot instance must not turn half a
# million no-ops into frames of one.
SUSPECT_REAPS: Final = 2

RETRY, CRASH, UNKNOWN, RETURNED, KEPT, DEAD, QUARANTINE = b"t", b"c", b"u", b"r", b"k", b"d", b"q"
_COMPLETED: Final = bytes((layout.JOB_DONE, layout.JOB_RECORDED))
_RESULT: Final = b'{"attempts":1,"started_at":%d,"finished_at":%d,"result":%b}'
_RECORD_STATE: Final = {
    layout.OUT_DONE: "C",
    layout.OUT_CANCELLED: "X",
    layout.OUT_EXPIRED: "E",
}


class Part(NamedTuple):
    """A frame that goes on living: kept, returned, delayed, dead or quarantined. `argument` as the script
    wants it."""

    kind: bytes
    argument: bytes
    frame: bytes
    lane: str


@dataclass(slots=True)
class Item:
    """What becomes of one lease; ranges and parts together tile it, or the script refuses it whole."""

    lease: bytes
    frame_id: bytes
    tracked: bool
    started_ms: int = 0
    finished_ms: int = 0
    ranges: list[tuple[int, int, str]] = field(default_factory=list)
    fields: list[tuple[int, bytes]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    # Fields of jobs that completed at the first try, as the script wants them: name, field, name, field, …
    results: list[bytes] = field(default_factory=list)

    @property
    def kept(self) -> list[tuple[int, int]]:
        """(base, n) of the leases that this item leaves in the worker's hands."""
        return [(part.frame_base, part.frame_n) for part in map(_Span.of, self.parts) if part.kind == KEPT]


class _Span(NamedTuple):
    kind: bytes
    frame_base: int
    frame_n: int

    @classmethod
    def of(cls, part: Part) -> _Span:
        return cls(part.kind, int(part.frame[31:34]), int(part.frame[35:39]))


@dataclass(frozen=True, slots=True)
class CrashPolicy:
    """How the steward reads the board of a worker that is dead.

    `current` is the job whose step stood on the board, (row number, index); `blame` is False when nobody may
    be charged for the death (a drain that was cut short). `hard_limit` says that the supervisor killed
    exactly that job for its time limit.
    """

    reason: str  # "crash:SIGKILL", "crash:exit 3"
    current: tuple[int, int] | None = None
    blame: bool = True
    hard_limit: bool = False
    retries: int = 0  # packed retry rule of the current job, layout.C_RETRIES
    crashes_max: int = 3
    reaped: bool = False  # the lease ended without a word: no board to read
    now_ms: int = 0


def retry_rule(max_retries: int, base_ms: int, cap_ms: int) -> int:
    """Pack a retry rule into the board's word, so that a steward without the app can apply it. What is too
    large for its bits (4,095 retries, 4.6 hours, 3 days) counts as the most that they hold."""
    return min(max_retries, 0xFFF) | min(base_ms, 0xFFFFFF) << 12 | min(cap_ms, 0xFFFFFFF) << 36


def lease_name(frame_id: bytes, base: int, n: int, run: int) -> bytes:
    """Name of the lease of a part: what its header carries at bytes 4 to 45 once it is cut."""
    return b"%b.%03d.%04d.%05d" % (frame_id, base, n, run)


def backoff_ms(attempt: int, base_ms: int, cap_ms: int) -> int:
    """Delay before the next try after `attempt` failures (1 for the first): half fixed, half random.

    Full jitter has a minimum of 0, which hammers what has just failed; without jitter, what failed together
    returns together.
    """
    whole = min(cap_ms, base_ms * (1 << min(attempt - 1, 40)))
    return whole // 2 + random.randint(0, whole - whole // 2)


class SettleBatch:
    """Collects what to settle and makes as few calls of it as their limits allow."""

    def __init__(self) -> None:
        self._done: list[tuple[tuple[int, str] | None, bytes, list[bytes], Sequence[object]]] = []
        self._items: list[tuple[Item, object]] = []
        self._results: list[tuple[tuple[int, str], bytes, list[bytes], list[bytes], Sequence[object]]] = []
        self.leases = 0

    def __bool__(self) -> bool:
        return self.leases > 0

    def add_done(
        self, bucket: tuple[int, str] | None, value: bytes, leases: list[bytes], tickets: Sequence[object]
    ) -> None:
        """Whole, uncut leases of one bucket whose jobs all completed with nothing to tell; `value` is their
        snapshot.

        Untracked ones have no bucket and an empty value. Each lease has a ticket: what the caller wants back
        with its mark.
        """
        self._done.append((bucket, value, leases, tickets))
        self.leases += len(leases)

    def add_results(
        self,
        bucket: tuple[int, str],
        value: bytes,
        leases: list[bytes],
        fields: list[bytes],
        tickets: Sequence[object],
    ) -> None:
        """Leases of tracked frames of one, of one bucket, that completed with one field each."""
        self._results.append((bucket, value, leases, fields, tickets))
        self.leases += len(leases)

    def add(self, item: Item, ticket: object = None) -> None:
        """Any other lease."""
        self._items.append((item, ticket))
        self.leases += 1

    def calls(
        self, keys: Keys, incarnation: str, *, result_ttl_s: int, dlq_max: int, recovered: bool = False
    ) -> list[SettleCall]:
        """The calls to make, in order, each with the names of its leases in the order of the reply's
        marks."""
        made: list[SettleCall] = []
        call = _Writer()
        for bucket, value, leases, tickets in self._done:
            for start in range(0, len(leases), LEASES_MAX):
                chunk = leases[start : start + LEASES_MAX]
                if call.leases and len(call.leases) + len(chunk) > LEASES_MAX:
                    made.append(call.finish(keys, incarnation, result_ttl_s, dlq_max, recovered))
                    call = _Writer()
                call.done(bucket, value, chunk, tickets[start : start + LEASES_MAX])
        for bucket, value, leases, fields, tickets in self._results:
            for start in range(0, len(leases), RESULTS_MAX):
                end = start + RESULTS_MAX
                size = sum(map(len, fields[start:end]))
                if call.leases and call.over(len(leases[start:end]), size):
                    made.append(call.finish(keys, incarnation, result_ttl_s, dlq_max, recovered))
                    call = _Writer()
                call.results(bucket, value, leases[start:end], fields[start:end], tickets[start:end])
        for item, ticket in self._items:
            if call.full(item):
                made.append(call.finish(keys, incarnation, result_ttl_s, dlq_max, recovered))
                call = _Writer()
            call.item(item, ticket)
        if call.leases:
            made.append(call.finish(keys, incarnation, result_ttl_s, dlq_max, recovered))
        return made


class SettleCall(NamedTuple):
    """One call of `settle`, and the names and tickets of the leases whose marks it will answer, in order."""

    call: Call
    leases: list[bytes]
    tickets: list[Any]
    alike: bool  # every lease is settled whole: their tickets are what add_done and add_results were given


class _Writer:
    """Writes the argument list of one call; lanes and buckets get their numbers as they come."""

    def __init__(self) -> None:
        self.leases: list[bytes] = []
        self._tickets: list[Any] = []
        self._alike = True
        self._args: list[bytes | str | int] = []
        self._lanes: dict[str, int] = {}
        self._buckets: dict[tuple[int, str], int] = {}
        self._parts = 0
        self._bytes = 0

    def full(self, item: Item) -> bool:
        size = sum(len(part.frame) for part in item.parts) + sum(len(body) for _, body in item.fields)
        size += sum(map(len, item.results))
        return bool(self.leases) and (
            self.over(1, size)
            or self._parts + len(item.parts) > PARTS_MAX
            or len(self._lanes | dict.fromkeys(part.lane for part in item.parts)) > formats.LANES_MAX
        )

    def over(self, leases: int, size: int) -> bool:
        return len(self.leases) + leases > LEASES_MAX or self._bytes + size > BYTES_MAX

    def done(
        self, bucket: tuple[int, str] | None, value: bytes, leases: list[bytes], tickets: Sequence[object]
    ) -> None:
        self._args += ["C", self._bucket(bucket), value, len(leases), *leases]
        self.leases += leases
        self._tickets += tickets

    def results(
        self,
        bucket: tuple[int, str],
        value: bytes,
        leases: list[bytes],
        fields: list[bytes],
        tickets: Sequence[object],
    ) -> None:
        self._args += ["R", self._bucket(bucket), value, len(leases)]
        for lease, body in zip(leases, fields, strict=True):
            self._args += (lease, body)
            self._bytes += len(body)
        self.leases += leases
        self._tickets += tickets

    def item(self, item: Item, ticket: object) -> None:
        self._alike = False
        args = self._args
        args += ["P", item.lease, self._bucket(bucket_of(item.frame_id) if item.tracked else None)]
        args += [item.started_ms, item.finished_ms, len(item.ranges)]
        for base, n, state in item.ranges:
            args += [base, n, state]
        args.append(len(item.fields) + len(item.results) // 2)
        for index, body in item.fields:
            args += [b"%b.%d" % (item.frame_id, index), body]
            self._bytes += len(body)
        args += item.results
        self._bytes += sum(map(len, item.results))
        args.append(len(item.parts))
        for part in item.parts:
            self._lanes.setdefault(part.lane, len(self._lanes) + 1)
            args += [part.kind, part.argument, part.frame]
            self._bytes += len(part.frame)
        self._parts += len(item.parts)
        self.leases.append(item.lease)
        self._tickets.append(ticket)

    def _bucket(self, bucket: tuple[int, str] | None) -> int:
        return 0 if bucket is None else self._buckets.setdefault(bucket, len(self._buckets) + 1)

    def finish(
        self, keys: Keys, incarnation: str, result_ttl_s: int, dlq_max: int, recovered: bool
    ) -> SettleCall:
        names = [
            keys.void, keys.processing(incarnation), keys.stats, keys.depth, keys.delayed, keys.dlq,
            keys.dlq_meta, keys.dlq_index, keys.quarantine, keys.closed, keys.waiting,
        ]  # fmt: skip
        for lane in self._lanes:
            names += [keys.sorted(lane), keys.wake(lane)]
        names += [keys.bucket(second, char) for second, char in self._buckets]
        head: list[bytes | str | int] = [
            len(self._lanes), len(self._buckets), result_ttl_s, OPEN_TTL_S, dlq_max, keys.done_prefix,
            int(recovered),
        ]  # fmt: skip
        call = Call("settle", tuple(names), (*head, *self._lanes, *self._args))
        return SettleCall(call, self.leases, self._tickets, self._alike)


def claim(
    frame: bytes,
    header: codec.Header,
    row: Row | None,
    base: int,
    n: int,
    *,
    pieces: Sequence[tuple[int, int]] = (),
    crash: CrashPolicy | None = None,
    started_ms: int = 0,
    finished_ms: int = 0,
) -> Item:
    """What becomes of one lease, `base` and `n` of it, read from its row of the board.

    Without `crash` the worker speaks for itself: what is not ended is kept. With it the steward speaks for a
    dead worker: the job that ran is charged, all else that did not end goes back. `pieces` says how to cut
    what was given back.
    """
    lease = lease_name(header.frame_id, base, n, header.run)
    item = Item(lease, header.frame_id, bool(header.flags & 1), started_ms, finished_ms)
    build = _Claim(frame, header, row, item, crash)
    build.cuts = {piece_base: piece_n for piece_base, piece_n in pieces}
    if build.all_completed(base, n):
        return item
    run_kind = b""
    run_base = base
    for index in range(base, base + n):
        kind = build.kind_of(index)
        if kind != run_kind or kind == b"1":
            build.close_run(run_kind, run_base, index)
            run_kind, run_base = kind, index
    build.close_run(run_kind, run_base, base + n)
    return item


class _Claim:
    """One lease on its way into an Item. Kinds: C X E terminal, r returned, k kept, 1 a job that leaves
    alone."""

    def __init__(
        self, frame: bytes, header: codec.Header, row: Row | None, item: Item, crash: CrashPolicy | None
    ) -> None:
        # Whatever is settled has had its word: the mark of a start goes no further than the lease.
        self.frame = _unmarked(frame, header)
        self.header = header
        self.row = row
        self.item = item
        self.crash = crash
        self.cuts: dict[int, int] = {}

    def all_completed(self, base: int, n: int) -> bool:
        """The common case, without much of a look at each job: all completed at the first try, some with a
        result."""
        row, header, item = self.row, self.header, self.item
        if row is None or header.attempts or header.crashes or not item.tracked:
            return False
        states = row.states[base - row.first : base - row.first + n]
        if states.strip(_COMPLETED):
            return False
        fields = item.fields
        records = row.records
        for index, state in enumerate(states, base):
            if state == layout.JOB_RECORDED:
                record = records.get(index)
                told = result_field(record)
                if not told:
                    fields.clear()
                    return False
                fields.append((index, told))
        item.ranges.append((base, n, "C"))
        return True

    def kind_of(self, index: int) -> bytes:
        row = self.row
        if row is None:
            return b"1" if self.vanished() else RETURNED
        state = row.state(index)
        if state == layout.JOB_DONE:
            return b"C"
        if state == layout.JOB_RECORDED:
            record = self.record_of(index)
            if record is not None:
                return _RECORD_STATE.get(record.status, "1").encode()
            # The state byte follows its record, so this cannot be; if it is, run the job again rather than
            # lose it.
            return RETURNED if self.crash else KEPT
        if state == layout.JOB_RETURNED:
            return RETURNED
        if self.crash is None:
            return KEPT
        return b"1" if state == layout.JOB_STARTED else RETURNED

    def record_of(self, index: int) -> Record | None:
        """The record of a job whose state says so. Others may lie around: of a lease that had this row
        before, or of a job whose worker died between its record and its state."""
        row = self.row
        if row is None or row.state(index) != layout.JOB_RECORDED:
            return None
        return row.records.get(index)

    def close_run(self, kind: bytes, base: int, end: int) -> None:
        if base == end or not kind:
            return
        if kind == b"1":
            self.alone(base)
        elif kind == RETURNED:
            self.give_back(base, end)
        elif kind == KEPT:
            (part,) = codec.cut(self.frame, [(base, end - base)])
            self.item.parts.append(Part(KEPT, b"", part, self.header.lane))
        else:
            self.item.ranges.append((base, end - base, kind.decode()))
            for index in range(base, end):
                self.tell(index)

    def give_back(self, base: int, end: int) -> None:
        spans: list[tuple[int, int]] = []
        while base < end:
            n = min(self.cuts.get(base, end - base), end - base)
            spans.append((base, n))
            base += n
        frames = codec.cut(self.frame, spans)
        if self.crash is not None and self.crash.reaped:
            reaps = min(self.header.reaps + 1, 999)
            flags = self.suspect if reaps >= SUSPECT_REAPS else None
            frames = [codec.rewrite(frame, reaps=reaps, flags=flags) for frame in frames]
        self.item.parts += [Part(RETURNED, b"", frame, self.header.lane) for frame in frames]

    def tell(self, index: int) -> None:
        """The field of a job that ended and has something to say: a result, an error, or more than one
        attempt."""
        if not self.item.tracked:
            return
        record = self.record_of(index)
        if record is not None:
            self.item.fields.append((index, _field(self.header, record, self.header.attempts + 1)))
        elif self.header.attempts or self.header.crashes:
            self.item.fields.append(
                (index, msgspec.json.encode(_counts(self.header, self.header.attempts + 1)))
            )

    def alone(self, index: int) -> None:
        """A job that leaves its frame: failed, dead, redelivered, or started when its worker died."""
        record = self.record_of(index)
        if record is None:
            self.crashed(index)
            return
        header = self.header
        if record.status == layout.OUT_RETRY:
            attempts = header.attempts + 1
            frame = codec.single(self.frame, index, attempts=attempts, run=header.run + 1)
            self.leave(index, RETRY, str(record.delay_ms).encode(), frame, _field(header, record, attempts))
        elif record.status == layout.OUT_UNKNOWN:
            frame = codec.single(self.frame, index, unknowns=header.unknowns + 1, run=header.run + 1)
            self.leave(
                index, UNKNOWN, str(record.delay_ms).encode(), frame, _field(header, record, header.attempts)
            )
        elif record.status == layout.OUT_RETURNED:
            self.leave(index, RETURNED, b"", codec.single(self.frame, index, run=header.run + 1), b"")
        else:
            self.dead(index, record.error, record.finished_ms, header.attempts + 1, header.crashes, record)

    def dead(
        self, index: int, error: bytes, at_ms: int, attempts: int, crashes: int, record: Record | None = None
    ) -> None:
        header = self.header
        frame = codec.single(
            self.frame, index, attempts=min(attempts, 9999), crashes=min(crashes, 999), run=header.run + 1
        )
        kind = codec.job_at(frame, index)[0].decode("ascii")
        reason = msgspec.json.decode(error).get("reason", "failed") if error else "failed"
        meta = {
            "type": kind,
            "lane": header.lane,
            "reason": reason,
            "error": msgspec.Raw(error or b"null"),
            "attempts": attempts,
            "crashes": crashes,
            "died_at": at_ms,
        }
        body = (
            _field(header, record, attempts)
            if record is not None
            else _error_field(error, attempts, crashes, at_ms)
        )
        self.leave(index, DEAD, msgspec.json.encode(meta), frame, body)

    def crashed(self, index: int) -> None:
        """The job had started and not returned when its worker died: it runs again, and if it was the one on
        the board, charged."""
        crash, header = self.crash, self.header
        if crash is None:
            raise AssertionError("a worker keeps what it has started")
        if not self.blamed(crash, index):
            # With no step marked, each that had started may be to blame: the next time it runs alone.
            flags = self.suspect if crash.blame and crash.current is None else None
            frame = codec.single(self.frame, index, run=header.run + 1, flags=flags)
            self.leave(index, RETURNED, b"", frame, b"")
            return
        if crash.hard_limit:
            self.over_hard_limit(index, crash)
            return
        crashes = header.crashes + 1
        error = msgspec.json.encode(
            {"reason": crash.reason, "message": f"the worker died while it ran this job ({crash.reason})"}
        )
        if crashes >= crash.crashes_max:
            self.dead(index, error, crash.now_ms, header.attempts, crashes)
            return
        reaps = min(header.reaps + crash.reaped, 999)
        frame = codec.single(
            self.frame, index, crashes=crashes, reaps=reaps, run=header.run + 1, flags=self.suspect
        )
        delay = backoff_ms(crashes, CRASH_DELAY_MS, CRASH_DELAY_CAP_MS)
        self.leave(index, CRASH, str(delay).encode(), frame, _error_field(error, header.attempts, crashes, 0))

    def blamed(self, crash: CrashPolicy, index: int) -> bool:
        """Whether a job that had started is charged for the death of its process."""
        if _marked(self.header):
            return crash.blame  # a suspect: nothing ran beside it
        return crash.blame and self.row is not None and crash.current == (self.row.number, index)

    def vanished(self) -> bool:
        """Whether the lease of a suspect that was about to start, or ran, ended without a word: host, board
        and all."""
        return self.crash is not None and self.crash.reaped and _marked(self.header)

    @property
    def suspect(self) -> int:
        """Flags of a part that is a suspect from now on."""
        return int(self.header.flags & ~codec.STARTED | codec.SUSPECT)

    def over_hard_limit(self, index: int, crash: CrashPolicy) -> None:
        """A kill for the time limit is a failed attempt, not a crash: the process was not to blame."""
        header = self.header
        attempts = header.attempts + 1
        most = _own_retries(self.frame, header, index)
        if most is None:
            most = crash.retries & 0xFFF
        error = msgspec.json.encode(
            {"reason": "hard_limit", "message": "killed: it ran past its hard time limit"}
        )
        if attempts > most:
            self.dead(index, error, crash.now_ms, attempts, header.crashes)
            return
        frame = codec.single(self.frame, index, attempts=attempts, run=header.run + 1)
        delay = backoff_ms(attempts, crash.retries >> 12 & 0xFFFFFF, crash.retries >> 36)
        self.leave(index, RETRY, str(delay).encode(), frame, _error_field(error, attempts, header.crashes, 0))

    def leave(self, index: int, kind: bytes, argument: bytes, frame: bytes, body: bytes) -> None:
        if kind != RETURNED and (self.header.boost_us or self.header.flags & codec.SCORED):
            # It enters its lane anew, later, as another attempt: what it was worth then says nothing.
            frame = codec.rewrite(frame, boost_us=0, flags=codec.peek(frame).flags & ~codec.SCORED)
        self.item.parts.append(Part(kind, argument, frame, self.header.lane))
        if body and self.item.tracked:
            self.item.fields.append((index, body))


def result_field(record: Record | None) -> bytes:
    """The field of a job that completed at its first try with a result and nothing else to tell, else b''."""
    if record is None or record.status != layout.OUT_DONE or record.error:
        return b""
    return _RESULT % (record.started_ms, record.finished_ms, record.result or b"null")


def recover(leases: Iterable[tuple[bytes, bytes]], rows: list[Row], crash: CrashPolicy) -> SettleBatch:
    """Settle what a dead worker left: its hash says what is leased, its board what is finished.

    They meet by containment, since a cut may have been applied whose reply nobody read. A lease without a row
    was never seen by the worker and goes back uncharged; a frame that fails its check goes to quarantine.
    """
    batch = SettleBatch()
    for lease, frame in leases:
        try:
            header = codec.parse(frame)
            if header.lease != lease:
                raise FrameError("the frame is stored under the name of another lease")
        except FrameError:
            batch.add(quarantined(lease, frame))
            continue
        row = find_row(rows, header.frame_id, header.base, header.n, header.run)
        batch.add(
            claim(
                frame,
                header,
                row,
                header.base,
                header.n,
                crash=crash,
                started_ms=crash.now_ms,
                finished_ms=crash.now_ms,
            )
        )
    return batch


# State of a job of a live worker → what becomes of it when its worker is held up.
_TAKE_BACK: Final = bytes(
    layout.JOB_RETURNED if state in (layout.JOB_LEASED, layout.JOB_RETURNED) else layout.JOB_STARTED
    for state in range(256)
)


def unstarted(rows: list[Row], lease: bytes) -> bool:
    """Whether something of a live worker's lease was not started, or was to go back and has not been told
    yet. Of a lease without a row nothing was started."""
    base, n, run = int(lease[27:30]), int(lease[31:35]), int(lease[36:41])
    row = find_row(rows, lease[:26], base, n, run)
    if row is None:
        return True
    states = row.states[base - row.first : base - row.first + n]
    return layout.JOB_LEASED in states or layout.JOB_RETURNED in states


def take_back(leases: Iterable[tuple[bytes, bytes]], rows: list[Row]) -> SettleBatch:
    """What a live worker holds and has not started goes back uncharged. What runs or has ended is kept: it is
    for the worker to tell, and so is a frame that is damaged."""
    batch = SettleBatch()
    for lease, frame in leases:
        try:
            header = codec.parse(frame)
            if header.lease != lease or not unstarted(rows, lease):
                continue
        except FrameError:
            continue
        row = find_row(rows, header.frame_id, header.base, header.n, header.run)
        if row is None:
            batch.add(returned(lease, [frame]))
        else:
            left = replace(row, states=row.states.translate(_TAKE_BACK))
            batch.add(claim(frame, header, left, header.base, header.n))
    return batch


def returned(lease: bytes, frames: Sequence[bytes]) -> Item:
    """A lease of which nothing was started: it goes back as it came, or as the frames that it was cut
    into."""
    header = codec.peek(frames[0])
    item = Item(lease, header.frame_id, bool(header.flags & codec.TRACKED))
    item.parts += [Part(RETURNED, b"", _unmarked(frame, header), header.lane) for frame in frames]
    return item


def marked(frame: bytes, header: codec.Header, index: int) -> Item:
    """A suspect, a lease of this one job, that is about to start: kept, with the flag that charges it if the
    lease ends without a word."""
    flags = header.flags | codec.SUSPECT | codec.STARTED
    return _one(header, index, Part(KEPT, b"", codec.single(frame, index, flags=flags), header.lane))


def postponed(frame: bytes, header: codec.Header, index: int, delay_ms: int) -> Item:
    """A lease of this one job that goes back uncharged, and comes again after a while."""
    part = codec.single(_unmarked(frame, header), index)
    return _one(header, index, Part(CRASH, str(delay_ms).encode(), part, header.lane))


def _one(header: codec.Header, index: int, part: Part) -> Item:
    lease = lease_name(header.frame_id, index, 1, header.run)
    return Item(lease, header.frame_id, bool(header.flags & codec.TRACKED), parts=[part])


def _marked(header: codec.Header) -> bool:
    return bool(header.flags & codec.STARTED) and header.n == 1


def _unmarked(frame: bytes, header: codec.Header) -> bytes:
    """Without the mark of a start."""
    if not header.flags & codec.STARTED:
        return frame
    return codec.rewrite(frame, flags=header.flags & ~codec.STARTED)


def quarantined(lease: bytes, frame: bytes) -> Item:
    """A frame that must not be executed and must not be lost."""
    # The id may be what is damaged: then it names no snapshot.
    item = Item(lease, lease[:26], is_frame_id(lease[:26].decode("ascii", "replace")))
    lane = frame[79:95].decode("ascii", "replace").rstrip()
    item.parts.append(Part(QUARANTINE, b"", frame, lane if lane.isascii() and lane else "normal"))
    return item


def _own_retries(frame: bytes, header: codec.Header, index: int) -> int | None:
    """max_retries that rides with the job or its frame, if any."""
    own = codec.job_at(frame, index)[2]
    for options in (own, header.options):
        if options:
            try:
                value = msgspec.json.decode(options, type=dict).get("max_retries")
            except msgspec.DecodeError:
                # Whoever runs it will say so; here it must not keep its neighbours from being settled.
                continue
            if isinstance(value, int):
                return value
    return None


def _counts(header: codec.Header, attempts: int) -> dict[str, object]:
    told: dict[str, object] = {"attempts": attempts}
    if header.crashes:
        told["crashes"] = header.crashes
    return told


def _field(header: codec.Header, record: Record, attempts: int) -> bytes:
    told = _counts(header, attempts)
    if record.started_ms:
        told["started_at"] = record.started_ms
    if record.finished_ms:
        told["finished_at"] = record.finished_ms
    if record.error:
        told["error"] = msgspec.Raw(record.error)
    if record.result:
        told["result"] = msgspec.Raw(record.result)
    return msgspec.json.encode(told)


def _error_field(error: bytes, attempts: int, crashes: int, at_ms: int) -> bytes:
    told: dict[str, object] = {
        "attempts": attempts,
        "crashes": crashes,
        "error": msgspec.Raw(error or b"null"),
    }
    if at_ms:
        told["finished_at"] = at_ms
    return msgspec.json.encode(told)
