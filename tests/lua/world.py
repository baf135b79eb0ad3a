"""One Redis as the tests of the scripts see it: short ways to call each script, the whole state as a dict."""

from collections.abc import Sequence
from typing import Any

import redis

from tests.lua import frames
from tqe.store.call import Argument, Call, SyncDoor
from tqe.store.keys import Keys

OPEN_TTL_S = 7 * 86_400
RESULT_TTL_S = 3_600
LEASE_MS = 15_000

Group = tuple[Argument, ...]


def group(
    *data: bytes, lane: int = 1, bucket: int = 0, due: str = "0", value: str = "Q,1,0,0,0,high,EMAIL*1"
) -> Group:
    """A 'G' group of enqueue."""
    return ("G", lane, bucket, due, value if bucket else "", len(data), *data)


def keyed(
    frame: bytes,
    *,
    key: int = 1,
    ttl_s: int = 60,
    body: str = "0123456789abcdef",
    lane: int = 1,
    bucket: int = 1,
    due: str = "0",
) -> Group:
    """A 'K' group of enqueue."""
    holder = f"{frames.id_of(frame).decode()}.0 {body}"
    value = "Q,1,0,0,0,high,EMAIL*1" if bucket else ""
    return ("K", lane, bucket, due, value, key, holder, ttl_s, frame)


def done(*leases: bytes, bucket: int = 0, value: str = "C,1,0,5,6,high,EMAIL*1") -> Group:
    """A 'C' group of settle."""
    return ("C", bucket, value if bucket else "", len(leases), *leases)


def part(
    lease: bytes,
    *,
    bucket: int = 0,
    started: int = 0,
    finished: int = 0,
    ranges: Sequence[tuple[int, int, str]] = (),
    fields: Sequence[tuple[str, str]] = (),
    parts: Sequence[tuple[str, Argument, bytes]] = (),
) -> Group:
    """A 'P' group of settle."""
    flat: list[Argument] = ["P", lease, bucket, started, finished]
    for items in (ranges, fields, parts):
        flat.append(len(items))
        for item in items:
            flat += item
    return tuple(flat)


