"""What the steward asks of Redis: renewing, promoting, reaping, recovering, publishing, auditing, trimming.

Calls are built and replies are read here by plain functions, one duty after the other; when to make them is
the steward's business.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import redis

from tqe import codec
from tqe.errors import FrameError, QueueFull, RedisUnavailable, ScriptError, TQEError
from tqe.job import bucket_of, is_frame_id
from tqe.store.call import Argument, Call, Reply, SyncDoor, connect
from tqe.store.keys import Keys
from tqe.store.model import Standing, read_standing, standing_command
from tqe.store.settling import SettleBatch
from tqe.store.steps import Reads, Steps, T

# One pass of anything stays below these, so that neither Redis nor the steward is busy with it for long.
PROMOTE_FRAMES_MAX: Final = 256
PROMOTE_BYTES_MAX: Final = 2 * 1024 * 1024
UNPARK_FRAMES_MAX: Final = 256
INCARNATIONS_MAX: Final = 20_000
CANCELS_MAX: Final = 500
BUCKETS_MAX: Final = 500
SLICE_FRAMES: Final = 64  # of up to 64 KiB each
SCAN_COUNT: Final = 500
# A bucket's name stays in `closed` after Redis has expired the bucket; it is looked at this long after its
# time.
CLOSED_MARGIN_MS: Final = 60_000
_FOREVER_MS: Final = 10**14

OTHER_LANES: Final = "other"  # how lanes that this host does not serve are told, all together

TERMINAL: Final = frozenset(b"CDXEB")
_LEASE_NAME: Final = re.compile(rb"[0-9A-HJKMNP-TV-Z]{26}\.[0-9]{3}\.[0-9]{4}\.[0-9]{5}")


class Door(SyncDoor):
    """The steward's way to Redis. `beat` is called around each exchange, so that many slow ones are no
    hang."""

    def __init__(self, url: str, *, timeout_s: float, beat: Callable[[], None]) -> None:
        super().__init__(connect(url, timeout_s=timeout_s, max_connections=2))
        self._beat = beat

    def send(
        self, commands: Sequence[tuple[Argument, ...]], scripts: Sequence[str] = ()
    ) -> list[Reply | TQEError]:
        self._beat()
        try:
            return super().send(commands, scripts)
        finally:
            self._beat()

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def ask(door: SyncDoor, *commands: tuple[Argument, ...]) -> list[Reply]:
    """Plain commands in one write; raises the first failure among the answers."""
    answers = door.send(commands)
    for answer in answers:
        if isinstance(answer, TQEError):
            raise answer
    return answers


def drive(door: SyncDoor, steps: Steps[T]) -> T:
    """The result of a procedure that only reads."""
    try:
        step = next(steps)
        while isinstance(step, Reads):
            step = steps.send(ask(door, *step.commands))
    except StopIteration as done:
        result: T = done.value
        return result
    raise TypeError(f"{step} is not a read")


def transaction(door: SyncDoor, *commands: tuple[Argument, ...]) -> list[Reply]:
    """The same, seen at one moment of Redis."""
    answers = ask(door, ("MULTI",), *commands, ("EXEC",))
    if not isinstance(answers[-1], list):
        raise ScriptError("a transaction was not executed")
    return answers[-1]


def watched(door: SyncDoor, key: bytes, change: Callable[[Any], T]) -> T | None:
    """Read and write under WATCH of `key`: None, and nothing written, if somebody else changed it in
    between."""
    try:
        pipe: Any
        with door.client.pipeline(transaction=True) as pipe:
            pipe.watch(key)
            result = change(pipe)
            pipe.execute()
            return result
    except redis.WatchError:
        return None
    except (redis.ConnectionError, redis.TimeoutError, OSError) as e:
        raise RedisUnavailable(f"Redis cannot be reached: {e}") from e
    except redis.ResponseError as e:
        if "OOM" in str(e):
            raise QueueFull(str(e)) from e
        raise ScriptError(str(e)) from e


# ------------------------------------------------------------------ leases


class Renewed(NamedTuple):
    """Reply of `renew`. `leases`: incarnation → (alive, leases held)."""

    now_us: int
    cancels: bool
    lease_end_ms: int
    leases: dict[str, tuple[bool, int]]


def renew(keys: Keys, incarnations: Sequence[str], lease_ms: int) -> Call:
    """Extend the leases of these incarnations; one that is gone stays gone."""
    names = (keys.void, keys.incarnations, keys.cancel, *(keys.processing(one) for one in incarnations))
    return Call("renew", names, (lease_ms, *incarnations))


def read_renew(incarnations: Sequence[str], reply: list[Any]) -> Renewed:
    """Parse the reply of `renew`."""
    told = reply[3:]
    leases = {one: (bool(told[2 * k]), told[2 * k + 1]) for k, one in enumerate(incarnations)}
    return Renewed(reply[0], bool(reply[1]), reply[2], leases)


class Leases(NamedTuple):
    """All incarnations of the shard: → end of its lease in ms of Redis; and Redis' time of that look."""

    now_ms: int
    ends: dict[str, int]


