"""Owns every procedure of a producer as steps; the sync and the async client only carry them out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from types import NoneType
from typing import Any, Final, NamedTuple

from tqe import clock
from tqe.client.packing import (
    Columns,
    Item,
    Maker,
    Packer,
    Parcel,
    Receipt,
    pack_columns,
    pack_lines,
    pack_one,
    pack_sorted,
)
from tqe.client.payloads import PayloadEncoder
from tqe.errors import (
    IdempotencyConflict,
    InvalidOption,
    InvalidPayload,
    JobFailed,
    JobWasCancelled,
    PartialSubmit,
    QueueFull,
    ResultTimeout,
    ResultTooLarge,
    ResultUnavailable,
    SubmitError,
    TQEError,
)
from tqe.formats import FRAME_JOBS_MAX
from tqe.job import (
    IDS,
    TERMINAL,
    IdMaker,
    SubmitOptions,
    check_key,
    is_type_name,
    lane_name,
    split_job_id,
    submit_options,
)
from tqe.registry import Registry, Task
from tqe.settings import Settings
from tqe.store import producing, purging, reading
from tqe.store.keys import Keys
from tqe.store.redis_time import RedisTime
from tqe.store.steps import Hear, Listen, Steps

REREAD_S: Final = 1.0  # how long a waiter trusts that it will be woken
_WAITING_MS: Final = 60_000  # how long one entry among those who wait is good for

# Options that mean the same in each job that gives them, and so need be understood once.
_LASTING: Final = frozenset({"priority", "lane", "delay", "timeout", "max_retries", "track"})
_KNOWN_MAX: Final = 1_000  # sets of options of one submission that are remembered

AnyTask = Task[..., Any]
Progress = Callable[[int], None]


class Placed(NamedTuple):
    """Where a single submission went. `created` is False if its key found the job that was there first."""

    frame_id: bytes
    job_index: int
    created: bool
    tracked: bool


class Core:
    """What both clients share: settings, keys, checks, packing and procedures. Holds no connection.

    `handles` makes what a caller gets of the jobs in a receipt.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry | None,
        handles: Callable[[Receipt], Sequence[Any]],
        ids: IdMaker = IDS,
    ) -> None:
        self.handles: Final = handles
        self.calls: Final = calls
        self._defaults: dict[str, SubmitOptions] = {}  # by task: of submissions that give no option
        self.settings: Final = settings
        self.registry: Final = registry if registry is not None else Registry()
        self.ids: Final = ids
        self.keys: Final = Keys(settings.namespace)
        self.encoder: Final = PayloadEncoder(
            payload_max_bytes=settings.payload_max_bytes, zstd_threshold_bytes=settings.zstd_threshold_bytes
        )
        self.time: Final = RedisTime()
        self.make: Final = Maker(ids, self.encoder, self.time, settings.idempotency_ttl_s)

    # -------------------------------------------------------------- checks

    def options(self, task: AnyTask | None, given: Mapping[str, Any]) -> SubmitOptions:
        """Options of one submission: as given, else of the task, else the default."""
        if given:
            return self._checked(task, given)
        name = "" if task is None else task.name
        found = self._defaults.get(name)
        if found is None:
            found = self._defaults[name] = self._checked(task, given)
        return found

    def _checked(self, task: AnyTask | None, given: Mapping[str, Any]) -> SubmitOptions:
        if task is not None:
            # What the task says is checked like what the caller says: nobody serves a lane that is not there.
            if task.lane is not None and given.get("lane") is None and given.get("priority") is None:
                given = {**given, "lane": task.lane}
            if not task.track and given.get("track") is None:
                given = {**given, "track": False}
        return submit_options(
            given, lanes=self.settings.lanes, default_lane=self.settings.default_lane, now_ms=clock.wall_ms()
        )

    def task(self, type_name: object) -> tuple[str, AnyTask | None]:
        """A type by name; one that is not registered here may be a task of another service."""
        if isinstance(type_name, str):
            known = self.registry.get(type_name)
            if known is not None or is_type_name(type_name):
                return type_name, known
        raise InvalidPayload(f"{str(type_name)[:80]!r} is no type: 1 to 64 of A-Z a-z 0-9 _ . : -")

    def item(self, type_name: object, payload: Any, given: Mapping[str, Any], position: int = 0) -> Item:
        name, task = self.task(type_name)
        options = self.options(task, given)
        return Item(position, name, self.encoder.encode(payload, task), options, options.key)

    # -------------------------------------------------------------- submitting

    def submit(self, item: Item) -> Steps[Placed]:
        """One job. Raises what refused it."""
        frame = pack_one(item, self.make).frame
        answer = yield from producing.enqueue(self.keys, (frame,))
        self.time.heard(answer.now_us)
        tracked = item.options.track
        if not answer.held:
            return Placed(frame.frame_id, 0, True, tracked)
        first, request_hash = answer.held[0]
        if frame.key is not None and request_hash != frame.key.request_hash:
            raise IdempotencyConflict(first)
        return Placed(*split_job_id(first), False, tracked)

    def send(self, parcels: Sequence[Parcel], receipt: Receipt) -> Steps[None]:
        """One call of `enqueue`; what it answered goes into the receipt."""
        if parcels:
            answer = yield from producing.enqueue(self.keys, [parcel.frame for parcel in parcels])
            self._told(parcels, receipt, answer)

    def _told(
        self, parcels: Sequence[Parcel], receipt: Receipt, answer: producing.Enqueued
    ) -> SubmitError | None:
        """Enter the answer of a call into the receipt; the first refusal in it."""
        self.time.heard(answer.now_us)
        first: SubmitError | None = None
        for at, parcel in enumerate(parcels):
            held = answer.held.get(at) if answer.held else None
            key = parcel.frame.key
            if held is not None and key is not None and held[1] != key.request_hash:
                conflict = IdempotencyConflict(held[0])
                receipt.refused[parcel.runs[0].position] = conflict
                first = first or conflict
            else:
                receipt.add(parcel, held)
        return first

    def submit_of(
        self,
        task: AnyTask | str,
        payloads: Iterable[Any],
        given: Mapping[str, Any],
        *,
        collect: bool,
        progress: Progress | None,
    ) -> Steps[Receipt]:
        """Many jobs of one type. A payload may come as `(payload, options)`; then they are looked at
        singly."""
        name, known = self.task(task) if isinstance(task, str) else (task.name, task)
        source = iter(payloads)
        first = list(islice(source, 1))
        payloads = chain(first, source)
        if given.get("idempotency_key") is None and first and isinstance(first[0], tuple):
            items = (
                (name, *payload) if isinstance(payload, tuple) else (name, payload) for payload in payloads
            )
            return self.submit_mixed(items, given, collect=collect, progress=progress)
        return self._submit_alike(name, known, payloads, given, collect=collect, progress=progress)

    def _submit_alike(
        self,
        type_name: str,
        task: AnyTask | None,
        payloads: Iterable[Any],
        given: Mapping[str, Any],
        *,
        collect: bool,
        progress: Progress | None,
    ) -> Steps[Receipt]:
        """Many jobs of one type and with the same options: nothing is done for a job but its encoding."""
        options = self.options(task, given)
        if options.key is not None:
            raise InvalidOption("idempotency_key belongs to one job: give (payload, {'idempotency_key': …})")
        receipt = Receipt(tracked=options.track)

        def parcels() -> Iterator[Parcel]:
            source = iter(payloads)
            first = 0
            while chunk := list(islice(source, FRAME_JOBS_MAX)):
                found = self._lines(type_name, task, chunk, options, first)
                yield from found or self._singly(type_name, task, chunk, options, first, receipt, collect)
                first += len(chunk)
            receipt.total = first

        yield from self._send_all(parcels(), receipt, collect=collect, progress=progress)
        return receipt

    def _lines(
        self, name: str, task: AnyTask | None, payloads: list[Any], options: SubmitOptions, first: int
    ) -> Iterator[Parcel] | None:
        """Frames of payloads of one type, if they are sound and need no compression: the fast way."""
        encoded = self.encoder.encode_lines(payloads, task)
        if encoded is None:
            return None
        lines, longest = encoded
        if longest < self.encoder.zstd_threshold_bytes:
            return pack_lines(name, lines, options, first=first, make=self.make)
        columns = [name.encode()] * len(payloads), lines.split(b"\n")[:-1]
        return pack_columns(*columns, options, first=first, make=self.make)

    def _singly(
        self,
        type_name: str,
        task: AnyTask | None,
        payloads: list[Any],
        options: SubmitOptions,
        first: int,
        receipt: Receipt,
        collect: bool,
    ) -> Iterator[Parcel]:
        """The same where a payload is refused, or has to be looked at by itself."""
        encoded, refused = self.encoder.encode_many(payloads, task)
        if refused:
            _refuse(receipt, {first + at: error for at, error in refused.items()}, collect=collect)
        sound = [at for at in range(len(encoded)) if at not in refused]
        packer = Packer(self.make)
        yield from packer.extend(
            options,
            [first + at for at in sound],
            [type_name.encode()] * len(sound),
            [encoded[at] for at in sound],
        )
        yield from packer.close()

    def submit_mixed(
        self,
        items: Iterable[Any],
        given: Mapping[str, Any],
        *,
        collect: bool,
        progress: Progress | None,
    ) -> Steps[Receipt]:
        """Many jobs that may differ: `(type, payload)` or `(type, payload, options)`; `given` counts for
        all."""
        if given.get("idempotency_key") is not None:
            raise InvalidOption("idempotency_key belongs to one job: give (type, payload, {…})")
        receipt = Receipt(tracked=given.get("track") is not False)

        def parcels() -> Iterator[Parcel]:
            source = iter(items)
            known: dict[Any, SubmitOptions] = {}
            packer = Packer(self.make)
            first = 0
            while chunk := list(islice(source, FRAME_JOBS_MAX)):
                alike = self._alike(chunk, given, known, first)
                if alike is not None:
                    yield from packer.close()  # what came first goes first
                    yield from alike
                else:
                    sound = self._sound(chunk, given, known)
                    if sound is not None:
                        yield from pack_sorted(sound, packer, first=first)
                    else:
                        for item in self._items(chunk, given, known, first, receipt, collect=collect):
                            yield from packer.add(item)
                first += len(chunk)
            receipt.total = first
            yield from packer.close()

        yield from self._send_all(parcels(), receipt, collect=collect, progress=progress)
        return receipt

    def _alike(
        self, chunk: list[Any], given: Mapping[str, Any], known: dict[Any, SubmitOptions], first: int
    ) -> Iterator[Parcel] | None:
        """Frames of a chunk that is nothing but sound payloads of one type: the fast way."""
        if set(map(type, chunk)) != {tuple} or set(map(len, chunk)) != {2}:
            return None
        names, payloads = zip(*chunk, strict=True)
        if names.count(names[0]) != len(names):
            return None
        try:
            name, task = self.task(names[0])
            options = self._known_options(name, task, given, None, known)
        except SubmitError:  # it will be said of its item
            return None
        return self._lines(name, task, list(payloads), options, first)

    def _sound(
        self, chunk: list[Any], given: Mapping[str, Any], known: dict[Any, SubmitOptions]
    ) -> Columns | None:
        """The jobs of a chunk as columns, None if anything is odd and its items have to be looked at
        singly."""
        sizes = set(map(len, chunk)) if set(map(type, chunk)) == {tuple} else {0}
        try:
            if sizes == {2}:
                names, payloads = map(list, zip(*chunk, strict=True))
                own: list[Any] = []
            elif sizes <= {2, 3}:
                names = [entry[0] for entry in chunk]
                payloads = [entry[1] for entry in chunk]
                own = [entry[2] if len(entry) == 3 else None for entry in chunk]
            else:
                return None
            tasks = {name: self.task(name)[1] for name in set(names)}
            encoded = self.encoder.encode_columns(names, payloads, tasks)
            if encoded is None or not set(map(type, own)) <= {dict, NoneType}:
                return None
            if not own:
                usual = {
                    name: self._known_options(name, task, given, None, known) for name, task in tasks.items()
                }
                return Columns(names, encoded, [*map(usual.__getitem__, names)], [])
            options = [
                self._known_options(name, tasks[name], given, mine, known)
                for name, mine in zip(names, own, strict=True)
            ]
            return Columns(names, encoded, options, [_key_of(mine) if mine else None for mine in own])
        except (SubmitError, TypeError):  # whatever it is, it will be said of its item
            return None

    def _known_options(
        self,
        name: str,
        task: AnyTask | None,
        given: Mapping[str, Any],
        own: Mapping[str, Any] | None,
        known: dict[Any, SubmitOptions],
    ) -> SubmitOptions:
        """Options of one job of a submission but its key; `known` remembers those that will be met again."""
        if own and "idempotency_key" in own:
            own = {option: value for option, value in own.items() if option != "idempotency_key"}
        if not own:
            found = known.get(name)
            if found is None:
                found = self.options(task, given)
                # What is equal is one object: by its identity jobs are sorted.
                found = known[name] = known.setdefault(found, found)
            return found
        if not _LASTING.issuperset(own):
            return self.options(task, {**given, **own})
        # With the classes of the values: True is 1, and yet no number of seconds.
        what = (name, *own.items(), *map(type, own.values()))
        found = known.get(what)
        if found is None:
            found = self.options(task, {**given, **own})
            if len(known) < _KNOWN_MAX:
                found = known[what] = known.setdefault(found, found)
        return found

    def _items(
        self,
        chunk: Sequence[Any],
        given: Mapping[str, Any],
        known: dict[Any, SubmitOptions],
        first: int,
        receipt: Receipt,
        *,
        collect: bool,
    ) -> Iterator[Item]:
        for position, entry in enumerate(chunk, first):
            try:
                type_name, payload, own = entry_of(entry)
                name, task = self.task(type_name)
                if own:
                    options = self.options(task, {**given, **own})
                else:
                    options = self._known_options(name, task, given, None, known)
                yield Item(position, name, self.encoder.encode(payload, task), options, options.key)
            except SubmitError as e:
                _refuse(receipt, {position: e}, collect=collect)

    def _send_all(
        self, parcels: Iterator[Parcel], receipt: Receipt, *, collect: bool, progress: Progress | None
    ) -> Steps[None]:
        """Calls of bounded size, each packed while the one before it is under way. What fails after a first
        call went in is told as PartialSubmit, with its jobs."""
        under_way: tuple[list[Parcel], producing.Sent] | None = None
        batches = self.calls(parcels)
        try:
            while True:
                try:
                    batch = next(batches, None)
                except Exception:
                    # What is under way goes in all the same, and belongs to what is told.
                    if under_way is not None:
                        yield from self._finish(*under_way, receipt, collect=collect, progress=progress)
                    raise
                if under_way is not None:
                    finished, under_way = under_way, None
                    yield from self._finish(*finished, receipt, collect=collect, progress=progress)
                if batch is None:
                    return
                frames = [parcel.frame for parcel in batch]
                under_way = batch, (yield from producing.begin_enqueue(self.keys, frames))
                if not self.time.now_us():
                    # Its answer, read at once, tells the time to stamp the next ones with.
                    finished, under_way = under_way, None
                    yield from self._finish(*finished, receipt, collect=collect, progress=progress)
        except TQEError as e:
            if not receipt.accepted:
                raise
            raise PartialSubmit(self.handles(receipt), e) from e

    def _finish(
        self,
        parcels: list[Parcel],
        sent: producing.Sent,
        receipt: Receipt,
        *,
        collect: bool,
        progress: Progress | None,
    ) -> Steps[None]:
        refused = self._told(parcels, receipt, (yield from producing.finish_enqueue(sent)))
        if refused is not None and not collect:
            raise refused
        if progress is not None:
            progress(receipt.created + len(receipt.duplicates) + len(receipt.refused))

    # -------------------------------------------------------------- results

    def result(self, frame_id: bytes, index: int, timeout_s: float | None) -> Steps[Any]:
        """Wait until the job has ended. The channel is listened to before the record is read, so that an
        end in between is not missed; reading again each second covers a message that was lost with its
        connection."""
        end_ns = None if timeout_s is None else clock.monotonic_ns() + int(timeout_s * 1e9)
        record = yield from reading.job_record(self.keys, frame_id, index, overlay=False)
        if not _ended(record):
            yield from producing.persist(Listen(self.keys.done(frame_id)))
        entered_ns = 0
        while not _ended(record):
            now_ns = clock.monotonic_ns()
            if end_ns is not None and now_ns >= end_ns:
                raise ResultTimeout(
                    f"job {record.status.id} is {record.status.status}; its result is not there yet"
                )
            if not entered_ns or now_ns - entered_ns > _WAITING_MS * 500_000:
                yield from self._say_that_we_wait(frame_id)
                entered_ns = now_ns
                record = yield from reading.job_record(self.keys, frame_id, index, overlay=False)
                continue
            left_s = REREAD_S if end_ns is None else min(REREAD_S, (end_ns - now_ns) / 1e9)
            yield from producing.persist(Hear(left_s))
            record = yield from reading.job_record(self.keys, frame_id, index, overlay=False)
        return read_result(record)

    def _say_that_we_wait(self, frame_id: bytes) -> Steps[None]:
        until_ms = clock.wall_ms() + _WAITING_MS
        with suppress(QueueFull):  # then nobody wakes us, and we read each second
            # GT: of two who wait, the later end counts. Nobody takes himself out, as another may wait for the
            # same frame; so each takes out those that are long over, and the set stays small.
            yield from reading.ask(
                ("ZADD", self.keys.waiting, "GT", until_ms, frame_id),
                ("ZREMRANGEBYSCORE", self.keys.waiting, "-inf", until_ms - 10 * _WAITING_MS),
            )

    def cancel(self, frame_id: bytes, index: int) -> Steps[str]:
        """`cancelled`, `requested`, `too_late` or `unknown`."""
        answer = yield from producing.cancel(
            self.keys, frame_id, index, result_ttl_s=self.settings.result_ttl_s
        )
        return answer.partition(":")[0]

    def lane(self, name: str) -> str:
        return lane_name({"lane": name}, lanes=self.settings.lanes, default_lane="")

    def purge_lane(self, name: str) -> Steps[int]:
        """Cancel what waits in a lane now. What waits for its time or its next try stays."""
        lane = self.lane(name)
        status = yield from reading.queue_status(self.keys, self.settings.lanes)
        found = status.lanes[lane].queued
        ttl_s = self.settings.result_ttl_s
        return (yield from purging.purge_lane(self.keys, lane, jobs_max=found, result_ttl_s=ttl_s))

    # -------------------------------------------------------------- dead letters

    def replay_these(self, names: Sequence[str]) -> Steps[producing.Replayed]:
        parts = []
        for at in range(0, len(names), producing.PAGE):
            parts.append((yield from producing.replay(self.keys, names[at : at + producing.PAGE])))
        return _joined(parts)

    def purge_these(self, names: Sequence[str]) -> Steps[int]:
        count = 0
        for at in range(0, len(names), producing.PAGE):
            count += yield from producing.purge(self.keys, names[at : at + producing.PAGE])
        return count

    def replay_all(
        self, *, type_name: str | None = None, reason: str | None = None, progress: Progress | None = None
    ) -> Steps[producing.Replayed]:
        """Replay what matches and was dead when this began, oldest first, a page at a time."""
        parts: list[producing.Replayed] = []
        count = 0
        pages = _Pages(self.keys, type_name, reason)
        while (ids := (yield from pages.next())) is not None:
            part = yield from producing.replay(self.keys, ids)
            parts.append(part)
            count += len(part.replayed)
            if progress is not None:
                progress(count)
        return _joined(parts)

    def purge_all(
        self, *, type_name: str | None = None, reason: str | None = None, progress: Progress | None = None
    ) -> Steps[int]:
        """Drop what matches and was dead when this began."""
        count = 0
        pages = _Pages(self.keys, type_name, reason)
        while (ids := (yield from pages.next())) is not None:
            count += yield from producing.purge(self.keys, ids)
            if progress is not None:
                progress(count)
        return count