class World:
    """Calls, state and seeds of one empty Redis."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.door = SyncDoor(client)
        self.keys = Keys()
        self.bucket = self.keys.bucket(1_700_000_000, "A")

    # -- calls

    def enqueue_call(
        self,
        *groups: Group,
        lanes: Sequence[str] = ("high",),
        buckets: Sequence[bytes] | None = None,
        idem: Sequence[str] = ("k1",),
    ) -> Call:
        k = self.keys
        buckets = (self.bucket,) if buckets is None else buckets
        names = [k.stats, k.depth, k.delayed]
        for lane in lanes:
            names += [k.queue(lane), k.wake(lane)]
        names += [*buckets, *(k.idem(name) for name in idem)]
        args: list[Argument] = [len(lanes), len(buckets), OPEN_TTL_S]
        for one in groups:
            args += one
        return Call("enqueue", tuple(names), tuple(args))

    def enqueue(self, *groups: Group, **options: Any) -> list[Any]:
        reply: list[Any] = self.door.run(self.enqueue_call(*groups, **options))
        return reply

    def fetch_call(
        self,
        incarnation: str = "W1",
        *,
        lanes: Sequence[str | tuple[str, int]] = ("high",),
        jobs: int = 1_000,
        size: int = 1 << 20,
        count: int = 1_000,
        window: int = 1_000,
        sorted_max: int = 20_000,
    ) -> Call:
        k = self.keys
        names = [
            *(k.void, k.incarnations, k.processing(incarnation), k.depth, k.stats),
            *(k.cancel, k.quarantine, k.parked, k.paused),
        ]
        args: list[Argument] = [incarnation, LEASE_MS, jobs, size, count, window, sorted_max]
        for lane in lanes:
            name, bound = (lane, 0) if isinstance(lane, str) else lane
            names += k.lane(name)
            args += [name, bound]
        return Call("fetch", tuple(names), tuple(args))

    def fetch(self, incarnation: str = "W1", **options: Any) -> list[Any]:
        reply: list[Any] = self.door.run(self.fetch_call(incarnation, **options))
        return reply

    def fetched(self, incarnation: str = "W1", **options: Any) -> list[bytes]:
        """Only the frames."""
        return self.fetch(incarnation, **options)[5:]

    def settle_call(
        self,
        *groups: Group,
        incarnation: str = "W1",
        lanes: Sequence[str] = ("high",),
        buckets: Sequence[bytes] | None = None,
        dlq_max: int = 1_000,
        recovered: int = 0,
    ) -> Call:
        k = self.keys
        buckets = (self.bucket,) if buckets is None else buckets
        names = [
            *(k.void, k.processing(incarnation), k.stats, k.depth, k.delayed, k.dlq, k.dlq_meta),
            *(k.dlq_index, k.quarantine, k.closed, k.waiting),
        ]
        for lane in lanes:
            names += [k.sorted(lane), k.wake(lane)]
        names += buckets
        head = (len(lanes), len(buckets), RESULT_TTL_S, OPEN_TTL_S, dlq_max, k.done_prefix, recovered)
        args: list[Argument] = [*head, *lanes]
        for one in groups:
            args += one
        return Call("settle", tuple(names), tuple(args))

    def settle(self, *groups: Group, **options: Any) -> str:
        """The marks."""
        return self.settled(*groups, **options)[1]

    def settled(self, *groups: Group, **options: Any) -> tuple[int, str]:
        """Redis time in ms, and the marks."""
        now_us, marks = self.door.run(self.settle_call(*groups, **options))
        return now_us // 1_000, marks.decode()

    def takeover_call(
        self, new: str = "W1", old: str = "", guard: str = "", lease_ms: int = LEASE_MS
    ) -> Call:
        k = self.keys
        names = (k.void, k.incarnations, k.processing(old or "none"), k.processing(new))
        return Call("takeover", names, (old, new, lease_ms, guard))

    def takeover(
        self, new: str = "W1", old: str = "", guard: str = "", lease_ms: int = LEASE_MS
    ) -> list[Any]:
        reply: list[Any] = self.door.run(self.takeover_call(new, old, guard, lease_ms))
        return reply

    def renew_call(self, *incarnations: str) -> Call:
        k = self.keys
        names = (k.void, k.incarnations, k.cancel, *(k.processing(one) for one in incarnations))
        return Call("renew", names, (LEASE_MS, *incarnations))

    def leave_call(self, incarnation: str = "W1") -> Call:
        k = self.keys
        return Call("leave", (k.void, k.incarnations, k.processing(incarnation)), (incarnation,))

    def promote_call(self, *lanes: str, count: int = 1_000, size: int = 1 << 20) -> Call:
        k = self.keys
        names = [k.void, k.delayed, k.depth, k.quarantine, k.parked, k.stats]
        for lane in lanes:
            names += [k.queue(lane), k.wake(lane)]
        return Call("promote", tuple(names), (count, size, *lanes))

    def promote(self, *lanes: str, count: int = 1_000, size: int = 1 << 20) -> list[Any]:
        reply: list[Any] = self.door.run(self.promote_call(*lanes, count=count, size=size))
        return reply

    def unpark_call(self, *lanes: str, count: int = 100) -> Call:
        k = self.keys
        names = [k.void, k.parked, k.depth]
        for lane in lanes:
            names += [k.sorted(lane), k.wake(lane)]
        return Call("unpark", tuple(names), (count, *lanes))

    def cancel_call(self, frame_id: bytes, index: int = 0) -> Call:
        k = self.keys
        names = (k.void, k.cancel, k.delayed, k.stats, k.depth, k.closed, self.bucket, k.waiting)
        return Call("cancel", names, (frame_id, index, RESULT_TTL_S, k.done_prefix))

    def cancel(self, frame_id: bytes, index: int = 0) -> str:
        answer: bytes = self.door.run(self.cancel_call(frame_id, index))
        return answer.decode()

    def replay_call(self, *jobs: tuple[str, bytes], lane: str = "high", bucket: int = 1) -> Call:
        k = self.keys
        names = (
            *(k.void, k.dlq, k.dlq_meta, k.dlq_index, k.stats, k.depth, k.closed),
            *(k.queue(lane), k.wake(lane), self.bucket),
        )
        args: list[Argument] = [1, 1, OPEN_TTL_S]
        for job, frame in jobs:
            args += [job, 1, bucket, frame]
        return Call("replay", names, tuple(args))

    def purge_call(self, *jobs: str) -> Call:
        k = self.keys
        return Call("purge", (k.void, k.dlq, k.dlq_meta, k.dlq_index, k.stats), jobs)

    def pause_call(self, lane: str = "high") -> Call:
        return Call("pause", (self.keys.void, self.keys.paused), (lane,))

    def resume_call(self, lane: str = "high") -> Call:
        return Call("resume", (self.keys.void, self.keys.paused, *self.keys.lane(lane)), (lane,))

    def trim_call(self, *buckets: bytes, age_ms: int = 60_000) -> Call:
        return Call("trim", (self.keys.void, self.keys.closed, *buckets), (age_ms,))

    # -- seeds and state

    def lease(self, *data: bytes, incarnation: str = "W1") -> list[bytes]:
        """Register the incarnation, let it hold these frames; their lease names."""
        self.takeover(incarnation)
        for frame in data:
            self.client.hset(self.keys.processing(incarnation), frames.lease(frame), frame)
        return [frames.lease(frame) for frame in data]

    def snapshots(self, *data: bytes, value: str = "Q,1,0,0,0,high,EMAIL*1", jobs: int | None = None) -> None:
        """Give tracked frames a snapshot in the bucket, as enqueue does."""
        for frame in data:
            self.client.hset(self.bucket, frames.id_of(frame), value)
        total = sum(int(frame[46:50]) for frame in data) if jobs is None else jobs
        self.client.hincrby(self.bucket, "open", total)
        self.client.expire(self.bucket, OPEN_TTL_S)

    def snapshot(self, frame: bytes) -> str:
        value: Any = self.client.hget(self.bucket, frames.id_of(frame))
        return value.decode() if value is not None else ""

    def open_jobs(self) -> int:
        return int(self.client.hget(self.bucket, "open") or 0)

    def stats(self) -> dict[str, int]:
        return {name.decode(): int(n) for name, n in self.client.hgetall(self.keys.stats).items() if int(n)}

    def depth(self) -> dict[str, int]:
        return {name.decode(): int(n) for name, n in self.client.hgetall(self.keys.depth).items()}

    def tokens(self, lane: str = "high") -> int:
        return int(self.client.llen(self.keys.wake(lane)))

    def state(self) -> dict[str, Any]:
        """Everything in Redis, by name without prefix. Fails if a key that must die has no time to live."""
        found: dict[str, Any] = {}
        for key in sorted(self.client.keys()):
            name = key.removeprefix(self.keys.prefix).decode()
            kind = self.client.type(key)
            if kind == b"hash":
                found[name] = self.client.hgetall(key)
            elif kind == b"zset":
                found[name] = {m: int(score) for m, score in self.client.zrange(key, 0, -1, withscores=True)}
            elif kind == b"list":
                found[name] = self.client.lrange(key, 0, -1)
            elif kind == b"set":
                found[name] = self.client.smembers(key)
            else:
                found[name] = self.client.get(key)
            if name.startswith(("job:", "idem:", "worker:")):
                assert self.client.ttl(key) > 0, f"{name} would live for ever"
        assert "void" not in found
        return found

    def frames(self) -> list[bytes]:
        """Every frame in Redis, wherever it is, without its time of entry; sorted."""
        found: list[bytes] = []
        for name, value in self.state().items():
            place = name.partition(":")[0]
            if place in ("queue", "quarantine", "parked"):
                found += value
            elif place in ("sorted", "delayed"):
                found += value.keys()
            elif place in ("processing", "dlq"):
                found += value.values()
        return sorted(f[:111] + f[127:] for f in found)