def leases(door: SyncDoor, keys: Keys) -> Leases:
    """Who holds a lease until when, the earliest ends first."""
    time, flat = ask(door, ("TIME",), ("ZRANGE", keys.incarnations, 0, INCARNATIONS_MAX - 1, "WITHSCORES"))
    return Leases(
        int(time[0]) * 1000 + int(time[1]) // 1000,
        {flat[k].decode("ascii", "replace"): int(float(flat[k + 1])) for k in range(0, len(flat), 2)},
    )


class Settled(NamedTuple):
    """What became of a batch: leases that were applied, fenced (not held any more), and refused as bad."""

    applied: int
    fenced: int
    bad: list[bytes]


def settle(
    door: SyncDoor,
    keys: Keys,
    incarnation: str,
    batch: SettleBatch,
    *,
    result_ttl_s: int,
    dlq_max: int,
    recovered: bool = True,
) -> Settled:
    """Settle on behalf of a worker that is gone, or (not `recovered`) held up. Raises at the first call that
    failed; what is left is seen again."""
    applied, fenced = 0, 0
    bad: list[bytes] = []
    calls = batch.calls(keys, incarnation, result_ttl_s=result_ttl_s, dlq_max=dlq_max, recovered=recovered)
    for made in calls:
        marks = door.run(made.call)[1]
        for lease, mark in zip(made.leases, marks.decode("ascii"), strict=True):
            if mark == "1":
                applied += 1
            elif mark == "0":
                fenced += 1
            else:
                bad.append(lease)
    return Settled(applied, fenced, bad)


def lease_names(door: SyncDoor, keys: Keys, incarnation: str) -> list[bytes]:
    """Names of what an incarnation holds, as scripts give them."""
    names: list[bytes] = ask(door, ("HKEYS", keys.processing(incarnation)))[0]
    return [name for name in names if is_lease_name(name)]


def leases_of(door: SyncDoor, keys: Keys, incarnation: str) -> list[tuple[bytes, bytes]]:
    """What an incarnation holds: name and frame of each lease. Nothing changes by it, other than by
    `takeover`."""
    flat: list[bytes] = ask(door, ("HGETALL", keys.processing(incarnation)))[0]
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return [(name, frame) for name, frame in pairs if is_lease_name(name)]


def is_lease_name(name: bytes) -> bool:
    """Whether a field of an in-flight hash has the form that scripts give it."""
    return _LEASE_NAME.fullmatch(name) is not None


def sorted_out(
    door: SyncDoor, keys: Keys, incarnation: str, fields: Sequence[tuple[bytes, bytes]]
) -> list[tuple[bytes, bytes]]:
    """The leases among the fields of an incarnation of our own; what is none goes to quarantine.

    A name that no script gives (written by hand, damaged) is refused by settle, and would come back for ever.
    """
    for name, value in fields:
        if not is_lease_name(name):
            transaction(
                door,
                ("HDEL", keys.processing(incarnation), name),
                ("RPUSH", keys.quarantine, value),
                ("HINCRBY", keys.stats, "quarantined", 1),
            )
    return [(name, value) for name, value in fields if is_lease_name(name)]


