"""Owns the way from checked payloads to frames: which jobs travel together, and where each of them went."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add
from typing import Final, NamedTuple

from tqe import codec
from tqe.client.payloads import PayloadEncoder
from tqe.errors import SubmitError
from tqe.formats import FRAME_BYTES_MAX, FRAME_JOBS_MAX
from tqe.job import IdMaker, SubmitOptions, new_snapshot
from tqe.store.producing import Outgoing, frame_of_one
from tqe.store.redis_time import RedisTime

_JOB_BYTES: Final = 1 + 4 + 2  # what a job costs in a frame beside its type, options and payload


class Run(NamedTuple):
    """Jobs that stand side by side in a submission and in a frame: `n` of them, from `position` and
    `index`."""

    position: int
    n: int
    frame_id: bytes
    base: int


class Parcel(NamedTuple):
    """A frame and the places of the submission that it carries."""

    frame: Outgoing
    runs: list[Run]


class Item(NamedTuple):
    """One job of a submission, checked: its payload is JSON as encoded. `key` is its idempotency key; the
    one in `options` does not count."""

    position: int
    type: str
    payload: bytes
    options: SubmitOptions
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Maker:
    """What frames are made with. `time` stamps them with their entry, so that Redis need not copy them for
    it."""

    ids: IdMaker
    encoder: PayloadEncoder
    time: RedisTime = field(default_factory=RedisTime)
    idempotency_ttl_s: int = 86_400


# ------------------------------------------------------------------ jobs that are all alike


def pack_alike(
    type_name: str,
    payloads: list[bytes],
    options: SubmitOptions,
    *,
    first: int,
    ids: IdMaker,
    encoder: PayloadEncoder,
) -> Iterator[Parcel]:
    """Frames of jobs of one type and one set of options, without keys; `first` is the position of the
    first."""
    make = Maker(ids, encoder)
    return pack_columns([type_name.encode()] * len(payloads), payloads, options, first=first, make=make)


def pack_columns(
    types: list[bytes], payloads: list[bytes], options: SubmitOptions, *, first: int, make: Maker
) -> Iterator[Parcel]:
    """Frames of jobs with one set of options, without keys: the type and the payload of each."""
    packer = Packer(make)
    yield from packer.extend(options, range(first, first + len(payloads)), types, payloads)
    yield from packer.close()


def pack_lines(
    type_name: str, lines: bytes, options: SubmitOptions, *, first: int, make: Maker
) -> Iterator[Parcel]:
    """Frames of jobs of one type and one set of options, without keys, whose payloads end with a newline
    each and need no compression: nothing is done for a job but copying its bytes."""
    kind, limits, at = type_name.encode(), options.limits(), 0
    while at < len(lines):
        frame_id = make.ids.frame_id()
        data, n, at = codec.pack_lines(
            kind,
            lines,
            at,
            bytes_max=FRAME_BYTES_MAX,
            frame_id=frame_id,
            lane=options.lane,
            tracked=options.track,
            options=limits,
            enqueued_us=make.time.now_us(),
        )
        value = new_snapshot(n, options.lane, f"{type_name}*{n}") if options.track else b""
        frame = Outgoing(frame_id, n, data, options.lane, options.due, value)
        yield Parcel(frame, [Run(first, n, frame_id, 0)])
        first += n


# ------------------------------------------------------------------ one job


def pack_one(item: Item, make: Maker) -> Parcel:
    """A frame of one."""
    position, name, payload, options, key = item
    frame = frame_of_one(
        make.ids.frame_id(),
        name,
        payload,
        options,
        key,
        key_ttl_s=make.idempotency_ttl_s,
        zstd_threshold_bytes=make.encoder.zstd_threshold_bytes,
    )
    return Parcel(frame, [Run(position, 1, frame.frame_id, 0)])


# ------------------------------------------------------------------ jobs that differ


@dataclass(slots=True)
class _Open:
    """A frame that is being filled: columns of its jobs. `limits` has one entry for each as soon as one of
    them differs from `shared`, `zstd` as soon as one is compressed."""

    options: SubmitOptions
    shared: bytes
    size: int = codec.HEADER_BYTES
    positions: list[int] = field(default_factory=list)
    types: list[bytes] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    limits: list[bytes] = field(default_factory=list)
    zstd: list[bool] = field(default_factory=list)

    def add(
        self,
        positions: Sequence[int],
        types: list[bytes],
        payloads: list[bytes],
        limits: list[bytes],
        zstd: bool = False,
    ) -> None:
        before = len(self.payloads)
        if self.limits or limits.count(self.shared) != len(limits):
            self.limits = self.limits or [self.shared] * before
            self.limits += limits
        if self.zstd or zstd:
            self.zstd = self.zstd or [False] * before
            self.zstd += [zstd] * len(payloads)
        self.positions += positions
        self.types += types
        self.payloads += payloads


class Packer:
    """Sorts jobs into frames by lane, due time, expiry and tracking; a keyed job travels alone.

    `timeout` and `max_retries` ride in the frame where all of its jobs agree, else with each job.
    """

    def __init__(self, make: Maker) -> None:
        self.make = make
        self._open: dict[tuple[str, str, int, bool], _Open] = {}

    def add(self, item: Item) -> Iterator[Parcel]:
        """Yields the frames that this job has completed."""
        if item.key is not None:
            yield pack_one(item, self.make)
        else:
            limits = item.options.limits()
            yield from self._add(item.options, item.position, item.type.encode(), item.payload, limits)

    def _add(
        self, options: SubmitOptions, position: int, kind: bytes, payload: bytes, limits: bytes
    ) -> Iterator[Parcel]:
        stored, zstd = self.make.encoder.compress(payload)
        size = _JOB_BYTES + len(kind) + len(stored) + len(limits)
        batch = self._batch(options, limits)
        if batch.payloads and batch.size + size > FRAME_BYTES_MAX:
            yield self._close(batch)
            batch = self._batch(options, limits)
        batch.add((position,), [kind], [stored], [limits], zstd)
        batch.size += size
        if len(batch.payloads) == FRAME_JOBS_MAX:
            yield self._close(batch)

    def extend(
        self,
        options: SubmitOptions,
        positions: Sequence[int],
        types: list[bytes],
        payloads: list[bytes],
        limits: list[bytes] | None = None,
    ) -> Iterator[Parcel]:
        """The same for many jobs without keys at little cost for each. Of `options` counts what the frames of
        all have in common; `limits` says what is each job's own, else `options` does."""
        own = [options.limits()] * len(payloads) if limits is None else limits
        if max(map(len, payloads), default=0) >= self.make.encoder.zstd_threshold_bytes:
            for one in zip(positions, types, payloads, own, strict=True):
                yield from self._add(options, *one)
            return
        ends = [0, *accumulate(map(add, map(add, map(len, types), map(len, own)), map(len, payloads)))]
        start, n = 0, len(payloads)
        while start < n:
            batch = self._batch(options, own[start])
            stop = start + min(n - start, FRAME_JOBS_MAX - len(batch.payloads))
            stop = self._fitting(ends, start, stop, FRAME_BYTES_MAX - batch.size)
            if stop == start and not batch.payloads:
                stop += 1  # a single job may be larger than a frame should be
            batch.add(positions[start:stop], types[start:stop], payloads[start:stop], own[start:stop])
            batch.size += ends[stop] - ends[start] + _JOB_BYTES * (stop - start)
            if stop < n or len(batch.payloads) == FRAME_JOBS_MAX:
                yield self._close(batch)
            start = stop

    @staticmethod
    def _fitting(ends: list[int], start: int, stop: int, room: int) -> int:
        """How far the jobs from `start` to `stop` fit into `room`."""

        def filled(at: int) -> int:
            return ends[at] - ends[start] + _JOB_BYTES * (at - start)

        if filled(stop) <= room:
            return stop
        return start - 1 + bisect_right(range(start, stop), room, key=filled)

    def close(self) -> Iterator[Parcel]:
        """Yields what is still open."""
        while self._open:
            yield self._close(next(iter(self._open.values())))

    def _batch(self, options: SubmitOptions, limits: bytes) -> _Open:
        where = _where(options)
        batch = self._open.get(where)
        if batch is None:
            batch = self._open[where] = _Open(options, limits)
        return batch

    def _close(self, batch: _Open) -> Parcel:
        options = batch.options
        del self._open[_where(options)]
        frame_id, n, types = self.make.ids.frame_id(), len(batch.payloads), batch.types
        data = _packed(batch, frame_id, self.make.time.now_us())
        value = b""
        if options.track:
            alike = types.count(types[0]) == n
            value = new_snapshot(n, options.lane, f"{types[0].decode()}*{n}" if alike else codec.types(data))
        frame = Outgoing(frame_id, n, data, options.lane, options.due, value)
        return Parcel(frame, _runs(batch.positions, frame_id))


