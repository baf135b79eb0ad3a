"""Owns the way from checked payloads to frames: which jobs travel together, and where each of them went."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple

from tqe import codec
from tqe.client.payloads import PayloadEncoder
from tqe.codec.payload import canonical
from tqe.errors import SubmitError
from tqe.formats import FRAME_BYTES_MAX, FRAME_JOBS_MAX
from tqe.job import IdMaker, SubmitOptions, new_snapshot, request_hash, stored_key, types_run_length
from tqe.store.producing import Key, Outgoing

_JOB_BYTES: Final = 1 + 4 + 2  # what a job costs in a frame beside its type, options and payload


class Run(NamedTuple):
    """Jobs that stand side by side in a submission and in a frame: `n` of them, from `position` and
    `index`."""

    position: int
    n: int
    frame_id: bytes
    base: int


@dataclass(slots=True)
class Parcel:
    """A frame and the places of the submission that it carries."""

    frame: Outgoing
    runs: list[Run]


class Item(NamedTuple):
    """One job of a submission, checked: its payload is JSON as encoded."""

    position: int
    type: str
    payload: bytes
    options: SubmitOptions


# ------------------------------------------------------------------ jobs that are all alike


def pack_alike(
    type_name: str,
    payloads: Sequence[bytes],
    options: SubmitOptions,
    *,
    first: int,
    ids: IdMaker,
    encoder: PayloadEncoder,
) -> Iterator[Parcel]:
    """Frames of jobs of one type and one set of options, without keys; `first` is the position of the
    first."""
    kind, limits = type_name.encode(), options.limits()
    overhead = len(kind) + _JOB_BYTES
    sizes = [*map(len, payloads)]
    compress = max(sizes, default=0) >= encoder.zstd_threshold_bytes
    room = FRAME_BYTES_MAX - codec.HEADER_BYTES - len(limits)
    if not compress and len(payloads) <= FRAME_JOBS_MAX and sum(sizes) + overhead * len(sizes) <= room:
        yield _parcel_alike(kind, type_name, payloads, options, limits, first, ids)
        return
    if compress:
        yield from _pack_compressed(type_name, payloads, options, first, ids, encoder)
        return
    ends = list(accumulate(size + overhead for size in sizes))
    start = filled = 0
    while start < len(payloads):
        end = min(max(bisect_right(ends, filled + room), start + 1), start + FRAME_JOBS_MAX)
        yield _parcel_alike(kind, type_name, payloads[start:end], options, limits, first + start, ids)
        start, filled = end, ends[end - 1]


def _parcel_alike(
    kind: bytes,
    type_name: str,
    payloads: Sequence[bytes],
    options: SubmitOptions,
    limits: bytes,
    first: int,
    ids: IdMaker,
) -> Parcel:
    frame_id, n = ids.frame_id(), len(payloads)
    data = codec.pack_same(
        kind,
        payloads if isinstance(payloads, list) else list(payloads),
        frame_id=frame_id,
        lane=options.lane,
        tracked=options.track,
        options=limits,
    )
    value = new_snapshot(n, options.lane, f"{type_name}*{n}") if options.track else b""
    frame = Outgoing(frame_id, n, data, options.lane, options.due, value)
    return Parcel(frame, [Run(first, n, frame_id, 0)])


def _pack_compressed(
    type_name: str,
    payloads: Sequence[bytes],
    options: SubmitOptions,
    first: int,
    ids: IdMaker,
    encoder: PayloadEncoder,
) -> Iterator[Parcel]:
    packer = Packer(ids=ids, encoder=encoder)
    for position, payload in enumerate(payloads, first):
        yield from packer.add(Item(position, type_name, payload, options))
    yield from packer.close()


# ------------------------------------------------------------------ jobs that differ


@dataclass(slots=True)
class _Open:
    """A frame that is being filled."""

    options: SubmitOptions
    size: int = codec.HEADER_BYTES
    positions: list[int] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    jobs: list[tuple[bytes, bytes, bytes, bool]] = field(default_factory=list)


class Packer:
    """Sorts jobs into frames by lane, due time, expiry and tracking; a keyed job travels alone.

    `timeout` and `max_retries` ride in the frame where all of its jobs agree, else with each job.
    """

    def __init__(self, *, ids: IdMaker, encoder: PayloadEncoder, idempotency_ttl_s: int = 86_400) -> None:
        self._ids = ids
        self._encoder = encoder
        self._ttl_s = idempotency_ttl_s
        self._open: dict[tuple[str, str, int, bool], _Open] = {}

    def add(self, item: Item) -> Iterator[Parcel]:
        """Yields the frames that this job has completed."""
        options = item.options
        limits = options.limits()
        stored, zstd = self._encoder.compress(item.payload)
        job = (item.type.encode(), stored, limits, zstd)
        size = _JOB_BYTES + len(job[0]) + len(stored) + len(limits)
        if options.key is not None:
            alone = _Open(options, positions=[item.position], types=[item.type], jobs=[job])
            hashed = request_hash(item.type, options.lane, canonical(item.payload))
            yield self._seal(alone, Key(stored_key(options.key), hashed, self._ttl_s))
            return
        where = (options.lane, options.due, options.expires_ms, options.track)
        batch = self._open.get(where)
        if batch is not None and batch.size + size > FRAME_BYTES_MAX:
            yield self._seal(self._open.pop(where))
            batch = None
        if batch is None:
            batch = self._open[where] = _Open(options)
        batch.positions.append(item.position)
        batch.types.append(item.type)
        batch.jobs.append(job)
        batch.size += size
        if len(batch.jobs) == FRAME_JOBS_MAX:
            yield self._seal(self._open.pop(where))

    def close(self) -> Iterator[Parcel]:
        """Yields what is still open."""
        while self._open:
            yield self._seal(self._open.pop(next(iter(self._open))))

    def _seal(self, batch: _Open, key: Key | None = None) -> Parcel:
        frame_id, n, options = self._ids.frame_id(), len(batch.jobs), batch.options
        shared = batch.jobs[0][2]
        jobs = batch.jobs
        if any(job[2] != shared for job in jobs):
            shared = b""
        elif shared:
            jobs = [(kind, payload, b"", zstd) for kind, payload, _, zstd in jobs]
        data = codec.pack(jobs, frame_id=frame_id, lane=options.lane, tracked=options.track, options=shared)
        value = new_snapshot(n, options.lane, types_run_length(batch.types)) if options.track else b""
        frame = Outgoing(frame_id, n, data, options.lane, options.due, value, key)
        return Parcel(frame, _runs(batch.positions, frame_id))


def _runs(positions: Sequence[int], frame_id: bytes) -> list[Run]:
    if positions[-1] - positions[0] == len(positions) - 1:  # they only grow
        return [Run(positions[0], len(positions), frame_id, 0)]
    runs: list[Run] = []
    start = 0
    for at in range(1, len(positions) + 1):
        if at == len(positions) or positions[at] != positions[at - 1] + 1:
            runs.append(Run(positions[start], at - start, frame_id, start))
            start = at
    return runs


# ------------------------------------------------------------------ what became of them


class Receipt:
    """Where each job of a submission went, in a few bytes a frame: ids are made when they are asked for."""

    def __init__(self, *, tracked: bool = True) -> None:
        self.tracked = tracked
        self.total = 0  # jobs that were submitted, in whatever way they ended
        self.created = 0
        self.duplicates: dict[int, str] = {}  # position -> id of the job that holds the key
        self.refused: dict[int, SubmitError] = {}
        self._runs: list[Run] = []
        self._starts: list[int] = []

    def add(self, parcel: Parcel, held: tuple[str, str] | None) -> None:
        """`held` is what `enqueue` answered for a keyed frame whose key is taken."""
        if held is None:
            self.created += parcel.frame.n
            self._runs += parcel.runs
            self._starts.clear()
        else:
            self.duplicates[parcel.runs[0].position] = held[0]

    def find(self, position: int) -> tuple[bytes, int] | None:
        """(frame id, index) of a job that was created."""
        if len(self._starts) != len(self._runs):
            self._runs.sort()
            self._starts = [run.position for run in self._runs]
        at = bisect_right(self._starts, position) - 1
        if at < 0 or position >= self._runs[at].position + self._runs[at].n:
            return None
        run = self._runs[at]
        return run.frame_id, run.base + position - run.position

    @property
    def accepted(self) -> int:
        """Jobs that have an id: created now, or before under the same key."""
        return self.created + len(self.duplicates)

    def positions(self) -> Sequence[int]:
        """Positions of all jobs that have an id, in order."""
        if self.accepted == self.total:
            return range(self.total)
        found = [p for run in self._runs for p in range(run.position, run.position + run.n)]
        return sorted([*found, *self.duplicates])
