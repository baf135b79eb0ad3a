"""Proves the store audit on a planted store: a sound one is read as it is, each planted fault is named."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chaos.audit import SINGLE_KEYS, parse_frame, read_store, read_sums
from tests.chaos.checker import DeadJob
from tests.support.redis_server import RedisServer
from tqe import codec
from tqe.store.keys import Keys

P = "tq:{0}:"
A, B, C, D = (f"{letter * 24}00" for letter in "ABCD")
WORKER = "W" * 26


def frame(
    frame_id: str,
    base: int = 0,
    n: int = 1,
    total: int = 0,
    lane: str = "normal",
    boost: int = 0,
    run: int = 0,
) -> bytes:
    """Bytes of docs/WIRE_FORMAT.md, section 2, written once more."""
    counters = "0001002003004"
    head = f"F1A {frame_id}.{base:03}.{n:04}.{run:05} {total or base + n:04} {counters} {boost:013} "
    head += f"{lane:<16} {0:05} "
    body = b"\x05QUICK\x02\x00\x00\x00{}" * n
    crc = zlib.crc32(body, zlib.crc32(head.encode()))
    return f"{head}{crc:08x} {1_700_000_000_000_000:016}\n".encode() + body


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[Any]:
    """One job of every place; everything agrees."""
    with contextlib.closing(redis_server.client()) as redis:
        redis.rpush(f"{P}queue:normal", frame(A, 0, 3))
        redis.zadd(f"{P}sorted:high", {frame(B, 2, 2, 5, "high", boost=500): 1_700_000_000_000_000 - 500})
        redis.zadd(f"{P}delayed", {frame(B, 4, 1, 5, "high"): 1_700_000_000_000})
        redis.hset(f"{P}processing:{WORKER}", frame(B, 0, 1, 5, "high")[4:45], frame(B, 0, 1, 5, "high"))
        redis.zadd(f"{P}incarnations", {WORKER: 1})
        redis.hset(f"{P}dlq", f"{C}.0", frame(C))
        redis.hset(f"{P}dlq_meta", f"{C}.0", json.dumps({"reason": "crash", "attempts": 1, "crashes": 3}))
        redis.zadd(f"{P}dlq_index", {f"{C}.0": 1})
        redis.hset(f"{P}job:1a", A, "Q,3,0,0,0,normal,QUICK*3")
        redis.hset(f"{P}job:1a", B, "QCQQR,5,0,0,0,high,QUICK*5")
        redis.hset(f"{P}job:1a", "open", 7)
        redis.hset(f"{P}job:1b", C, "D,1,0,0,0,normal,POISON*1")
        redis.hset(f"{P}job:1b", D, "C,1,0,0,0,normal,RESULT*1")
        redis.hset(f"{P}job:1b", f"{D}.0", json.dumps({"result": [1]}))
        for bucket in "ab":
            redis.expire(f"{P}job:1{bucket}", 100)
        redis.hset(f"{P}depth", mapping={"normal": 3, "high": 0, "high:sorted": 2, "delayed": 1})
        redis.hset(f"{P}stats", mapping={"submitted": 10, "completed": 2, "dead": 1})
        redis.set(f"{P}idem:key", f"{D}.0 {'0' * 16}", ex=100)
        redis.zadd(f"{P}closed", {"job:1b": 1})
        redis.rpush(f"{P}wake:normal", "1")
        redis.set(f"{P}worker:{WORKER}", "{}", ex=5)
        redis.hset(f"{P}means", "QUICK", 5)
        redis.set("other:key", "not ours")
        yield redis


def test_sound_store_is_read_as_it_is(store: Any) -> None:
    audit = read_store(store)
    assert (audit.mismatches, audit.residue) == ([], [])
    assert audit.places == {
        "queued:normal": [f"{A}.0", f"{A}.1", f"{A}.2"],
        "sorted:high": [f"{B}.2", f"{B}.3"],
        "delayed": [f"{B}.4"],
        "leased": [f"{B}.0"],
    }
    assert audit.states[f"{A}.2"] == "queued"
    assert [audit.states[f"{B}.{i}"] for i in range(5)] == [
        "queued",
        "completed",
        "queued",
        "queued",
        "retrying",
    ]
    assert audit.states[f"{C}.0"] == "dead"
    assert audit.dlq == {f"{C}.0": DeadJob("crash", 1, 3)}
    assert audit.dlq_meta == audit.dlq_index == {f"{C}.0"}
    assert audit.results == {f"{D}.0": [1]}
    assert audit.idem == {"key": f"{D}.0"}
    assert audit.incarnations == audit.processing == {WORKER}
    assert audit.totals["submitted"] == 10
    assert {name: audit.depth.get(name, 0) for name in audit.depth_counted} == audit.depth_counted


def test_sums_of_one_instant(store: Any) -> None:
    sums = read_sums(store)
    assert (sums.submitted, sums.waiting, sums.delayed, sums.leased) == (10, 5, 1, 1)
    assert (sums.completed, sums.dead, sums.cancelled) == (2, 1, 0)
    assert sums.accounted() == sums.submitted
    assert 0 < sums.t_ns <= sums.until_ns


def test_header_of_a_cut_frame() -> None:
    parsed = parse_frame(frame(A, 100, 20, 256, "low", boost=7, run=3))
    assert parsed is not None and parsed.sound
    assert (parsed.id, parsed.base, parsed.n, parsed.total, parsed.run, parsed.lane) == (
        A,
        100,
        20,
        256,
        3,
        "low",
    )
    assert (parsed.attempts, parsed.crashes, parsed.reaps, parsed.unknowns, parsed.boost) == (1, 2, 3, 4, 7)
    assert parsed.job_ids()[0] == f"{A}.100" and len(parsed.job_ids()) == 20


@pytest.mark.parametrize("at", [0, 1, 5, 32, 60, 80, 105, 130])
def test_one_flipped_byte_is_seen(at: int) -> None:
    raw = bytearray(frame(A, 0, 3))
    raw[at] ^= 1
    parsed = parse_frame(bytes(raw))
    assert parsed is None or not parsed.sound


PLANTS: list[tuple[str, str, Callable[[Any], object]]] = [
    ("damaged bytes", "holds damaged bytes", lambda r: r.rpush(f"{P}queue:low", b"noise")),
    (
        "frame of another lane",
        "a frame of lane high",
        lambda r: r.rpush(f"{P}queue:low", frame(D, lane="high")),
    ),
    ("wrong score", "scores", lambda r: r.zadd(f"{P}sorted:low", {frame(D, lane="low"): 5})),
    ("lease under another name", "holds", lambda r: r.hset(f"{P}processing:{WORKER}", "X", frame(D))),
    ("bucket with a strange field", "has the field", lambda r: r.hset(f"{P}job:1a", "x", "1")),
    ("bucket counts wrong", "says 9 open", lambda r: r.hset(f"{P}job:1a", "open", 9)),
    ("letters and total differ", "letters", lambda r: r.hset(f"{P}job:1b", A, "CC,3,0,0,0,normal,QUICK*3")),
    ("DLQ holds another job", "dlq", lambda r: r.hset(f"{P}dlq", f"{D}.0", frame(A))),
    ("immortal snapshots", "never expires", lambda r: r.persist(f"{P}job:1a")),
    ("immortal key", "never expires", lambda r: r.set(f"{P}idem:x", f"{A}.0 0")),
    ("unknown key", "unknown key", lambda r: r.set(f"{P}leak", "1")),
    ("tokens of an empty lane", "wake tokens", lambda r: r.rpush(f"{P}wake:low", "1")),
    ("cancel requests left", "cancel requests", lambda r: r.hset(f"{P}cancel", A, "0")),
    ("quarantined frame", "quarantine", lambda r: r.rpush(f"{P}quarantine", frame(D))),
]


@pytest.mark.parametrize(("name", "text", "plant"), PLANTS, ids=[row[0] for row in PLANTS])
def test_planted_fault_is_named(store: Any, name: str, text: str, plant: Callable[[Any], object]) -> None:
    plant(store)
    audit = read_store(store)
    found = audit.mismatches + audit.residue
    assert len(found) >= 1 and any(text in line for line in found), found


def test_the_audit_knows_every_key_of_the_engine() -> None:
    """Else each fault test finds a key too many, wherever the engine happens to write it."""
    keys = Keys()
    slots = [slot for slot in Keys.__slots__ if not slot.startswith("_")]
    names = {getattr(keys, slot).removeprefix(keys.prefix).decode() for slot in slots}
    assert names - SINGLE_KEYS == {"void", "done:"}  # never there; a channel


def test_the_engine_reads_these_frames_alike() -> None:
    """The one place where both meet: if either strays from the page, this fails."""
    raw = frame(A, 100, 20, 256, "low", boost=7, run=3)
    ours, theirs = parse_frame(raw), codec.parse(raw)
    assert ours is not None
    assert theirs.frame_id == ours.id.encode() and theirs.lease == ours.lease.encode()
    for name in ("base", "n", "run", "total", "attempts", "crashes", "reaps", "unknowns", "lane", "flags"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert (theirs.boost_us, theirs.enqueued_us) == (ours.boost, ours.enqueued)
    part = parse_frame(codec.cut(raw, [(105, 10)])[0])
    assert part is not None and part.sound
    assert (part.base, part.n, part.total) == (105, 10, 256)