# ------------------------------------------------------------------ delayed and parked frames


class Promoted(NamedTuple):
    """Reply of `promote`. `missing`: lanes of due frames that were not among those given."""

    now_us: int
    jobs: int
    frames: int
    next_due_ms: int
    missing: list[str]


def promote(
    keys: Keys,
    lanes: Sequence[str],
    *,
    frames_max: int = PROMOTE_FRAMES_MAX,
    bytes_max: int = PROMOTE_BYTES_MAX,
) -> Call:
    """Put due frames of these lanes into them."""
    names = [keys.void, keys.delayed, keys.depth, keys.quarantine, keys.parked, keys.stats]
    for lane in lanes:
        names += [keys.queue(lane), keys.wake(lane)]
    return Call("promote", tuple(names), (frames_max, bytes_max, *lanes))


def read_promote(reply: list[Any]) -> Promoted:
    """Parse the reply of `promote`."""
    return Promoted(
        reply[0], reply[1], reply[2], int(reply[3]), [name.decode("ascii", "replace") for name in reply[4:]]
    )


def unpark(keys: Keys, lanes: Sequence[str], *, frames_max: int = UNPARK_FRAMES_MAX) -> Call:
    """Give parked frames back to their lanes, as far as this version understands them."""
    names = [keys.void, keys.parked, keys.depth]
    for lane in lanes:
        names += [keys.sorted(lane), keys.wake(lane)]
    return Call("unpark", tuple(names), (frames_max, *lanes))


def parked_head(door: SyncDoor, keys: Keys, frames: int = 8) -> list[bytes]:
    """The first parked frames."""
    found: list[bytes] = ask(door, ("LRANGE", keys.parked, 0, frames - 1))[0]
    return found


# ------------------------------------------------------------------ what others read


def publish(
    door: SyncDoor,
    keys: Keys,
    workers: Mapping[str, bytes],
    means: Mapping[str, int],
    *,
    ttl_ms: int,
    tasks: tuple[str, bytes] | None = None,
) -> bool:
    """Write what each incarnation runs, mean durations in µs by type, and what all tasks did so far, under
    the steward's name. False when Redis is full: it is only news."""
    commands: list[tuple[Argument, ...]] = [
        ("SET", keys.worker(one), text, "PX", ttl_ms) for one, text in workers.items()
    ]
    if tasks is not None:
        commands.append(("SET", keys.tasks(tasks[0]), tasks[1], "PX", ttl_ms))
    if means:
        flat: list[Argument] = []
        for name, mean_us in means.items():
            flat += [name, mean_us]
        commands.append(("HSET", keys.means, *flat))
    if not commands:
        return True
    try:
        ask(door, *commands)
    except QueueFull:
        return False
    return True


class Totals(NamedTuple):
    """The shard in numbers, for metrics: jobs by lane (all, of them sorted), and the totals since ever.

    `oldest_us`: by lane, when its oldest frame entered. `leases`: by incarnation, of those asked for.
    """

    lanes: dict[str, tuple[int, int]]
    scheduled: int
    dead: int
    quarantined: int
    parked: int
    stats: dict[str, int]
    oldest_us: dict[str, int]
    paused: frozenset[str]
    leases: dict[str, int]
    now_us: int
    standing: Standing


def totals(door: SyncDoor, keys: Keys, lanes: Sequence[str], incarnations: Sequence[str] = ()) -> Totals:
    """Read them, as cached by the scripts; lanes of others count together as `other`."""
    return read_totals(ask(door, *totals_commands(keys, lanes, incarnations)), lanes, incarnations)


