"""Owns what readers want to know of Redis: the state of the queue, of a job, of its workers, of the dead
letters.

Plain commands and pure parsers; nothing here changes anything, and nobody scans what is in flight: what
runs is read from what the stewards publish, at most a second old.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec

from tqe import codec
from tqe.board import layout
from tqe.codec.payload import decode, decompress
from tqe.errors import FrameError, InvalidPayload, PayloadTooLarge
from tqe.job import (
    JobStatus,
    Snapshot,
    bucket_of,
    error_text,
    is_job_id,
    job_id,
    job_status,
    split_job_id,
    to_datetime,
    to_iso,
)
from tqe.store.keys import Keys
from tqe.store.producing import PAGE, persist
from tqe.store.steps import Reads, Steps
from tqe.telemetry.metrics import TaskSample

TOTALS: Final = (
    "submitted",
    "completed",
    "failed",
    "retried",
    "dead",
    "duplicate",
    "cancelled",
    "recovered",
    "fenced",
)
NAMED_MAX: Final = 1_000  # jobs of which one reader asks the type
MORE_TOTALS: Final = ("expired", "quarantined", "parked", "dlq_dropped", "replayed")


def ask(*commands: tuple[bytes | str | int | float, ...]) -> Steps[list[Any]]:
    """Replies of commands that were sent together."""
    return list((yield from persist(Reads(commands))))


# ------------------------------------------------------------------ workers


class Scaling(NamedTuple):
    """How many workers autoscaling wants on a host, between which bounds, and why."""

    workers: int
    fewest: int
    most: int
    text: str


class RunningJob(NamedTuple):
    """A job as its worker's steward published it."""

    id: str
    type: str
    since_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """A worker as its steward published it."""

    incarnation: str
    worker: int
    pid: int
    cpu: int | None
    state: str
    host: str
    jobs: tuple[RunningJob, ...]
    lanes: tuple[str, ...] = ()  # that it serves; empty if it does not tell
    scaling: Scaling | None = None  # of its host; None without autoscale
    steward: str = ""  # under which name its host tells what its tasks did

    def as_dict(self) -> dict[str, Any]:
        return {
            "worker": self.worker,
            "pid": self.pid,
            "cpu": self.cpu,
            "state": self.state,
            "job": self.jobs[0].id if self.jobs else None,
        }


def workers(keys: Keys) -> Steps[list[WorkerStatus]]:
    """All workers that live, by host and number."""
    incarnations = (yield from ask(("ZRANGE", keys.incarnations, 0, -1)))[0]
    if not incarnations:
        return []
    published = (yield from ask(("MGET", *(keys.worker(one.decode()) for one in incarnations))))[0]
    found = [
        parse_worker(one.decode(), text)
        for one, text in zip(incarnations, published, strict=True)
        if text is not None
    ]
    return sorted((one for one in found if one is not None), key=lambda one: (one.host, one.worker))


def name_jobs(keys: Keys, found: Sequence[WorkerStatus], each: int) -> Steps[list[WorkerStatus]]:
    """The same workers, with the types of their first `each` jobs, where the job's record tells it: a steward
    knows the type of the code that runs at this moment, not that of coroutines which wait."""
    wanted = [job.id for worker in found for job in worker.jobs[:each] if not job.type and is_job_id(job.id)]
    types: dict[str, str] = {}
    for at in range(0, len(wanted[:NAMED_MAX]), PAGE):
        page = [(name, *split_job_id(name)) for name in wanted[at : at + PAGE]]
        values = yield from ask(*(("HGET", keys.bucket(*bucket_of(frame)), frame) for _, frame, _ in page))
        for (name, _, index), value in zip(page, values, strict=True):
            snapshot = parse_snapshot(value)
            if snapshot is not None and index < snapshot.total:
                types[name] = snapshot.type_of(index)
    if not types:
        return list(found)
    return [
        replace(worker, jobs=tuple(job._replace(type=types.get(job.id, job.type)) for job in worker.jobs))
        for worker in found
    ]


