"""A steward's scene: a board, a real Redis, a clock that tests move, all of their state in short."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import redis

from tests.support.fake_clock import FakeClock
from tests.support.redis_server import RedisServer
from tqe import codec
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.codec import hot
from tqe.job import bucket_of
from tqe.settings import Settings
from tqe.steward.context import Context
from tqe.store.call import SyncDoor, connect
from tqe.store.keys import Keys

LEASE_MS = 15_000
T0_US = 1_700_000_000_000_000


def frame_id(number: int) -> bytes:
    """A frame id that tells its number; all of them share one bucket."""
    return b"01HF7YATZ0A%013d00" % number


def frame(number: int, n: int = 1, *, lane: str = "high", **fields: Any) -> bytes:
    """A tracked frame with n jobs `EMAIL` whose payload tells their index."""
    jobs = [(b"EMAIL", b'{"k":%d}' % k, b"", False) for k in range(n)]
    made: bytes = codec.pack(
        jobs, frame_id=frame_id(number), lane=lane, tracked=True, **{"enqueued_us": T0_US + number, **fields}
    )
    return made


def cut(whole: bytes, base: int, n: int) -> bytes:
    """A part of a frame."""
    (part,) = codec.cut(whole, [(base, n)])
    return part


@dataclass
class Worker:
    """A worker's slot as the worker itself writes it."""

    view: SlotView
    hands: hot.Slot
    incarnation: str
    rows: dict[bytes, int] = field(default_factory=dict)

    def lease(self, leased: bytes) -> int:
        """Open a row for a fetched frame."""
        header = codec.parse(leased)
        row = self.hands.open_row(header.frame_id, header.base, header.n, header.run)
        self.rows[header.lease] = row
        return row

    def runs(self, row: int, index: int, *, step: int = 7, retries: int = 0, task: str = "EMAIL") -> None:
        """Say that this job's code runs."""
        self.hands.set_state(row, index, layout.JOB_STARTED)
        view = self.view
        start = layout.O_TASKS
        view._bytes[start : start + layout.TASK_NAME_BYTES] = task.encode().ljust(64, b"\0")
        for word, value in (
            (layout.C_ROW, row),
            (layout.C_INDEX, index),
            (layout.C_TASK, 0),
            (layout.C_RETRIES, retries),
            (layout.C_STEP, step),
            (layout.C_IN_USER, step),
        ):
            view.set(word, value)

    def dies(self, *, signal: int = 9, code: int = 0) -> None:
        """The supervisor has seen its death."""
        self.view.set(layout.C_SIGNAL, signal)
        self.view.set(layout.C_EXIT, code)
        self.view.set(layout.C_STATE, layout.DEAD)