def totals_commands(
    keys: Keys, lanes: Sequence[str], incarnations: Sequence[str] = ()
) -> tuple[tuple[Argument, ...], ...]:
    """What to send for them; `read_totals` reads the answers."""
    return (
        ("HGETALL", keys.depth),
        ("HLEN", keys.dlq),
        ("LLEN", keys.quarantine),
        ("LLEN", keys.parked),
        ("HGETALL", keys.stats),
        ("SMEMBERS", keys.paused),
        ("TIME",),
        standing_command(keys, lanes),
        *(("LINDEX", keys.queue(lane), 0) for lane in lanes),
        *(("ZRANGE", keys.sorted(lane), 0, 0) for lane in lanes),
        *(("HLEN", keys.processing(one)) for one in incarnations),
    )


def read_totals(answers: Sequence[Any], lanes: Sequence[str], incarnations: Sequence[str] = ()) -> Totals:
    depth, dead, quarantined, parked, stats, paused, (seconds, us), standing, *more = answers
    depths = _numbers(depth)
    by_lane = {lane: (0, 0) for lane in lanes}
    for name, jobs in depths.items():
        lane, part, _ = name.partition(":")
        if name != "delayed":
            lane = lane if lane in lanes else OTHER_LANES
            queued, in_order = by_lane.get(lane, (0, 0))
            by_lane[lane] = (queued + max(0, jobs), in_order + (max(0, jobs) if part else 0))
    return Totals(
        by_lane,
        max(0, depths.get("delayed", 0)),
        dead,
        quarantined,
        parked,
        _numbers(stats),
        _oldest_us(lanes, more),
        frozenset(name.decode("ascii", "replace") for name in paused),
        dict(zip(incarnations, more[2 * len(lanes) :], strict=True)),
        int(seconds) * 1_000_000 + int(us),
        read_standing(standing, lanes),
    )


def _oldest_us(lanes: Sequence[str], heads: Sequence[Any]) -> dict[str, int]:
    """When the oldest frame of each lane entered it: the head of its list, or of its ordered part, whose
    first is not always the oldest, but is never far from it."""
    found: dict[str, int] = {}
    for at, lane in enumerate(lanes):
        for frame in (heads[at], *heads[at + len(lanes)]):
            with contextlib.suppress(FrameError):
                if frame is not None:
                    since_us = codec.peek(frame).enqueued_us
                    found[lane] = min(since_us, found.get(lane, since_us))
    return found


def frames_wait(door: SyncDoor, keys: Keys, lanes: Sequence[str]) -> bool:
    """Whether anything waits in one of these lanes that is not paused."""
    paused, *sizes = ask(
        door,
        ("SMEMBERS", keys.paused),
        *(("LLEN", keys.queue(lane)) for lane in lanes),
        *(("ZCARD", keys.sorted(lane)) for lane in lanes),
    )
    return any(size and lanes[at % len(lanes)].encode() not in paused for at, size in enumerate(sizes))


def _numbers(flat: list[bytes]) -> dict[str, int]:
    found = {}
    for k in range(0, len(flat), 2):
        try:
            found[flat[k].decode("ascii", "replace")] = int(flat[k + 1])
        except ValueError:
            continue  # written by hand; a number is what the scripts need, so they complain themselves
    return found


def is_quiet(door: SyncDoor, keys: Keys, lanes: Sequence[str]) -> bool:
    """Whether, at one moment, no job waits in these lanes, is delayed, or is held by anybody."""
    incarnations: list[bytes] = ask(door, ("ZRANGE", keys.incarnations, 0, INCARNATIONS_MAX - 1))[0]
    sizes = transaction(
        door,
        ("ZCARD", keys.delayed),
        *(("LLEN", keys.queue(lane)) for lane in lanes),
        *(("ZCARD", keys.sorted(lane)) for lane in lanes),
        *(("HLEN", keys.processing(one)) for one in incarnations),
    )
    return not any(sizes)


# ------------------------------------------------------------------ cancel requests


