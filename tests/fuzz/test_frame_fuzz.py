"""The frame codec against bytes that nobody thought of: both backends must agree, and raise nothing else.

A failure prints its seed; TQE_FUZZ_SEED=<seed> runs the same bytes again.
"""

import os
import random
import zlib
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqe import _pure
from tqe.errors import DamagedFrame, FrameError, NewerFrame

_fast = pytest.importorskip("tqe._fast", reason="the extension is not built")

ID = b"01JZ4XQ9T3ABCDEFGHJKMNPQ00"
FIELDS = (
    "flags", "frame_id", "base", "n", "run", "total", "attempts", "crashes", "reaps", "unknowns", "boost_us",
    "lane", "enqueued_us", "options", "lease",
)  # fmt: skip
ROUNDS = 20_000


@pytest.fixture
def seeded() -> random.Random:
    seed = int(os.environ.get("TQE_FUZZ_SEED") or random.SystemRandom().getrandbits(32))
    print(f"TQE_FUZZ_SEED={seed}")
    return random.Random(seed)


def outcome(backend: ModuleType, name: str, *args: Any, **options: Any) -> Any:
    """What a call comes to: its result, or class and text of what it raised."""
    try:
        result = getattr(backend, name)(*args, **options)
    except (FrameError, ValueError) as e:
        return type(e), str(e)
    return tuple(getattr(result, field) for field in FIELDS) if hasattr(result, "lease") else result


def agree(name: str, *args: Any, **options: Any) -> Any:
    compiled = outcome(_fast, name, *args, **options)
    assert compiled == outcome(_pure, name, *args, **options), (name, args, options)
    return compiled


def frames(seeded: random.Random, count: int) -> list[bytes]:
    made = []
    for _ in range(count):
        jobs = [
            (
                seeded.choice([b"EMAIL", b"a.b:C-_", b"X" * 64]),
                seeded.randbytes(seeded.randrange(60)),
                seeded.choice([b"", b"", b'{"max_retries":1}']),
                seeded.random() < 0.3,
            )
            for _ in range(seeded.randrange(1, 12))
        ]
        frame = _fast.pack(
            jobs,
            frame_id=ID,
            lane=seeded.choice(["high", "a", "x_-9" * 4]),
            tracked=seeded.random() < 0.5,
            options=seeded.choice([b"", b'{"timeout_ms":5}']),
            flags=seeded.randrange(16),
            run=seeded.randrange(100_000),
            enqueued_us=seeded.randrange(10**16),
        )
        if len(jobs) > 2 and seeded.random() < 0.5:
            (frame,) = _fast.cut(frame, [(1, len(jobs) - 2)])
        made.append(frame)
    return made


def mutated(seeded: random.Random, frame: bytes) -> bytes:
    """One to three bits flipped, bytes replaced, inserted, removed or cut off; sometimes sealed again."""
    b = bytearray(frame)
    for _ in range(seeded.randrange(1, 4)):
        at = seeded.randrange(len(b)) if b else 0
        match seeded.randrange(6):
            case 0 if b:
                b[at] ^= 1 << seeded.randrange(8)
            case 1 if b:
                b[at] = seeded.choice(b"0159 F1.\x00\xff\n")
            case 2:
                b[at:at] = seeded.randbytes(seeded.randrange(1, 9))
            case 3:
                del b[at : at + seeded.randrange(1, 9)]
            case 4:
                del b[at:]
            case _ if len(b) > 134:
                # The word of the first job: lengths that lead far out.
                b[134:138] = seeded.randbytes(4)
    return sealed(b) if seeded.random() < 0.6 else bytes(b)


def sealed(frame: bytearray) -> bytes:
    if len(frame) >= 128:
        frame[102:110] = b"%08x" % zlib.crc32(frame[128:], zlib.crc32(frame[:102]))
    return bytes(frame)


def all_agree(seeded: random.Random, frame: bytes) -> Any:
    for name in ("peek", "walk", "types"):
        agree(name, frame)
    index = seeded.randrange(12)
    agree("job_at", frame, index)
    agree("single", frame, index, flags=5, attempts=seeded.randrange(20_000))
    agree("rewrite", frame, lane="q", run=seeded.randrange(200_000))
    agree("cut", frame, [(seeded.randrange(5), seeded.randrange(4)) for _ in range(3)])
    return agree("parse", frame)