def parse_worker(incarnation: str, text: bytes) -> WorkerStatus | None:
    """None for what is no such record: a reader must not break on what another version publishes."""
    try:
        told = msgspec.json.decode(text, type=dict[str, Any])
        return WorkerStatus(
            incarnation=incarnation,
            worker=int(told["worker"]),
            pid=int(told["pid"]),
            cpu=None if told.get("cpu") is None else int(told["cpu"]),
            state=str(told.get("state", "")),
            host=str(told.get("host", "")),
            jobs=tuple(
                RunningJob(str(one["id"]), str(one.get("type", "")), int(one.get("since_ms", 0)))
                for one in told.get("jobs", ())
            ),
            lanes=tuple(str(name) for name in told.get("lanes", ())),
            scaling=_scaling(told.get("scaling")),
            steward=str(told.get("steward", "")),
        )
    except (msgspec.DecodeError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _scaling(told: dict[str, Any] | None) -> Scaling | None:
    if not told:
        return None
    return Scaling(int(told["workers"]), int(told["fewest"]), int(told["most"]), str(told["text"]))


def tasks(keys: Keys, alive: Sequence[WorkerStatus] | None = None) -> Steps[dict[str, TaskSample]]:
    """What the tasks did so far on the hosts of these workers (None: of all), all hosts together; a host's
    counting begins with its supervisor."""
    if alive is None:
        alive = yield from workers(keys)
    stewards = sorted({worker.steward for worker in alive} - {""})
    found: dict[str, TaskSample] = {}
    if not stewards:
        return found
    for text in (yield from ask(("MGET", *(keys.tasks(name) for name in stewards))))[0]:
        for name, sample in parse_tasks(text).items():
            found[name] = found[name] + sample if name in found else sample
    return found


def parse_tasks(text: bytes | None) -> dict[str, TaskSample]:
    """Nothing where it cannot be read: another version may publish something else."""
    try:
        found = msgspec.json.decode(text or b"{}", type=dict[str, TaskSample])
    except msgspec.DecodeError:
        return {}
    return {
        name: one for name, one in found.items() if len(one.run_bins) == len(one.wait_bins) == layout.BINS
    }


# ------------------------------------------------------------------ the queue


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneStatus:
    """Jobs that wait in a lane; `sorted` of the `queued` ones are in its ordered part."""

    queued: int
    sorted: int
    paused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueStatus:
    """The whole queue at a glance, in jobs (the last two: in frames)."""

    lanes: Mapping[str, LaneStatus]
    running: int
    scheduled: int
    dead: int
    totals: Mapping[str, int]
    workers: Sequence[WorkerStatus]
    quarantined_frames: int
    parked_frames: int

    @property
    def scaling(self) -> dict[str, Scaling]:
        """By host, where the number of workers follows the backlog."""
        return {worker.host: worker.scaling for worker in self.workers if worker.scaling is not None}

    def as_dict(self) -> dict[str, Any]:
        """The shape of `tqe status --json`."""
        found: dict[str, Any] = {
            "lanes": {
                name: {"queued": lane.queued, "sorted": lane.sorted} for name, lane in self.lanes.items()
            },
            "running": self.running,
            "scheduled": self.scheduled,
            "dead": self.dead,
            "totals": {name: self.totals.get(name, 0) for name in TOTALS},
            "workers": [worker.as_dict() for worker in self.workers],
        }
        if self.scaling:
            found["autoscale"] = {
                host: {"workers": told.workers, "min": told.fewest, "max": told.most, "reason": told.text}
                for host, told in self.scaling.items()
            }
        return found


def queue_status(keys: Keys, lanes: Sequence[str]) -> Steps[QueueStatus]:
    """`lanes` in their order, then lanes that have jobs although nobody has configured them here."""
    depth, stats, late, dead, quarantined, parked, paused = yield from ask(
        ("HGETALL", keys.depth),
        ("HGETALL", keys.stats),
        ("ZCARD", keys.delayed),
        ("ZCARD", keys.dlq_index),
        ("LLEN", keys.quarantine),
        ("LLEN", keys.parked),
        ("SMEMBERS", keys.paused),
    )
    jobs = counts(depth)
    orphans = {name.removesuffix(":sorted") for name in jobs} - {"delayed", *lanes}
    names = [*lanes, *sorted(orphans)]
    sizes = yield from ask(
        *(("LLEN", keys.queue(name)) for name in names), *(("ZCARD", keys.sorted(name)) for name in names)
    )
    stopped = {name.decode("utf-8", "replace") for name in paused}
    found = {}
    for at, name in enumerate(names):
        listed = _depth(jobs.get(name, 0), sizes[at])
        ordered = _depth(jobs.get(f"{name}:sorted", 0), sizes[at + len(names)])
        found[name] = LaneStatus(queued=listed + ordered, sorted=ordered, paused=name in stopped)
    alive = yield from workers(keys)
    return QueueStatus(
        lanes=found,
        running=sum(len(worker.jobs) for worker in alive),
        scheduled=_depth(jobs.get("delayed", 0), late),
        dead=dead,
        totals={name: 0 for name in (*TOTALS, *MORE_TOTALS)} | counts(stats),
        workers=alive,
        quarantined_frames=quarantined,
        parked_frames=parked,
    )


def oldest_waiting(keys: Keys, lanes: Sequence[str]) -> Steps[dict[str, int]]:
    """By lane: since when its oldest frame waits, in ms since 1970; left out where none can be read."""
    heads = yield from ask(
        *(("LINDEX", keys.queue(name), 0) for name in lanes),
        *(("ZRANGE", keys.sorted(name), 0, 0) for name in lanes),
    )
    found: dict[str, int] = {}
    for at, head in enumerate(heads):
        frames = head if isinstance(head, list) else [head]
        for frame in frames:
            try:
                since_ms = codec.peek(frame).enqueued_us // 1000
            except (FrameError, TypeError):
                continue
            name = lanes[at % len(lanes)]
            found[name] = min(since_ms, found.get(name, since_ms))
    return found


def counts(flat: Sequence[bytes]) -> dict[str, int]:
    """A hash of counts, as HGETALL tells it. What is none is left out: it was written by hand, and whoever
    only looks must go on looking."""
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {
        name.decode("utf-8", "replace"): int(value)
        for name, value in pairs
        if value.isdigit() and len(value) < 19
    }


def _depth(jobs: int, frames: int) -> int:
    """`depth` is a cache that may be off after a failover; the number of frames bounds it from below."""
    return max(jobs, frames) if frames else 0


# ------------------------------------------------------------------ predictions


class Prediction(NamedTuple):
    """A run that was captured, and what was predicted when it began. All in seconds."""

    type: str
    real_s: float
    model_s: float | None
    mean_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """The newest captured runs that were predicted, of so many `runs` that were looked at, and the model in
    use; its fields are empty where there is none."""

    runs: int
    predicted: Sequence[Prediction]
    version: str
    chosen: str
    rung: str
    trained_at: str


def predictions(keys: Keys, runs_max: int) -> Steps[Predictions]:
    """What was predicted lately, against what came of it."""
    entries, facts = yield from ask(
        ("XREVRANGE", keys.traces, "+", "-", "COUNT", runs_max),
        ("HMGET", keys.model, "version", "chosen", "rung", "trained_at"),
    )
    found = [_prediction(fields[1]) for _, fields in entries]
    version, chosen, rung, trained_at = ((value or b"").decode("utf-8", "replace") for value in facts)
    return Predictions(
        runs=len(found),
        predicted=[one for one in found if one is not None],
        version=version,
        chosen=chosen,
        rung=rung,
        trained_at=trained_at,
    )


def _prediction(trace: bytes) -> Prediction | None:
    """None for a run that nobody predicted, one that did not end well, and what is no trace."""
    try:
        told = msgspec.json.decode(trace, type=dict[str, Any])
        model_s, mean_s = told.get("model_s"), told.get("mean_s")
        if told.get("outcome") != "done" or (model_s is None and mean_s is None):
            return None
        return Prediction(
            str(told["type"]),
            float(told["run_us"]) / 1e6,
            None if model_s is None else float(model_s),
            None if mean_s is None else float(mean_s),
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, OverflowError):
        return None


# ------------------------------------------------------------------ one job


class JobRecord(NamedTuple):
    """What Redis knows of a job: the status for people, and the raw parts that results are made of."""

    status: JobStatus
    state: str  # of the snapshot; "" if there is none
    own: Mapping[str, Any]


def job_record(keys: Keys, frame_id: bytes, index: int, *, overlay: bool = True) -> Steps[JobRecord]:
    """`overlay` also asks whether it runs right now, which takes a second and a third round trip."""
    name = job_id(frame_id, index)
    (value, own_text), asked, (seconds, micros) = yield from ask(
        ("HMGET", keys.bucket(*bucket_of(frame_id)), frame_id, name),
        ("HGET", keys.cancel, frame_id),
        ("TIME",),
    )
    snapshot, own = parse_snapshot(value), parse_own(own_text)
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    found = snapshot is not None and index < snapshot.total
    state = snapshot.state_of(index) if snapshot is not None and found else ""
    running_since_ms = None
    if overlay and state in ("Q", "R"):
        for worker in (yield from workers(keys)):
            for job in worker.jobs:
                if job.id == name:
                    running_since_ms = job.since_ms
    status = job_status(
        frame_id,
        index,
        snapshot=snapshot,
        own=own,
        running_since_ms=running_since_ms,
        cancel_requested=asked is not None and str(index).encode() in asked.split(b","),
        now_ms=now_ms,
    )
    return JobRecord(status, state, own)


def job_records(keys: Keys, jobs: Sequence[tuple[bytes, int]]) -> Steps[list[JobRecord]]:
    """Many jobs as their records tell them, a page a round trip; whether they run now is not asked."""
    found = []
    for at in range(0, len(jobs), PAGE):
        page = jobs[at : at + PAGE]
        (seconds, micros), *values = yield from ask(
            ("TIME",),
            *(
                ("HMGET", keys.bucket(*bucket_of(frame)), frame, job_id(frame, index))
                for frame, index in page
            ),
        )
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        for (frame, index), (value, own) in zip(page, values, strict=True):
            found.append(_record(frame, index, value, own, now_ms))
    return found


def _record(
    frame_id: bytes, index: int, value: bytes | None, own_text: bytes | None, now_ms: int
) -> JobRecord:
    snapshot, own = parse_snapshot(value), parse_own(own_text)
    known = snapshot is not None and index < snapshot.total
    status = job_status(
        frame_id,
        index,
        snapshot=snapshot,
        own=own,
        running_since_ms=None,
        cancel_requested=False,
        now_ms=now_ms,
    )
    return JobRecord(status, snapshot.state_of(index) if snapshot is not None and known else "", own)


def parse_snapshot(value: bytes | None) -> Snapshot | None:
    try:
        return None if value is None else Snapshot.parse(value)
    except (ValueError, UnicodeDecodeError):
        return None


def parse_own(text: bytes | None) -> Mapping[str, Any]:
    try:
        return {} if text is None else msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


# ------------------------------------------------------------------ dead letters


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadJob:
    """An entry of the dead-letter queue. `payload` only where one entry was asked for; None if it cannot
    be read."""

    id: str
    type: str | None
    lane: str | None
    reason: str | None
    error: str | None
    attempts: int
    crashes: int
    died_at: datetime | None
    payload: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": self.type,
            "lane": self.lane,
            "reason": self.reason,
            "error": self.error,
            "attempts": self.attempts,
            "crashes": self.crashes,
            "died_at": to_iso(self.died_at),
        } | ({} if self.payload is None else {"payload": self.payload})