def cancels(door: SyncDoor, keys: Keys, cursor: int = 0) -> tuple[int, dict[bytes, set[int]]]:
    """One slice of the requests: the next cursor (0: no more) and frame id → indexes."""
    next_cursor, flat = ask(door, ("HSCAN", keys.cancel, cursor, "COUNT", CANCELS_MAX))[0]
    found = {}
    for k in range(0, len(flat), 2):
        found[flat[k]] = {int(index) for index in flat[k + 1].split(b",") if index.isdigit()}
    return int(next_cursor), found


def any_cancels(door: SyncDoor, keys: Keys) -> bool:
    """Whether somebody has asked for a cancel that is not swept yet."""
    return bool(ask(door, ("EXISTS", keys.cancel))[0])


def settled_cancels(door: SyncDoor, keys: Keys, wanted: Mapping[bytes, set[int]]) -> set[bytes]:
    """Those of the requests whose jobs have all ended, or of which nothing is known any more."""
    known = [one for one in wanted if is_frame_id(one.decode("ascii", "replace"))]
    values = ask(door, *(("HGET", keys.bucket(*bucket_of(one)), one) for one in known)) if known else []
    over = set(wanted) - set(known)
    for frame_id, value in zip(known, values, strict=True):
        states = value.split(b",", 1)[0] if value else b""
        if all(_state(states, index) in TERMINAL for index in wanted[frame_id]):
            over.add(frame_id)
    return over


def _state(states: bytes, index: int) -> int:
    """The state of one job; what is not known counts as ended (`B`)."""
    if len(states) == 1:
        return states[0]
    return states[index] if index < len(states) else b"B"[0]


def drop_cancels(door: SyncDoor, keys: Keys, over: Mapping[bytes, set[int]]) -> int:
    """Remove requests, if nobody has asked for more jobs of these frames meanwhile."""

    def change(pipe: Any) -> int:
        ids = list(over)
        now = pipe.hmget(keys.cancel, ids)
        same = [
            one
            for one, value in zip(ids, now, strict=True)
            if value is not None and {int(i) for i in value.split(b",") if i.isdigit()} == over[one]
        ]
        pipe.multi()
        if same:
            pipe.hdel(keys.cancel, *same)
        return len(same)

    return watched(door, keys.cancel, change) or 0


# ------------------------------------------------------------------ audit


@dataclass(frozen=True, slots=True)
class Part:
    """A countable part of the queue: a lane's list, its sorted set, or the delayed frames."""

    field: str
    key: bytes
    is_list: bool

    def size(self) -> tuple[Argument, ...]:
        """The command that answers with its size in frames."""
        return ("LLEN" if self.is_list else "ZCARD", self.key)

    def slice(self, start: int, frames: int) -> tuple[Argument, ...]:
        """The command that answers with some of its frames."""
        return ("LRANGE" if self.is_list else "ZRANGE", self.key, start, start + frames - 1)


def parts(keys: Keys, lanes: Iterable[str]) -> list[Part]:
    """Every part of these lanes, and the delayed frames."""
    found = [Part("delayed", keys.delayed, False)]
    for lane in lanes:
        found += [Part(lane, keys.queue(lane), True), Part(f"{lane}:sorted", keys.sorted(lane), False)]
    return found


def depth_lanes(door: SyncDoor, keys: Keys) -> set[str]:
    """Lanes that have a depth, whoever serves them."""
    names: list[bytes] = ask(door, ("HKEYS", keys.depth))[0]
    return {name.decode("ascii", "replace").removesuffix(":sorted") for name in names} - {"delayed"}


class Look(NamedTuple):
    """A part at one moment: its depth as cached, its size in frames, some frames."""

    depth: int
    frames: int
    slice: list[bytes]


def look(door: SyncDoor, keys: Keys, part: Part, start: int = 0, frames: int = SLICE_FRAMES) -> Look:
    """One slice of a part, with its cached depth and its size at that very moment."""
    depth, size, found = transaction(
        door, ("HGET", keys.depth, part.field), part.size(), part.slice(start, frames)
    )
    return Look(int(depth or 0), size, found)