class _Pages:
    """Ids of dead jobs that match, page by page; up to the moment of the first page, because a job that is
    replayed and dies again would otherwise be met again for ever."""

    def __init__(self, keys: Keys, type_name: str | None, reason: str | None) -> None:
        self._keys = keys
        self._type_name = type_name
        self._reason = reason
        self._until_ms = 0
        self._cursor: reading.Cursor | None = None
        self._over = False

    def next(self) -> Steps[list[str] | None]:
        if not self._until_ms:
            seconds, micros = (yield from reading.ask(("TIME",)))[0]
            self._until_ms = int(seconds) * 1000 + int(micros) // 1000
        while not self._over:
            page = yield from reading.dead_jobs(
                self._keys,
                type_name=self._type_name,
                reason=self._reason,
                newest_first=False,
                cursor=self._cursor,
                until_ms=self._until_ms,
            )
            self._cursor, self._over = page.cursor, page.cursor is None
            if page.jobs:
                return [job.id for job in page.jobs]
        return None


# ------------------------------------------------------------------ helpers


def entry_of(entry: Any) -> tuple[Any, Any, Mapping[str, Any]]:
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return entry[0], entry[1], {}
    if isinstance(entry, tuple | list) and len(entry) == 3 and isinstance(entry[2], Mapping):
        return entry[0], entry[1], entry[2]
    raise InvalidPayload(f"an item is (type, payload) or (type, payload, options), not {entry!r:.60}")