class Cursor(NamedTuple):
    """Where a page of dead letters ended: entries come and go, so it is a place in time and not a rank."""

    died_ms: float
    id: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadPage:
    """Entries that matched, of one page of the index; `cursor` is None after the last page."""

    jobs: Sequence[DeadJob]
    cursor: Cursor | None


def dead_jobs(
    keys: Keys,
    *,
    type_name: str | None = None,
    reason: str | None = None,
    newest_first: bool = True,
    cursor: Cursor | None = None,
    until_ms: int | None = None,
) -> Steps[DeadPage]:
    """One page of the index, filtered; `reason` matches from its start, so `crash` finds `crash:SIGKILL`.
    `until_ms` leaves out what died later."""
    ids, after = yield from _page(keys, newest_first, cursor, "+inf" if until_ms is None else str(until_ms))
    found = yield from _described(keys, ids)
    wanted = [
        job
        for job in found
        if (type_name is None or job.type == type_name)
        and (reason is None or (job.reason or "").startswith(reason))
    ]
    return DeadPage(jobs=wanted, cursor=after)


def dead_total(keys: Keys) -> Steps[int]:
    """How many entries there are."""
    return int((yield from ask(("ZCARD", keys.dlq_index)))[0])


def dead_among(keys: Keys, names: Sequence[str]) -> Steps[int]:
    """How many of these jobs are there, a page a round trip."""
    count = 0
    for at in range(0, len(names), PAGE):
        (scores,) = yield from ask(("ZMSCORE", keys.dlq_index, *names[at : at + PAGE]))
        count += sum(score is not None for score in scores)
    return count