def test_mutated_frames_come_to_the_same(seeded: random.Random) -> None:
    sound = frames(seeded, 200)
    seen = set()
    for _ in range(ROUNDS):
        result = all_agree(seeded, mutated(seeded, seeded.choice(sound)))
        seen.add(result if result[0] in (DamagedFrame, NewerFrame) else "sound")
    # Every kind of refusal was reached, so none of them is out of the fuzz's sight.
    assert len(seen) >= 10, seen


def test_random_bytes_come_to_the_same(seeded: random.Random) -> None:
    for _ in range(ROUNDS):
        noise = bytearray(seeded.randbytes(seeded.randrange(400)))
        if seeded.random() < 0.5:
            noise[:2] = b"F1"
        result = all_agree(seeded, bytes(noise))
        assert result[0] in (DamagedFrame, NewerFrame)


def test_random_bodies_come_to_the_same(seeded: random.Random) -> None:
    """A sound header over noise: what the walk reads is all arbitrary, under a checksum that fits."""
    sound = frames(seeded, 50)
    for _ in range(ROUNDS):
        frame = bytearray(seeded.choice(sound)[:128])
        frame[2] &= ~16
        frame[96:101] = b"00000"
        for _ in range(seeded.randrange(1, 13)):
            name = seeded.choice([b"T", b"EMAIL", b"X" * 64])
            frame += bytes((len(name),)) + name + seeded.choice([b"\0\0\0\0", b"\1\0\0\x80", b"\2\0\0\x40"])
            frame += seeded.randbytes(seeded.randrange(6))
        frame += seeded.randbytes(seeded.randrange(3))
        all_agree(seeded, sealed(frame))


def test_flipped_bits_are_noticed(seeded: random.Random) -> None:
    """One bit anywhere but in `enqueued`, which scripts rewrite."""
    for frame in frames(seeded, 100):
        for _ in range(100):
            at = seeded.choice([*range(111), *range(127, len(frame))])
            flipped = bytearray(frame)
            flipped[at] ^= 1 << seeded.randrange(8)
            assert agree("parse", bytes(flipped))[0] in (DamagedFrame, NewerFrame)


NAMES = st.text("ABCxyz019_.:-", min_size=1, max_size=64).map(str.encode)
ONE_JOB = st.tuples(NAMES, st.binary(max_size=200), st.binary(max_size=40), st.booleans())
COUNTERS = st.integers(0, 999)


@settings(deadline=None, max_examples=200)
@given(
    jobs=st.lists(ONE_JOB, min_size=1, max_size=30),
    frame_id=st.text("0123456789ABCDEFGHJKMNPQRSTVWXYZ", min_size=26, max_size=26).map(str.encode),
    lane=st.text("abcxyz019_-", min_size=1, max_size=16),
    tracked=st.booleans(),
    options=st.binary(max_size=60),
    flags=st.integers(0, 15),
    run=st.integers(0, 99_999),
    counters=st.tuples(COUNTERS, COUNTERS, COUNTERS, COUNTERS),
    boost_us=st.integers(0, 10**13 - 1),
    enqueued_us=st.integers(0, 10**16 - 1),
    data=st.data(),
)
def test_what_is_packed_is_read(
    jobs: list[tuple[bytes, bytes, bytes, bool]],
    frame_id: bytes,
    lane: str,
    tracked: bool,
    options: bytes,
    flags: int,
    run: int,
    counters: tuple[int, int, int, int],
    boost_us: int,
    enqueued_us: int,
    data: st.DataObject,
) -> None:
    named = dict(zip(("attempts", "crashes", "reaps", "unknowns"), counters, strict=True))
    named |= {"run": run, "boost_us": boost_us, "enqueued_us": enqueued_us}
    frame = agree(
        "pack", jobs, frame_id=frame_id, lane=lane, tracked=tracked, options=options, flags=flags, **named
    )
    header = dict(zip(FIELDS, agree("parse", frame), strict=True))
    assert header == {
        **named,
        "flags": flags | tracked | (16 if options else 0),
        "frame_id": frame_id,
        "base": 0,
        "n": len(jobs),
        "total": len(jobs),
        "lane": lane,
        "options": options,
        "lease": frame_id + b".000.%04d.%05d" % (len(jobs), run),
    }
    assert agree("walk", frame) == [(i, *job) for i, job in enumerate(jobs)]
    # Cut at random places: together the parts are the whole.
    at = data.draw(st.integers(0, len(jobs)))
    ranges = [(base, n) for base, n in ((0, at), (at, len(jobs) - at)) if n]
    parts = agree("cut", frame, ranges)
    assert [job for part in parts for job in agree("walk", part)] == agree("walk", frame)