def _key_of(own: Mapping[str, Any]) -> str | None:
    key = own.get("idempotency_key")
    return None if key is None else check_key(key)


def _refuse(receipt: Receipt, refused: Mapping[int, SubmitError], *, collect: bool) -> None:
    receipt.refused.update(refused)
    if not collect:
        position, error = next(iter(refused.items()))
        error.add_note(f"This is item {position} of the submission, counted from 0.")
        raise error


def calls(parcels: Iterable[Parcel]) -> Iterator[list[Parcel]]:
    """Parcels for one call each. Those that may be repeated after a lost reply never share one with those
    that may not, or the former would have to be given up with the latter."""
    open_calls: dict[bool, tuple[list[Parcel], int]] = {}
    for parcel in parcels:
        frame = parcel.frame
        repeatable = bool(frame.value) or frame.key is not None
        batch, size = open_calls.get(repeatable, ([], 0))
        if batch and (
            size + len(frame.data) > producing.CALL_BYTES_MAX or len(batch) >= producing.CALL_FRAMES_MAX
        ):
            yield batch
            batch, size = [], 0
        batch.append(parcel)
        open_calls[repeatable] = (batch, size + len(frame.data))
    for batch, _ in open_calls.values():
        if batch:
            yield batch


def _joined(parts: Sequence[producing.Replayed]) -> producing.Replayed:
    return producing.Replayed(
        replayed=tuple(one for part in parts for one in part.replayed),
        missing=tuple(one for part in parts for one in part.missing),
        damaged=tuple(one for part in parts for one in part.damaged),
        unknown=tuple(one for part in parts for one in part.unknown),
    )


def _ended(record: reading.JobRecord) -> bool:
    return record.state == "" or record.state in TERMINAL


def read_result(record: reading.JobRecord) -> Any:
    """What a job returned, or the exception that says why there is nothing."""
    status, own = record.status, record.own
    if status.status == "completed":
        note = own.get("error")
        if isinstance(note, Mapping) and note.get("reason") == "result_too_large":
            raise ResultTooLarge(
                f"the result of job {status.id} has {note.get('bytes', 'too many')} bytes and was not kept:"
                " have the task store it elsewhere and return a reference, or raise result_max_bytes"
            )
        return own.get("result")
    if status.status == "dead":
        raise JobFailed(status.error or "", status.id)
    if status.status == "cancelled":
        raise JobWasCancelled(status.id, status.error or "")
    raise ResultUnavailable(f"nothing is known of job {status.id}: its record has expired, or it never was")