class Columns(NamedTuple):
    """Jobs of a submission, checked: name, payload, options (but the key) and key of each. `keys` is empty if
    no job has one."""

    names: list[str]
    payloads: list[bytes]
    options: list[SubmitOptions]
    keys: list[str | None]


class _Share(NamedTuple):
    """Those of the columns that travel together."""

    options: SubmitOptions
    positions: list[int]
    types: list[bytes]
    payloads: list[bytes]
    limits: list[bytes]


def pack_sorted(jobs: Columns, packer: Packer, *, first: int) -> Iterator[Parcel]:
    """Yields the frames that these jobs have completed; `first` is the position of the first of them."""
    kinds = {name: name.encode() for name in set(jobs.names)}
    types = [*map(kinds.__getitem__, jobs.names)]
    keys = jobs.keys if any(jobs.keys) else [None] * len(types)
    if len(set(map(id, jobs.options))) == 1 and not any(jobs.keys):
        places = range(first, first + len(types))
        yield from packer.extend(jobs.options[0], places, types, jobs.payloads)
        return
    shares: dict[tuple[str, str, int, bool], _Share] = {}
    known: dict[int, tuple[_Share, bytes]] = {}  # by the identity of options, which many jobs share
    columns = zip(types, jobs.payloads, jobs.options, keys, strict=True)
    for position, (kind, payload, options, key) in enumerate(columns, first):
        if key is not None:
            yield pack_one(Item(position, jobs.names[position - first], payload, options, key), packer.make)
            continue
        found = known.get(id(options))
        if found is None:
            share = shares.setdefault(_where(options), _Share(options, [], [], [], []))
            found = known[id(options)] = share, options.limits()
        share, limits = found
        share.positions.append(position)
        share.types.append(kind)
        share.payloads.append(payload)
        share.limits.append(limits)
    for share in shares.values():
        yield from packer.extend(*share)


def _where(options: SubmitOptions) -> tuple[str, str, int, bool]:
    """What jobs of one frame must have in common."""
    return options.lane, options.due, options.expires_ms, options.track


def _packed(batch: _Open, frame_id: bytes, enqueued_us: int) -> bytes:
    options, types, payloads = batch.options, batch.types, batch.payloads
    if not batch.limits and not batch.zstd:
        return codec.pack_mixed(
            types,
            payloads,
            frame_id=frame_id,
            lane=options.lane,
            tracked=options.track,
            options=batch.shared,
            enqueued_us=enqueued_us,
        )
    n = len(payloads)
    own = batch.limits or [b""] * n
    zstd = batch.zstd or [False] * n
    return codec.pack(
        list(zip(types, payloads, own, zstd, strict=True)),
        frame_id=frame_id,
        lane=options.lane,
        tracked=options.track,
        options=b"" if batch.limits else batch.shared,
        enqueued_us=enqueued_us,
    )


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
