"""Owns the reading of the store: every key of one shard parsed from docs/WIRE_FORMAT.md, without the engine.

The engine's own codec must not be used here, or a bug that writes and reads the same wrong byte would hide
itself.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from tests.chaos.checker import DeadJob, MidAudit, StoreAudit
from tests.chaos.journal import now_ns

HEADER_BYTES = 128
STATES = {
    "Q": "queued",
    "R": "retrying",
    "C": "completed",
    "D": "dead",
    "X": "cancelled",
    "E": "expired",
    "B": "damaged",
}
OPEN_STATES = frozenset({"queued", "retrying"})
NEED_TTL = ("worker:", "tasks:", "idem:", "job:", "learner")
INDEX_KEYS = frozenset(
    {"incarnations", "delayed", "dlq", "dlq_meta", "dlq_index", "closed", "waiting", "cron", "cron_paused"}
)
OTHER_KEYS = frozenset(
    {
        *("depth", "stats", "cancel", "quarantine", "parked", "paused", "means", "model", "traces"),
        *("learner", "tokens"),
    }
)
SINGLE_KEYS = INDEX_KEYS | OTHER_KEYS


@dataclass(frozen=True, slots=True)
class Frame:
    """The header of a frame, and whether its checksum holds."""

    id: str
    base: int
    n: int
    run: int
    total: int
    attempts: int
    crashes: int
    reaps: int
    unknowns: int
    boost: int
    lane: str
    enqueued: int
    flags: int
    lease: str
    sound: bool

    def job_ids(self) -> list[str]:
        return [f"{self.id}.{index}" for index in range(self.base, self.base + self.n)]


def parse_frame(raw: bytes) -> Frame | None:
    """The frame, or None for bytes that are none."""
    if len(raw) < HEADER_BYTES or raw[0:1] != b"F" or raw[1:2] != b"1" or raw[127:128] != b"\n":
        return None
    try:
        head = raw[:HEADER_BYTES].decode("ascii")
        frame = Frame(
            id=head[4:30],
            base=int(head[31:34]),
            n=int(head[35:39]),
            run=int(head[40:45]),
            total=int(head[46:50]),
            attempts=int(head[51:55]),
            crashes=int(head[55:58]),
            reaps=int(head[58:61]),
            unknowns=int(head[61:64]),
            boost=int(head[65:78]),
            lane=head[79:95].rstrip(),
            enqueued=int(head[111:127]),
            flags=ord(head[2]) - ord("@"),
            lease=head[4:45],
            sound=int(head[102:110], 16) == zlib.crc32(raw[HEADER_BYTES:], zlib.crc32(raw[:102])),
        )
    except ValueError:
        return None
    return frame


class Reader:
    """One pass over all keys; made anew for each audit."""

    def __init__(self, redis: Any, namespace: str = "tq", shard: int = 0) -> None:
        self.redis = redis  # redis.Redis with decode_responses off
        self.prefix = f"{namespace}:{{{shard}}}:"
        self.audit = StoreAudit()

    def read(self) -> StoreAudit:
        found = self.redis.scan_iter(match=_glob(self.prefix) + "*", count=1000)
        names = sorted(key.decode().removeprefix(self.prefix) for key in found)
        for name in names:
            self.read_key(name)
        self.check_ttls(names)
        self.check_tokens(names)
        return self.audit

    def read_key(self, name: str) -> None:
        kind, _, rest = name.partition(":")
        redis, key, audit = self.redis, self.prefix + name, self.audit
        if kind == "queue" and rest:
            self.add_frames(f"queued:{rest}", rest, redis.lrange(key, 0, -1))
        elif kind == "sorted" and rest:
            self.add_sorted(rest, redis.zrange(key, 0, -1, withscores=True))
        elif kind == "processing" and rest:
            audit.processing.add(rest)
            self.add_leases(rest, redis.hgetall(key))
        elif name == "delayed":
            self.add_frames("delayed", "delayed", redis.zrange(key, 0, -1))
        elif name in ("parked", "quarantine"):
            self.add_kept(name, redis.lrange(key, 0, -1))
        elif name == "incarnations":
            audit.incarnations = {member.decode() for member in redis.zrange(key, 0, -1)}
        elif kind == "job" and rest:
            self.add_bucket(name, redis.hgetall(key))
        elif name in ("dlq", "dlq_meta", "dlq_index"):
            self.add_dead(name, key)
        elif name in ("depth", "stats"):
            values = {field.decode(): int(value) for field, value in redis.hgetall(key).items()}
            if name == "depth":
                audit.depth = values
            else:
                audit.totals = values
        elif kind == "idem" and rest:
            value = redis.get(key)
            audit.idem[rest] = value.decode().split()[0] if value else ""
        elif name == "cancel":
            audit.residue.append(f"cancel requests that nobody swept: {redis.hlen(key)}")
        elif name not in SINGLE_KEYS and kind not in ("worker", "tasks", "wake"):
            audit.residue.append(f"unknown key {name}")

    def add_frames(self, place: str, field: str, raws: list[bytes]) -> list[Frame]:
        ids = self.audit.places.setdefault(place, [])
        frames = []
        for raw in raws:
            frame = parse_frame(raw)
            if frame is None or not frame.sound:
                self.audit.mismatches.append(f"{place} holds damaged bytes: {raw[:60]!r}")
            if frame is not None:
                frames.append(frame)
                ids += frame.job_ids()
                lane = place.partition(":")[2]
                if lane and frame.lane != lane:
                    self.audit.mismatches.append(f"{place} holds a frame of lane {frame.lane}: {frame.lease}")
        if field:
            count = sum(frame.n for frame in frames)
            self.audit.depth_counted[field] = self.audit.depth_counted.get(field, 0) + count
        return frames

    def add_sorted(self, lane: str, rows: list[tuple[bytes, float]]) -> None:
        frames = self.add_frames(f"sorted:{lane}", f"{lane}:sorted", [raw for raw, _ in rows])
        if len(frames) < len(rows):
            return
        for frame, (_, score) in zip(frames, rows, strict=True):
            if int(score) != frame.enqueued - frame.boost:
                self.audit.mismatches.append(f"sorted:{lane} scores {frame.lease} as {score}")

    def add_leases(self, incarnation: str, rows: dict[bytes, bytes]) -> None:
        self.add_frames("leased", "", list(rows.values()))
        for name, raw in rows.items():
            frame = parse_frame(raw)
            if frame is not None and frame.lease != name.decode("ascii", "replace"):
                self.audit.mismatches.append(f"lease {name!r} of {incarnation} holds {frame.lease}")

    def add_kept(self, name: str, raws: list[bytes]) -> None:
        ids = self.audit.places.setdefault(name, [])
        for raw in raws:
            frame = parse_frame(raw)
            if name == "quarantine":  # its snapshot says damaged, which is a state and not a second place
                self.audit.residue.append(f"quarantine holds {raw[:60]!r}")
            elif frame is not None:
                ids += frame.job_ids()

    def add_bucket(self, name: str, rows: dict[bytes, bytes]) -> None:
        audit, open_ = self.audit, 0
        for field, value in rows.items():
            text = field.decode()
            if text in ("open", "pad"):
                continue
            if len(text) == 26:
                open_ += self.add_snapshot(text, value.decode())
            elif text[26:27] != ".":
                audit.mismatches.append(f"bucket {name} has the field {text}")
            else:
                detail = json.loads(value)
                if "result" in detail:
                    audit.results[text] = detail["result"]
        said = int(rows.get(b"open", b"0"))
        if max(said, 0) != open_:
            audit.mismatches.append(f"bucket {name} says {said} open jobs, holds {open_}")

    def add_snapshot(self, frame_id: str, text: str) -> int:
        letters, total, *_ = text.split(",")
        count, states = int(total), self.audit.states
        if len(letters) not in (1, count):
            self.audit.mismatches.append(f"snapshot of {frame_id}: {len(letters)} letters, {count} jobs")
        if len(letters) == 1:
            state = STATES.get(letters, letters)
            for index in range(count):
                states[f"{frame_id}.{index}"] = state
            return count if state in OPEN_STATES else 0
        open_ = 0
        for index, letter in enumerate(letters):
            state = STATES.get(letter, letter)
            states[f"{frame_id}.{index}"] = state
            open_ += state in OPEN_STATES
        return open_

    def add_dead(self, name: str, key: str) -> None:
        audit = self.audit
        if name == "dlq":
            for field, raw in self.redis.hgetall(key).items():
                audit.dlq.setdefault(field.decode(), DeadJob(""))
                frame = parse_frame(raw)
                if frame is None or not frame.sound or frame.job_ids() != [field.decode()]:
                    audit.mismatches.append(f"dlq {field!r} holds {raw[:60]!r}")
        elif name == "dlq_index":
            audit.dlq_index = {member.decode() for member in self.redis.zrange(key, 0, -1)}
        else:
            for field, raw in self.redis.hgetall(key).items():
                meta = json.loads(raw)
                audit.dlq_meta.add(field.decode())
                entry = DeadJob(str(meta.get("reason", "")), meta.get("attempts", 0), meta.get("crashes", 0))
                if field.decode() in audit.dlq or self.redis.hexists(self.prefix + "dlq", field):
                    audit.dlq[field.decode()] = entry

    def check_ttls(self, names: list[str]) -> None:
        timed = [name for name in names if name.startswith(NEED_TTL)]
        pipe = self.redis.pipeline(transaction=False)
        for name in timed:
            pipe.pttl(self.prefix + name)
        for name, ttl in zip(timed, pipe.execute() if timed else [], strict=True):
            if ttl == -1:
                self.audit.residue.append(f"key {name} never expires")

    def check_tokens(self, names: list[str]) -> None:
        for name in names:
            lane = name.removeprefix("wake:")
            if lane != name and f"queue:{lane}" not in names and f"sorted:{lane}" not in names:
                tokens = self.redis.llen(self.prefix + name)
                self.audit.residue.append(f"{tokens} wake tokens of the empty lane {lane}")


def read_store(redis: Any, namespace: str = "tq", shard: int = 0) -> StoreAudit:
    """Every key of a shard; meant for quiescence, since it takes many calls."""
    return Reader(redis, namespace, shard).read()


# Sums of one instant. KEYS and an unbounded script are fine in the auditor's tool, not in the engine's.
_MID_AUDIT = """
local p = ARGV[1]
local function n(f) return tonumber(string.sub(f, 36, 39)) or 0 end
local waiting, delayed, leased = 0, 0, 0
for _, key in ipairs(redis.call('KEYS', ARGV[2] .. 'queue:*')) do
  for _, f in ipairs(redis.call('LRANGE', key, 0, -1)) do waiting = waiting + n(f) end
