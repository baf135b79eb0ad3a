"""Owns what producers and operators change in Redis: enqueue, cancel, replay, purge; calls, replies, lost
replies.

Each procedure is a generator of steps (`tqe.store.steps`): it knows what to send, what an answer means and
what to do when none came, and nothing of sockets. So the sync and the async client share all of it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tqe import clock, codec
from tqe.codec.payload import canonical, compress
from tqe.errors import FrameError, QueueFull, RedisUnavailable, SubmitUnknown
from tqe.formats import ID_TIME_CHARS
from tqe.job import (
    SubmitOptions,
    bucket_of,
    job_id,
    new_snapshot,
    request_hash,
    split_job_id,
    stored_key,
)
from tqe.store.call import Call
from tqe.store.keys import Keys
from tqe.store.steps import Begin, Finish, Pause, Reads, Step, Steps

OPEN_TTL_S: Final = 7 * 86_400  # how long the record of a job that has not ended is kept after its due time
# One call keeps Redis busy for a few milliseconds at most.
CALL_BYTES_MAX: Final = 1024 * 1024
CALL_FRAMES_MAX: Final = 1_000
PAGE: Final = 500
PATIENCE_S: Final = (
    30.0  # a restart of Redis with a large log to load is survived, a Redis that is gone is told
)
_BUCKET_CHARS: Final = ID_TIME_CHARS + 1  # time, and the bucket character behind it
_BACKOFF_FIRST_S: Final = 0.02
_BACKOFF_MAX_S: Final = 1.0


class Key(NamedTuple):
    """An idempotency key as it is stored: its name, the request that it guards, and for how long."""

    stored: str
    request_hash: str
    ttl_s: int


class Outgoing(NamedTuple):
    """One frame on its way into Redis. `value` is its snapshot, b"" when it is untracked."""

    frame_id: bytes
    n: int
    data: bytes
    lane: str
    due: str
    value: bytes
    key: Key | None = None


class Enqueued(NamedTuple):
    """What `enqueue` answered: Redis' time, and by position of the frame the job that holds its key
    already."""

    now_us: int
    held: dict[int, tuple[str, str]]  # position -> (first job id, hash of its request)


def frame_of_one(
    frame_id: bytes,
    type_name: str,
    payload: bytes,
    options: SubmitOptions,
    key: str | None,
    *,
    key_ttl_s: int,
    zstd_threshold_bytes: int,
) -> Outgoing:
    """A frame of one job, its payload being JSON as encoded. `key` is its idempotency key; the one in
    `options` does not count."""
    lane, track, limits = options.lane, options.track, options.limits()
    stored, zstd = payload, False
    if len(payload) >= zstd_threshold_bytes:
        stored, zstd = compress(payload, zstd_threshold_bytes=zstd_threshold_bytes)
    # Without a stamp: to put one into a small frame costs Redis next to nothing, and its own is exact.
    if zstd:
        job = (type_name.encode(), stored, b"", True)
        data = codec.pack([job], frame_id=frame_id, lane=lane, tracked=track, options=limits)
    else:
        data = codec.pack_same(
            type_name.encode(), [stored], frame_id=frame_id, lane=lane, tracked=track, options=limits
        )
    held = None
    if key is not None:
        held = Key(stored_key(key), request_hash(type_name, lane, canonical(payload)), key_ttl_s)
    value = new_snapshot(1, lane, type_name + "*1") if track else b""
    return Outgoing(frame_id, 1, data, lane, options.due, value, held)


# ------------------------------------------------------------------ enqueue


def enqueue_call(keys: Keys, frames: Sequence[Outgoing]) -> tuple[Call, list[int]]:
    """The call, and for each group of its reply the position of its keyed frame, or -1."""
    if len(frames) == 1 and frames[0].key is None:
        return _plain_call(keys, frames[0]), [-1]
    lanes: dict[str, int] = {}
    buckets: dict[tuple[int, str], int] = {}
    heads: dict[bytes, int] = {}  # what of an id says its bucket -> number of the bucket
    names: dict[str, int] = {}
    groups: dict[tuple[int, int, str, bytes], list[bytes]] = {}
    keyed: list[bytes | str | int] = []
    positions: list[int] = []
    for position, (frame_id, _, data, lane_name, due, value, key) in enumerate(frames):
        lane = lanes.get(lane_name) or lanes.setdefault(lane_name, len(lanes) + 1)
        bucket = 0
        if value:
            head = frame_id[:_BUCKET_CHARS]
            bucket = heads.get(head, 0)
            if not bucket:
                bucket = heads[head] = buckets.setdefault(bucket_of(frame_id), len(buckets) + 1)
        if key is None:
            where = (lane, bucket, due, value)
            group = groups.get(where)
            if group is None:
                groups[where] = [data]
            else:
                group.append(data)
        else:
            number = names.setdefault(key.stored, len(names) + 1)
            holder = b"%b.0 %b" % (frame_id, key.request_hash.encode())
            keyed += (b"K", lane, bucket, due, value, number, holder, key.ttl_s, data)
            positions.append(position)
    args: list[bytes | str | int] = [len(lanes), len(buckets), OPEN_TTL_S]
    for (lane, bucket, due, value), group in groups.items():
        args += (b"G", lane, bucket, due, value, len(group), *group)
    where_to = [keys.stats, keys.depth, keys.delayed]
    for name in lanes:
        queue, _, wake = keys.lane(name)
        where_to += (queue, wake)
    where_to += [keys.bucket(second, character) for second, character in buckets]
    where_to += [keys.idem(name) for name in names]
    return Call("enqueue", tuple(where_to), (*args, *keyed)), [-1] * len(groups) + positions


def _plain_call(keys: Keys, frame: Outgoing) -> Call:
    """The same for one frame without a key, in a few steps: so most single submissions go."""
    frame_id, _, data, lane, due, value, _ = frame
    queue, _, wake = keys.lane(lane)
    names = (keys.stats, keys.depth, keys.delayed, queue, wake)
    if not value:
        return Call("enqueue", names, (1, 0, OPEN_TTL_S, b"G", 1, 0, due, b"", 1, data))
    bucket = keys.bucket(*bucket_of(frame_id))
    return Call("enqueue", (*names, bucket), (1, 1, OPEN_TTL_S, b"G", 1, 1, due, value, 1, data))


def read_enqueue(reply: Sequence[Any], positions: Sequence[int]) -> Enqueued:
    held: dict[int, tuple[str, str]] = {}
    if len(positions) == 1 and positions[0] < 0:
        return Enqueued(int(reply[0]), held)
    for position, answer in zip(positions, reply[1:], strict=True):
        if isinstance(answer, bytes):
            first, _, request_hash = answer.decode().partition(" ")
            held[position] = (first, request_hash)
    return Enqueued(int(reply[0]), held)


class Sent(NamedTuple):
    """A call of `enqueue` that is under way."""

    call: Call
    positions: list[int]
    first: bytes  # id of its first frame
    safe: bool  # may be sent again when nobody can tell whether it was applied


def begin_enqueue(keys: Keys, frames: Sequence[Outgoing]) -> Steps[Sent]:
    """Send frames that go together in one call, and leave the answer for `finish_enqueue`, which must
    follow."""
    sent = _sent(keys, frames)
    yield Begin(sent.call)
    return sent


def finish_enqueue(sent: Sent, *, patience_s: float = PATIENCE_S) -> Steps[Enqueued]:
    """What became of the call: as `enqueue`."""
    return (yield from _persist_enqueue(sent, True, patience_s))


def enqueue(keys: Keys, frames: Sequence[Outgoing], *, patience_s: float = PATIENCE_S) -> Steps[Enqueued]:
    """Send frames that go together in one call.

    When the reply is lost, the same bytes are sent again: a snapshot, or a key that holds this very job,
    tells a repeat from a first. A frame with neither leaves no trace to tell by: SubmitUnknown, lest it
    runs twice.
    """
    return (yield from _persist_enqueue(_sent(keys, frames), False, patience_s))


def _sent(keys: Keys, frames: Sequence[Outgoing]) -> Sent:
    call, positions = enqueue_call(keys, frames)
    return Sent(call, positions, frames[0].frame_id, all(frame.value or frame.key for frame in frames))


def _persist_enqueue(sent: Sent, begun: bool, patience_s: float) -> Steps[Enqueued]:
    def unknown() -> SubmitUnknown:
        return SubmitUnknown(job_id(sent.first, 0))

    reply = yield from persist(sent.call, begun, patience_s=patience_s, repeatable=sent.safe, unknown=unknown)
    return read_enqueue(reply, sent.positions)


def persist(
    call: Step,
    begun: bool = False,
    *,
    patience_s: float = PATIENCE_S,
    repeatable: bool = True,
    unknown: Callable[[], Exception] | None = None,
) -> Steps[Any]:
    """Send until an answer comes or patience ends: at once after a lost reply, later where Redis asks for
    time. `begun`: the first try is under way.

    `unknown` makes the exception for the case that the call may have been applied and nobody can tell.
    """
    deadline_ns = clock.monotonic_ns() + int(patience_s * 1e9)
    lost = False
    pause_s = _BACKOFF_FIRST_S
    while True:
        try:
            if begun:
                begun = False
                return (yield Finish())
            return (yield call)
        except RedisUnavailable as e:
            lost = lost or e.applied is not False
            over = clock.monotonic_ns() + int(pause_s * 1e9) > deadline_ns
            if over or (lost and not repeatable):
                if lost and unknown is not None:
                    raise unknown() from e
                raise
        except QueueFull as e:
            # Full now; but an earlier try of this call may have gone in, and saying "full" would deny it.
            if lost and unknown is not None:
                raise unknown() from e
            raise
        # Half fixed and half random: many producers lose the same server at the same moment.
        yield Pause(pause_s / 2 + random.uniform(0, pause_s / 2))
        pause_s = min(_BACKOFF_MAX_S, pause_s * 2)


# ------------------------------------------------------------------ cancel


def cancel(keys: Keys, frame_id: bytes, index: int, *, result_ttl_s: int) -> Steps[str]:
    """`cancelled`, `requested`, `too_late:<state>` or `unknown`. A request that was lost is made again."""
    bucket = keys.bucket(*bucket_of(frame_id))
    names = (
        *(keys.void, keys.cancel, keys.delayed, keys.stats, keys.depth, keys.closed, bucket),
        keys.waiting,
    )
    args = (frame_id, index, result_ttl_s, keys.done_prefix)
    answer = yield from persist(Call("cancel", names, args))
    return answer.decode() if isinstance(answer, bytes) else str(answer)


# ------------------------------------------------------------------ the dead-letter queue


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of dead jobs that were to be replayed. `unknown`: the reply was lost and they are gone
    from the queue, so this or another replay took them."""

    replayed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # not there (any more)
    damaged: tuple[str, ...] = ()  # their bytes are no frame: left where they are
    unknown: tuple[str, ...] = ()


