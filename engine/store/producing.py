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
from tqe.errors import FrameError, QueueFull, RedisUnavailable, SubmitUnknown
from tqe.job import bucket_of, job_id, split_job_id
from tqe.store.call import Call
from tqe.store.keys import Keys
from tqe.store.steps import Pause, Reads, Step, Steps

OPEN_TTL_S: Final = 7 * 86_400  # how long the record of a job that has not ended is kept after its due time
# One call keeps Redis busy for a few milliseconds at most.
CALL_BYTES_MAX: Final = 1024 * 1024
CALL_FRAMES_MAX: Final = 1_000
PAGE: Final = 500
PATIENCE_S: Final = (
    30.0  # a restart of Redis with a large log to load is survived, a Redis that is gone is told
)
_BACKOFF_FIRST_S: Final = 0.02
_BACKOFF_MAX_S: Final = 1.0


class Key(NamedTuple):
    """An idempotency key as it is stored: its name, the request that it guards, and for how long."""

    stored: str
    request_hash: str
    ttl_s: int


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
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


# ------------------------------------------------------------------ enqueue


def enqueue_call(keys: Keys, frames: Sequence[Outgoing]) -> tuple[Call, list[int]]:
    """The call, and for each group of its reply the position of its keyed frame, or -1."""
    lanes: dict[str, int] = {}
    buckets: dict[tuple[int, str], int] = {}
    names: dict[str, int] = {}
    groups: dict[tuple[str, int, str, bytes], list[bytes]] = {}
    keyed: list[tuple[int, Outgoing, int]] = []
    for position, frame in enumerate(frames):
        lanes.setdefault(frame.lane, len(lanes) + 1)
        bucket = buckets.setdefault(bucket_of(frame.frame_id), len(buckets) + 1) if frame.value else 0
        if frame.key is None:
            groups.setdefault((frame.lane, bucket, frame.due, frame.value), []).append(frame.data)
        else:
            keyed.append((position, frame, bucket))
    args: list[bytes | str | int] = []
    for (lane, bucket, due, value), data in groups.items():
        args += ("G", lanes[lane], bucket, due, value, len(data), *data)
    for _, frame, bucket in keyed:
        assert frame.key is not None
        number = names.setdefault(frame.key.stored, len(names) + 1)
        holder = f"{job_id(frame.frame_id, 0)} {frame.key.request_hash}"
        args += ("K", lanes[frame.lane], bucket, frame.due, frame.value)
        args += (number, holder, frame.key.ttl_s, frame.data)
    where = [keys.stats, keys.depth, keys.delayed]
    for lane in lanes:
        where += [keys.queue(lane), keys.wake(lane)]
    where += [keys.bucket(second, character) for second, character in buckets]
    where += [keys.idem(name) for name in names]
    head = (len(lanes), len(buckets), OPEN_TTL_S)
    positions = [-1] * len(groups) + [position for position, _, _ in keyed]
    return Call("enqueue", tuple(where), (*head, *args)), positions


def read_enqueue(reply: Sequence[Any], positions: Sequence[int]) -> Enqueued:
    held: dict[int, tuple[str, str]] = {}
    for position, answer in zip(positions, reply[1:], strict=True):
        if isinstance(answer, bytes):
            first, _, request_hash = answer.decode().partition(" ")
            held[position] = (first, request_hash)
    return Enqueued(int(reply[0]), held)


def enqueue(keys: Keys, frames: Sequence[Outgoing], *, patience_s: float = PATIENCE_S) -> Steps[Enqueued]:
    """Send frames that go together in one call.

    When the reply is lost, the same bytes are sent again: a snapshot, or a key that holds this very job,
    tells a repeat from a first. A frame with neither leaves no trace to tell by: SubmitUnknown, lest it
    runs twice.
    """
    call, positions = enqueue_call(keys, frames)
    safe = all(frame.value or frame.key for frame in frames)

    def unknown() -> SubmitUnknown:
        return SubmitUnknown(job_id(frames[0].frame_id, 0))

    reply = yield from persist(call, patience_s=patience_s, repeatable=safe, unknown=unknown)
    return read_enqueue(reply, positions)


def persist(
    call: Step,
    *,
    patience_s: float = PATIENCE_S,
    repeatable: bool = True,
    unknown: Callable[[], Exception] | None = None,
) -> Steps[Any]:
    """Send until an answer comes or patience ends: at once after a lost reply, later where Redis asks for
    time.

    `unknown` makes the exception for the case that the call may have been applied and nobody can tell.
    """
    deadline_ns = clock.monotonic_ns() + int(patience_s * 1e9)
    lost = False
    pause_s = _BACKOFF_FIRST_S
    while True:
        try:
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
    names = (keys.void, keys.cancel, keys.delayed, keys.stats, keys.depth, keys.closed, bucket)
    answer = yield from persist(Call("cancel", names, (frame_id, index, result_ttl_s)))
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