def dead_job(keys: Keys, name: str) -> Steps[DeadJob | None]:
    """One entry with its payload, None if it is not there."""
    frame, meta, died_ms = yield from ask(
        ("HGET", keys.dlq, name), ("HGET", keys.dlq_meta, name), ("ZSCORE", keys.dlq_index, name)
    )
    if frame is None:
        return None
    return parse_dead(name, meta, died_ms, payload=payload_of(frame))


def parse_dead(
    name: str, meta: bytes | None, died_ms: Any, payload: Mapping[str, Any] | None = None
) -> DeadJob:
    told = parse_own(meta)

    def word(key: str) -> str | None:
        value = told.get(key)
        return None if value is None else str(value)

    def number(value: Any) -> int:
        return int(value) if isinstance(value, int | float) and 0 <= value < _NUMBER_MAX else 0

    return DeadJob(
        id=name,
        type=word("type"),
        lane=word("lane"),
        reason=word("reason"),
        error=error_text(told.get("error")),
        attempts=number(told.get("attempts")),
        crashes=number(told.get("crashes")),
        died_at=to_datetime(number(told.get("died_at")) or number(float(died_ms or 0))),
        payload=payload,
    )


def payload_of(frame: bytes) -> Mapping[str, Any] | None:
    """The payload of a frame of one, None when its bytes do not allow that."""
    try:
        _, _, stored, _, zstd = codec.walk(frame)[0]
        return decode(decompress(stored, payload_max_bytes=_PAYLOAD_CEILING) if zstd else stored)
    except (FrameError, InvalidPayload, PayloadTooLarge):
        return None