def replay(keys: Keys, ids: Sequence[str]) -> Steps[Replayed]:
    """Put dead jobs back into their lanes, all counters at 0; at most a page of them.

    A lost reply is not repeated blindly: what still stands in the queue was not replayed and is sent again.
    """
    missing: list[str] = []
    damaged: list[str] = []
    replayed: list[str] = []
    pending = list(ids[:PAGE])
    lost: set[str] = set()
    while pending:
        frames = (yield from persist(Reads((("HMGET", keys.dlq, *pending),))))[0]
        found: list[tuple[str, bytes]] = []
        for one, frame in zip(pending, frames, strict=True):
            if frame is None:
                if one not in lost:
                    missing.append(one)
                continue
            try:
                found.append((one, _fresh(frame)))
            except FrameError:
                damaged.append(one)
            lost.discard(one)
        if not found:
            break
        try:
            marks = yield from persist(_replay_call(keys, found), repeatable=False)
        except RedisUnavailable as e:
            if e.applied is False:
                raise
            pending = [one for one, _ in found]
            lost.update(pending)
            continue
        for (one, _), mark in zip(found, marks[1].decode(), strict=True):
            {"1": replayed, "b": damaged}.get(mark, missing).append(one)
        break
    return Replayed(tuple(replayed), tuple(missing), tuple(damaged), tuple(one for one in ids if one in lost))