def correct_depth(door: SyncDoor, keys: Keys, part: Part, seen: Look, jobs: int) -> bool:
    """Write the counted number of jobs, if depth and size are still what they were when it was counted."""

    def change(pipe: Any) -> bool:
        depth = pipe.hget(keys.depth, part.field)
        size = pipe.execute_command(*part.size())
        pipe.multi()
        if int(depth or 0) != seen.depth or size != seen.frames:
            return False
        if jobs:
            pipe.hset(keys.depth, part.field, jobs)
        else:
            pipe.hdel(keys.depth, part.field)
        return True

    return bool(watched(door, keys.depth, change))


def scan_in_flight(door: SyncDoor, keys: Keys, cursor: int) -> tuple[int, list[str]]:
    """One bounded step through the keys: the next cursor and the incarnations whose hashes were met."""
    pattern = keys.processing("*")
    next_cursor, found = ask(door, ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT))[0]
    cut = len(pattern) - 1
    return int(next_cursor), [name[cut:].decode("ascii", "replace") for name in found]


def unregistered(door: SyncDoor, keys: Keys, incarnations: Sequence[str]) -> list[str]:
    """Those that hold leases and are not registered: nobody would ever reap them."""
    if not incarnations:
        return []
    scores = ask(door, *(("ZSCORE", keys.incarnations, one) for one in incarnations))
    return [one for one, score in zip(incarnations, scores, strict=True) if score is None]


def register_orphan(door: SyncDoor, keys: Keys, incarnation: str, now_ms: int) -> bool:
    """Give an orphaned hash a lease that ends now, so that it is reaped like any other that went silent.

    Only while the hash is there: an id that holds nothing must stay gone, or a late fetch could lease to it.
    """

    def change(pipe: Any) -> bool:
        there = bool(pipe.exists(keys.processing(incarnation)))
        pipe.multi()
        if there:
            pipe.zadd(keys.incarnations, {incarnation: now_ms}, nx=True)
        return there

    return bool(watched(door, keys.processing(incarnation), change))


# ------------------------------------------------------------------ what is over


def closed_since(door: SyncDoor, keys: Keys, since_ms: int) -> list[tuple[bytes, int]]:
    """Buckets that closed at or after that time, with when, the oldest first."""
    flat = ask(
        door,
        ("ZRANGEBYSCORE", keys.closed, since_ms, "+inf", "WITHSCORES", "LIMIT", 0, BUCKETS_MAX),
    )[0]
    return [(flat[k], int(float(flat[k + 1]))) for k in range(0, len(flat), 2)]


def closed_before(door: SyncDoor, keys: Keys, before_ms: int) -> list[bytes]:
    """The oldest buckets that closed before that time."""
    found: list[bytes] = ask(
        door, ("ZRANGEBYSCORE", keys.closed, "-inf", f"({before_ms}", "LIMIT", 0, BUCKETS_MAX)
    )[0]
    return found


def fields_of(door: SyncDoor, buckets: Sequence[bytes]) -> list[int]:
    """How many fields each of the buckets has."""
    return ask(door, *(("HLEN", bucket) for bucket in buckets)) if buckets else []


def trim(door: SyncDoor, keys: Keys, buckets: Sequence[bytes], *, age_ms: int | None) -> int:
    """Drop closed buckets of at least this age; with None only forget the names of those that Redis has
    expired."""
    if not buckets:
        return 0
    limit = _FOREVER_MS if age_ms is None else age_ms
    dropped: int = door.run(Call("trim", (keys.void, keys.closed, *buckets), (limit,)))
    return dropped


def drop_waiters(door: SyncDoor, keys: Keys, now_ms: int) -> int:
    """Forget waiters whose time is over."""
    return int(ask(door, ("ZREMRANGEBYSCORE", keys.waiting, "-inf", now_ms))[0])


def redis_now_ms(door: SyncDoor) -> int:
    """Redis' clock."""
    time = ask(door, ("TIME",))[0]
    return int(time[0]) * 1000 + int(time[1]) // 1000