_NUMBER_MAX: Final = 10**14  # a time in ms of the year 5138
_PAYLOAD_CEILING: Final = 16 * 1024 * 1024  # what the setting allows at most


def _page(
    keys: Keys, newest_first: bool, cursor: Cursor | None, latest: str
) -> Steps[tuple[list[bytes], Cursor | None]]:
    """Up to a page of ids behind the cursor. Those of one millisecond come in the order of their bytes."""
    at = None if cursor is None else format(cursor.died_ms, ".17g")
    if newest_first:
        command, first, last = "ZREVRANGEBYSCORE", at or latest, "-inf"
    else:
        command, first, last = "ZRANGEBYSCORE", at or "-inf", latest
    offset = 0
    while True:
        flat = (yield from ask((command, keys.dlq_index, first, last, "WITHSCORES", "LIMIT", offset, PAGE)))[
            0
        ]
        places = [Cursor(float(score), name) for name, score in zip(flat[::2], flat[1::2], strict=True)]
        fresh = [
            place
            for place in places
            if cursor is None or (place < cursor if newest_first else place > cursor)
        ]
        if len(places) < PAGE:
            return [place.id for place in fresh], None
        if fresh:
            return [place.id for place in fresh], fresh[-1]
        offset += PAGE  # more entries of one millisecond than a page holds, and all of these were seen


def _described(keys: Keys, ids: Sequence[bytes]) -> Steps[list[DeadJob]]:
    if not ids:
        return []
    metas, scores = yield from ask(("HMGET", keys.dlq_meta, *ids), ("ZMSCORE", keys.dlq_index, *ids))
    return [
        parse_dead(name.decode("utf-8", "replace"), meta, score)
        for name, meta, score in zip(ids, metas, scores, strict=True)
    ]