def _fresh(frame: bytes) -> bytes:
    """The frame as if it had just been submitted; `run` goes up, so that old leases of it stay fenced."""
    header = codec.parse(frame)
    flags = header.flags & ~(codec.SCORED | codec.SUSPECT | codec.STARTED)
    return codec.rewrite(
        frame,
        run=min(header.run + 1, 99_999),
        attempts=0,
        crashes=0,
        reaps=0,
        unknowns=0,
        boost_us=0,
        flags=flags,
    )


def _replay_call(keys: Keys, found: Sequence[tuple[str, bytes]]) -> Call:
    lanes: dict[str, int] = {}
    buckets: dict[tuple[int, str], int] = {}
    args: list[bytes | str | int] = []
    for one, frame in found:
        header = codec.peek(frame)
        lane = lanes.setdefault(header.lane, len(lanes) + 1)
        bucket = 0
        if header.flags & codec.TRACKED:
            bucket = buckets.setdefault(bucket_of(split_job_id(one)[0]), len(buckets) + 1)
        args += (one, lane, bucket, frame)
    names = [keys.void, keys.dlq, keys.dlq_meta, keys.dlq_index, keys.stats, keys.depth, keys.closed]
    for name in lanes:
        names += [keys.queue(name), keys.wake(name)]
    names += [keys.bucket(second, character) for second, character in buckets]
    return Call("replay", tuple(names), (len(lanes), len(buckets), OPEN_TTL_S, *args))


def purge(keys: Keys, ids: Sequence[str]) -> Steps[int]:
    """Drop dead jobs for good; at most a page of them. How many there were: after a lost reply, how many
    are gone."""
    names = (keys.void, keys.dlq, keys.dlq_meta, keys.dlq_index, keys.stats)
    ids = ids[:PAGE]
    before = sum(frame is not None for frame in (yield from _present(keys, ids)))
    try:
        return int((yield from persist(Call("purge", names, tuple(ids)), repeatable=False)))
    except RedisUnavailable as e:
        if e.applied is False:
            raise
    yield from persist(Call("purge", names, tuple(ids)))
    return before


def _present(keys: Keys, ids: Sequence[str]) -> Steps[list[Any]]:
    if not ids:
        return []
    return list((yield from persist(Reads((("ZMSCORE", keys.dlq_index, *ids),))))[0])


# ------------------------------------------------------------------ lanes


def pause_lane(keys: Keys, lane: str) -> Steps[None]:
    """Workers take nothing from the lane until it is resumed; jobs that run go on."""
    yield from persist(Call("pause", (keys.void, keys.paused), (lane,)))


def resume_lane(keys: Keys, lane: str) -> Steps[None]:
    names = (keys.void, keys.paused, keys.queue(lane), keys.sorted(lane), keys.wake(lane))
    yield from persist(Call("resume", names, (lane,)))