class Scene:
    """Everything a duty can see and change."""

    def __init__(self, server: RedisServer, clock: FakeClock, **settings: Any) -> None:
        self.client: redis.Redis = connect(server.url)
        self.clock = clock
        self.keys = Keys()
        self.settings = Settings(lease_ms=LEASE_MS, **{"procs": 2, **settings})
        self.board = Board(6)
        self._ids = 0
        self.context = Context(
            self.settings,
            self.board,
            SyncDoor(connect(server.url)),
            self.keys,
            "here",
            clock,
            new_id=self.new_id,
            process_state=self.process_state,
        )
        self.states: dict[int, str] = {}  # /proc states by pid, S if not told

    def new_id(self) -> str:
        """Incarnations of the steward: STEWARD-1, -2, …"""
        self._ids += 1
        return f"STEWARD-{self._ids}".ljust(26, "-")

    def process_state(self, pid: int) -> str:
        return self.states.get(pid, "S")

    def close(self) -> None:
        self.client.close()
        self.context.door.client.close()

    # -- seeding

    def worker(self, number: int = 0, *, name: str = "", next_name: str = "", live: bool = True) -> Worker:
        """A registered worker in the first free slot."""
        view = self.board.free_slot()
        assert view is not None
        name = name or f"WORKER-{number}".ljust(26, "-")
        view.set(layout.C_STATE, layout.LIVE)
        view.set(layout.C_NUMBER, number)
        view.set(layout.C_PID, 1000 + number)
        view.set(layout.C_READY, 1)
        view.set(layout.C_BEAT, self.clock.boottime_ns())
        view.set(layout.C_PHASE, layout.PHASE_BUSY)
        view.set_text(layout.C_INCARNATION, name)
        view.set_text(layout.C_NEXT_INCARNATION, next_name)
        hands = hot.Slot(self.board.memory, layout.slot_offset(view.number))
        self.register(name)
        return Worker(view, hands, name)

    def register(self, incarnation: str, end_ms: int | None = None) -> None:
        end = self.redis_ms() + LEASE_MS if end_ms is None else end_ms
        self.client.zadd(self.keys.incarnations, {incarnation: end})

    def hold(self, incarnation: str, *frames: bytes) -> None:
        """Leases as Redis has them."""
        for one in frames:
            self.client.hset(self.keys.processing(incarnation), one[4:45], one)

    def track(self, *frames: bytes) -> None:
        """Snapshots of queued frames."""
        for one in frames:
            header = codec.peek(one)
            bucket = self.bucket(one)
            value = f"Q,{header.total},0,0,0,{header.lane},EMAIL*{header.total}"
            self.client.hset(bucket, header.frame_id, value)
            self.client.hincrby(bucket, "open", header.total)
            self.client.expire(bucket, 604_800)

    def bucket(self, one: bytes) -> bytes:
        return self.keys.bucket(*bucket_of(one[4:30]))

    def redis_ms(self) -> int:
        seconds, us = self.client.time()
        return int(seconds) * 1000 + int(us) // 1000

    # -- reading

    def parts(self, frames: list[bytes]) -> list[str]:
        """Frames in short: `number.base.n run=…`, the counters that are not 0, and the flags of suspects."""
        return [short(one) for one in frames]

    def queue(self, lane: str = "high") -> list[str]:
        return self.parts(self.client.lrange(self.keys.queue(lane), 0, -1))

    def sorted(self, lane: str = "high") -> list[str]:
        return self.parts(self.client.zrange(self.keys.sorted(lane), 0, -1))

    def delayed(self) -> list[str]:
        return sorted(self.parts(self.client.zrange(self.keys.delayed, 0, -1)))

    def quarantine(self) -> list[bytes]:
        found: list[bytes] = self.client.lrange(self.keys.quarantine, 0, -1)
        return found

    def dlq(self) -> dict[str, bytes]:
        return {
            _job(name): self.client.hget(self.keys.dlq_meta, name)
            for name in self.client.hkeys(self.keys.dlq)
        }

    def stats(self) -> dict[str, int]:
        return {name.decode(): int(v) for name, v in self.client.hgetall(self.keys.stats).items()}

    def depth(self) -> dict[str, int]:
        return {name.decode(): int(v) for name, v in self.client.hgetall(self.keys.depth).items()}

    def incarnations(self) -> list[str]:
        return [name.decode().rstrip("-") for name in self.client.zrange(self.keys.incarnations, 0, -1)]

    def in_flight(self) -> dict[str, list[str]]:
        start = len(self.keys.processing(""))
        return {
            key[start:].decode().rstrip("-"): sorted(self.parts(self.client.hvals(key)))
            for key in self.client.keys(self.keys.processing("*"))
        }

    def snapshot(self, number: int) -> str:
        """States of a frame's jobs."""
        value = self.client.hget(self.keys.bucket(*bucket_of(frame_id(number))), frame_id(number))
        return value.split(b",")[0].decode() if value else ""

    def told(self, number: int, index: int) -> bytes:
        """The field of one job, b'' if it has none."""
        bucket = self.keys.bucket(*bucket_of(frame_id(number)))
        return self.client.hget(bucket, frame_id(number) + b".%d" % index) or b""


def short(one: bytes) -> str:
    header = codec.peek(one)
    names = ("run", "attempts", "crashes", "reaps", "unknowns")
    counters = "".join(f" {name}={value}" for name in names if (value := getattr(header, name)))
    flags = " suspect" * bool(header.flags & codec.SUSPECT) + " started" * bool(header.flags & codec.STARTED)
    return f"{int(header.frame_id[11:24])}.{header.base}.{header.n}{counters}{flags}"


def _job(name: bytes) -> str:
    return f"{int(name[11:24])}.{name.split(b'.')[1].decode()}"