end
for _, key in ipairs(redis.call('KEYS', ARGV[2] .. 'sorted:*')) do
  for _, f in ipairs(redis.call('ZRANGE', key, 0, -1)) do waiting = waiting + n(f) end
end
for _, f in ipairs(redis.call('ZRANGE', p .. 'delayed', 0, -1)) do delayed = delayed + n(f) end
for _, key in ipairs(redis.call('KEYS', ARGV[2] .. 'processing:*')) do
  for _, f in ipairs(redis.call('HVALS', key)) do leased = leased + n(f) end
end
local s = redis.call('HMGET', p .. 'stats', 'submitted', 'completed', 'cancelled', 'expired')
for i = 1, 4 do s[i] = tonumber(s[i]) or 0 end
return {s[1], waiting, delayed, leased, s[2], redis.call('HLEN', p .. 'dlq'), s[3] + s[4]}
"""


def read_sums(redis: Any, namespace: str = "tq", shard: int = 0) -> MidAudit:
    """The conservation sums of one instant, for audits during a run."""
    prefix = f"{namespace}:{{{shard}}}:"
    began = now_ns()
    sums: list[int] = redis.eval(_MID_AUDIT, 0, prefix, _glob(prefix))
    submitted, waiting, delayed, leased, completed, dead, cancelled = sums
    return MidAudit(began, submitted, waiting, delayed, leased, completed, dead, cancelled, until_ns=now_ns())


def _glob(prefix: str) -> str:
    return prefix.replace("[", "\\[").replace("*", "\\*")
