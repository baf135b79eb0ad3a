"""The frame codec: every case over the compiled backend and its plain twin."""

import ast
import importlib.util
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tqe
from tqe import _pure, codec
from tqe.errors import DamagedFrame, FrameError, NewerFrame

_fast = pytest.importorskip("tqe._fast", reason="the extension is not built")

ID = b"01JZ4XQ9T3ABCDEFGHJKMNPQ00"
FIELDS = (
    "flags", "frame_id", "base", "n", "run", "total", "attempts", "crashes", "reaps", "unknowns", "boost_us",
    "lane", "enqueued_us", "options", "lease",
)  # fmt: skip
OPTIONS = b'{"timeout_ms":500}'
JOBS = [
    (b"EMAIL", b'{"to":"a@example.com"}', b"", False),
    (b"EMAIL", b'{"to":"b@example.com"}', b'{"max_retries":9}', False),
    (b"report.daily:v2", b"\x28\xb5\x2f\xfd", b"", True),
    (b"X" * 64, b"", b'{"timeout_ms":1}', True),
]


@pytest.fixture(params=[_fast, _pure], ids=["compiled", "pure"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def fields(header: Any) -> dict[str, Any]:
    return {name: getattr(header, name) for name in FIELDS}


def make(backend: ModuleType, n: int = 4, **changes: Any) -> bytes:
    """A frame of n jobs: JOBS over and over."""
    jobs = [JOBS[i % len(JOBS)] for i in range(n)]
    frame: bytes = backend.pack(jobs, **{"frame_id": ID, "lane": "high", "tracked": True, **changes})
    return frame


def patched(frame: bytes, at: int, text: bytes, *, sealed: bool = True) -> bytes:
    """The frame with other bytes at an offset, under a checksum that fits or not."""
    changed = bytearray(frame)
    changed[at : at + len(text)] = text
    if sealed:
        changed[102:110] = b"%08x" % zlib.crc32(changed[128:], zlib.crc32(changed[:102]))
    return bytes(changed)


# --- the layout ---


def test_the_bytes_are_those_of_the_wire_format(backend: ModuleType) -> None:
    frame = backend.pack(
        [(b"EMAIL", b'{"n":1}', b"", False), (b"SMS", b"zz", b'{"x":1}', True)],
        frame_id=ID, lane="low_2-x", tracked=True, options=OPTIONS, flags=2 | 8, run=7, attempts=12,
        crashes=3, reaps=4, unknowns=5, boost_us=123456, enqueued_us=1700000000123456,
    )  # fmt: skip
    body = (
        b'\x05EMAIL\x07\x00\x00\x00{"n":1}'
        b'\x03SMS\x02\x00\x00\xc0\x07\x00{"x":1}zz'
    )  # fmt: skip
    before = (
        b"F1[ 01JZ4XQ9T3ABCDEFGHJKMNPQ00.000.0002.00007 0002 0012003004005 0000000123456"
        b" low_2-x          00018 "
    )
    crc = zlib.crc32(before + OPTIONS + body)
    assert frame == before + b"%08x 1700000000123456\n" % crc + OPTIONS + body
    assert len(before) == 102


def test_parse_reads_what_pack_wrote(backend: ModuleType) -> None:
    frame = make(
        backend, options=OPTIONS, flags=4, run=7, attempts=12, crashes=3, reaps=4, unknowns=5,
        boost_us=123456, enqueued_us=1700000000123456,
    )  # fmt: skip
    expected = {
        "flags": 1 | 4 | 16, "frame_id": ID, "base": 0, "n": 4, "run": 7, "total": 4, "attempts": 12,
        "crashes": 3, "reaps": 4, "unknowns": 5, "boost_us": 123456, "lane": "high",
        "enqueued_us": 1700000000123456,
        "options": OPTIONS, "lease": ID + b".000.0004.00007",
    }  # fmt: skip
    assert fields(backend.parse(frame)) == expected
    assert fields(backend.peek(frame)) == expected
    assert frame[4:45] == expected["lease"]
    assert "high" in repr(backend.parse(frame))


def test_walk_gives_the_jobs_as_packed(backend: ModuleType) -> None:
    frame = make(backend)
    assert backend.walk(frame) == [(i, *job) for i, job in enumerate(JOBS)]
    assert [backend.job_at(frame, i) for i in range(4)] == JOBS
    with pytest.raises(ValueError, match="does not lie in the frame"):
        backend.job_at(frame, 4)


@pytest.mark.parametrize("n", [1, 2, 999, 1000])
def test_pack_same_equals_pack(backend: ModuleType, n: int) -> None:
    payloads = [b'{"n":%d}' % i for i in range(n)]
    for options in (b"", OPTIONS):
        same = backend.pack_same(b"EMAIL", payloads, frame_id=ID, lane="low", tracked=False, options=options)
        jobs = [(b"EMAIL", payload, b"", False) for payload in payloads]
        assert same == backend.pack(jobs, frame_id=ID, lane="low", tracked=False, options=options)
        assert backend.parse(same).n == n


@pytest.mark.parametrize("n", [1, 2, 999, 1000])
def test_pack_mixed_equals_pack(backend: ModuleType, n: int) -> None:
    types = [(b"EMAIL", b"report.daily:v2")[i % 3 == 0] for i in range(n)]
    payloads = [b'{"n":%d}' % i for i in range(n)]
    common: dict[str, Any] = {"frame_id": ID, "lane": "low", "tracked": True, "enqueued_us": 1700000000123456}
    for options in (b"", OPTIONS):
        mixed = backend.pack_mixed(types, payloads, options=options, **common)
        jobs = [(name, payload, b"", False) for name, payload in zip(types, payloads, strict=True)]
        assert mixed == backend.pack(jobs, options=options, **common)
        assert backend.parse(mixed).n == n


def test_pack_lines_equals_pack_same(backend: ModuleType) -> None:
    payloads = [b'{"n":%d}' % i for i in range(1500)]
    lines = b"".join(payload + b"\n" for payload in payloads)
    common: dict[str, Any] = {
        "frame_id": ID, "lane": "low", "tracked": False, "options": OPTIONS, "enqueued_us": 1700000000123456,
    }  # fmt: skip
    first, n, at = backend.pack_lines(b"EMAIL", lines, 0, bytes_max=1 << 20, **common)
    assert (n, first) == (1000, backend.pack_same(b"EMAIL", payloads[:1000], **common))
    rest, n, at = backend.pack_lines(b"EMAIL", lines, at, bytes_max=1 << 20, **common)
    assert (n, at, rest) == (500, len(lines), backend.pack_same(b"EMAIL", payloads[1000:], **common))


def test_pack_lines_keeps_within_its_bytes_and_takes_at_least_one(backend: ModuleType) -> None:
    lines = b"".join(b"x" * 90 + b"\n" for _ in range(50)) + b"y" * 5000 + b"\n" + b"z\n"
    common: dict[str, Any] = {"frame_id": ID, "lane": "low", "tracked": True}
    at, found = 0, []
    while at < len(lines):
        frame, n, at = backend.pack_lines(b"T", lines, at, bytes_max=1000, **common)
        assert backend.parse(frame).n == n and (len(frame) <= 1000 or n == 1)
        found.append((n, len(frame)))
    # 128 of header and 96 a job: nine fit, a tenth does not.
    assert found[:-3] == [(9, 992)] * 5 and [n for n, _ in found[-3:]] == [5, 1, 1]
    exact = 128 + 3 * 96
    assert backend.pack_lines(b"T", lines, 0, bytes_max=exact, **common)[1] == 3
    assert backend.pack_lines(b"T", lines, 0, bytes_max=exact - 1, **common)[1] == 2


def test_the_longest_line(backend: ModuleType) -> None:
    for lines, size in ((b"", 0), (b"\n", 0), (b"a\nbcd\nef\n", 3), (b"a\nbcd", 3), (b"abc\n\n", 3)):
        assert backend.longest_line(lines) == size


def test_a_stamp_is_written_by_every_packer(backend: ModuleType) -> None:
    common: dict[str, Any] = {"frame_id": ID, "lane": "a", "tracked": True}
    for stamp in (0, 1700000000123456, 10**16 - 1, 10**20):
        stamped = {**common, "enqueued_us": stamp}
        frames = [
            backend.pack_same(b"T", [b"{}"], **stamped),
            backend.pack_mixed([b"T"], [b"{}"], **stamped),
            backend.pack_lines(b"T", b"{}\n", 0, bytes_max=1000, **stamped)[0],
        ]
        assert {backend.parse(frame).enqueued_us for frame in frames} == {min(stamp, 10**16 - 1)}
        assert len(set(frames)) == 1


def test_types_are_run_length(backend: ModuleType) -> None:
    assert backend.types(make(backend)) == f"EMAIL*2;report.daily:v2*1;{'X' * 64}*1"
    same = backend.pack_same(b"EMAIL", [b"{}"] * 1000, frame_id=ID, lane="low", tracked=True)
    assert backend.types(same) == "EMAIL*1000"


def test_the_enqueued_field_is_outside_of_the_checksum(backend: ModuleType) -> None:
    # Scripts rewrite it, and cannot seal.
    frame = patched(make(backend), 111, b"1700000000123456", sealed=False)
    assert backend.parse(frame).enqueued_us == 1700000000123456


# --- cutting and rewriting ---


def test_cut_keeps_everything_but_the_range(backend: ModuleType) -> None:
    frame = make(backend, 256, options=OPTIONS, run=3, attempts=2, flags=2, boost_us=77, enqueued_us=5)
    parts = backend.cut(frame, [(0, 100), (100, 155), (255, 1)])
    whole = fields(backend.parse(frame))
    for part, (base, n) in zip(parts, [(0, 100), (100, 155), (255, 1)], strict=True):
        lease = ID + b".%03d.%04d.00003" % (base, n)
        assert fields(backend.parse(part)) == {**whole, "base": base, "n": n, "lease": lease}
    jobs = [job for part in parts for job in backend.walk(part)]
    assert jobs == backend.walk(frame)


def test_a_part_is_cut_by_absolute_indexes(backend: ModuleType) -> None:
    (part,) = backend.cut(make(backend, 10), [(3, 5)])
    (inner,) = backend.cut(part, [(7, 1)])
    assert backend.walk(inner) == [(7, *JOBS[3])]
    assert backend.parse(inner).total == 10
    for base, n in [(2, 1), (8, 1), (3, 6), (3, 0), (3, -1), (-1, 2), (7, 2)]:
        with pytest.raises(ValueError, match="does not lie in the frame"):
            backend.cut(part, [(base, n)])


def test_a_job_cannot_be_in_two_parts(backend: ModuleType) -> None:
    with pytest.raises(ValueError, match="job 4 is in two ranges"):
        backend.cut(make(backend, 10), [(4, 3), (0, 5)])


def test_the_whole_range_is_the_same_frame(backend: ModuleType) -> None:
    frame = make(backend, 5, options=OPTIONS)
    assert backend.cut(frame, [(0, 5)]) == [frame]
    assert backend.rewrite(frame) == frame
    assert backend.cut(frame, []) == []


CHANGES = {
    "run": 8,
    "attempts": 3,
    "crashes": 2,
    "reaps": 1,
    "unknowns": 6,
    "boost_us": 10,
    "flags": 1 | 4 | 8,
}


def test_single_takes_one_job_out(backend: ModuleType) -> None:
    frame = make(backend, options=OPTIONS, enqueued_us=5)
    one = backend.single(frame, 2, **CHANGES)
    expected = {
        **fields(backend.parse(frame)), **CHANGES, "base": 2, "n": 1, "flags": 1 | 4 | 8 | 16,
        "lease": ID + b".002.0001.00008",
    }  # fmt: skip
    assert fields(backend.parse(one)) == expected
    assert backend.walk(one) == [(2, *JOBS[2])]
    assert backend.cut(frame, [(2, 1)], **CHANGES) == [one]
    for index in (-1, 4):
        with pytest.raises(ValueError, match="does not lie in the frame"):
            backend.single(frame, index)


@pytest.mark.parametrize("name", [*CHANGES, "lane"])
def test_rewrite_changes_one_field(backend: ModuleType, name: str) -> None:
    frame = make(backend, options=OPTIONS, attempts=9, reaps=9, flags=2)
    value: Any = {**CHANGES, "lane": "a" * 16}[name]
    before, after = (
        fields(backend.parse(frame)),
        fields(backend.parse(backend.rewrite(frame, **{name: value}))),
    )
    expected = {**before, name: value | 16 if name == "flags" else value}
    expected["lease"] = ID + b".000.0004.%05d" % expected["run"]
    assert after == expected


def test_the_options_flag_follows_from_the_options(backend: ModuleType) -> None:
    assert backend.parse(backend.rewrite(make(backend), flags=16)).flags == 0
    assert backend.parse(backend.rewrite(make(backend, options=OPTIONS), flags=0)).flags == 16


def test_counters_stop_and_the_run_wraps(backend: ModuleType) -> None:
    # A frame whose counter overflows must still settle; a lease's name must still change.
    frame = make(backend, run=99_999)
    changed = backend.parse(
        backend.rewrite(
            frame, run=100_000, attempts=10**6, crashes=1000, reaps=1000, unknowns=1000, boost_us=10**14
        )
    )
    assert (changed.run, changed.attempts, changed.boost_us) == (0, 9999, 10**13 - 1)
    assert (changed.crashes, changed.reaps, changed.unknowns) == (999, 999, 999)


# --- misuse ---


def lines(backend: Any, text: Any, start: int, **changes: Any) -> Any:
    common = {"bytes_max": 1000, "frame_id": ID, "lane": "a", "tracked": True}
    return backend.pack_lines(b"T", text, start, **common, **changes)


MISUSE: dict[str, Callable[[Any], Any]] = {
    "no jobs": lambda b: make(b, 0),
    "1001 jobs": lambda b: make(b, 1001),
    "fewer types than payloads": lambda b: b.pack_mixed(
        [b"T"], [b"{}", b"{}"], frame_id=ID, lane="a", tracked=True
    ),
    "a bad type among types": lambda b: b.pack_mixed(
        [b"T", b"a b"], [b"{}", b"{}"], frame_id=ID, lane="a", tracked=True
    ),
    "nothing mixed": lambda b: b.pack_mixed([], [], frame_id=ID, lane="a", tracked=True),
    "too much mixed": lambda b: b.pack_mixed(
        [b"T"] * 1001, [b""] * 1001, frame_id=ID, lane="a", tracked=True
    ),
    "no lines": lambda b: lines(b, b"", 0),
    "lines without an end": lambda b: lines(b, b"{}\n{}", 0),
    "start behind the lines": lambda b: lines(b, b"{}\n", 3),
    "start before the lines": lambda b: lines(b, b"{}\n", -1),
    "a stamp below zero": lambda b: lines(b, b"{}\n", 0, enqueued_us=-1),
    "no payloads": lambda b: b.pack_same(b"T", [], frame_id=ID, lane="a", tracked=True),
    "1001 payloads": lambda b: b.pack_same(b"T", [b""] * 1001, frame_id=ID, lane="a", tracked=True),
    "empty lane": lambda b: make(b, lane=""),
    "long lane": lambda b: make(b, lane="a" * 17),
    "lane with a space": lambda b: make(b, lane="a b"),
    "upper-case lane": lambda b: make(b, lane="High"),
    "accented lane": lambda b: make(b, lane="é"),
    "surrogate in the lane": lambda b: make(b, lane="\ud800"),
    "rewritten lane": lambda b: b.rewrite(make(b), lane="a\n"),
    "short id": lambda b: make(b, frame_id=ID[:-1]),
    "id with a letter that base32 has not": lambda b: make(b, frame_id=b"U" + ID[1:]),
    "empty type": lambda b: b.pack([(b"", b"{}", b"", False)], frame_id=ID, lane="a", tracked=True),
    "long type": lambda b: b.pack_same(b"T" * 65, [b"{}"], frame_id=ID, lane="a", tracked=True),
    "type with a space": lambda b: b.pack_same(b"a b", [b"{}"], frame_id=ID, lane="a", tracked=True),
    "long options": lambda b: make(b, options=b"x" * 100_000),
    "long options of a job": lambda b: b.pack(
        [(b"T", b"{}", b"x" * 65_536, False)], frame_id=ID, lane="a", tracked=True
    ),
    "negative run": lambda b: b.rewrite(make(b), run=-1),
    "negative counter": lambda b: b.single(make(b), 0, attempts=-1),
    "negative time": lambda b: make(b, enqueued_us=-1),
    "unknown flag": lambda b: b.rewrite(make(b), flags=32),
    "negative flags": lambda b: make(b, flags=-1),
}
WRONG_TYPES: dict[str, Callable[[Any], Any]] = {
    "frame is text": lambda b: b.parse("F1"),
    "frame is a bytearray": lambda b: b.parse(bytearray(make(b))),
    "frame is none": lambda b: b.walk(None),
    "a type among types is text": lambda b: b.pack_mixed(
        [b"T", "T"], [b"{}", b"{}"], frame_id=ID, lane="a", tracked=True
    ),
    "a type among types is none": lambda b: b.pack_mixed(
        [None], [b"{}"], frame_id=ID, lane="a", tracked=True
    ),
    "a payload among types is text": lambda b: b.pack_mixed(
        [b"T"], ["{}"], frame_id=ID, lane="a", tracked=True
    ),
    "lines are text": lambda b: lines(b, "{}\n", 0),
    "long lines are text": lambda b: b.longest_line("{}"),
    "payload is text": lambda b: b.pack_same(b"T", ["{}"], frame_id=ID, lane="a", tracked=True),
    "payload is none": lambda b: b.pack([(b"T", None, b"", False)], frame_id=ID, lane="a", tracked=True),
    "options are none": lambda b: b.pack([(b"T", b"{}", None, False)], frame_id=ID, lane="a", tracked=True),
    "type is text": lambda b: b.pack_same("T", [b"{}"], frame_id=ID, lane="a", tracked=True),
    "zstd is a number": lambda b: b.pack([(b"T", b"{}", b"", 1)], frame_id=ID, lane="a", tracked=True),
}


@pytest.mark.parametrize("call", MISUSE.values(), ids=MISUSE)
def test_misuse_is_a_value_error(backend: ModuleType, call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError):
        call(backend)


@pytest.mark.parametrize("call", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_another_type_is_a_type_error(backend: ModuleType, call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        call(backend)


def test_fields_at_their_limits_fit(backend: ModuleType) -> None:
    jobs = [(b"T" * 64, b"x" * 100_000, b"o" * 65_535, True)]
    frame = backend.pack(jobs, frame_id=b"Z" * 26, lane="z" * 16, tracked=True, options=b"o" * 99_999)
    assert len(backend.parse(frame).options) == 99_999
    assert backend.walk(frame) == [(0, *jobs[0])]


# --- damage ---

READERS: dict[str, Callable[[Any, bytes], Any]] = {
    "parse": lambda b, f: b.parse(f),
    "walk": lambda b, f: b.walk(f),
    "job_at": lambda b, f: b.job_at(f, 0),
    "types": lambda b, f: b.types(f),
    "cut": lambda b, f: b.cut(f, [(0, 1)]),
    "single": lambda b, f: b.single(f, 0, run=1),
    "rewrite": lambda b, f: b.rewrite(f, run=1),
}

# What is changed in a frame of four jobs with options, under a fitting checksum, and the refusal.
BODY = 128 + len(OPTIONS)
DAMAGE: dict[str, tuple[int, bytes, str]] = {
    "magic": (0, b"G", "does not begin like one"),
    "version is no character": (1, b"\x01", "does not begin like one"),
    "flags below": (2, b"?", "character"),
    "flags above": (2, b"`", "character"),
    "space": (3, b"_", "character"),
    "id": (4, b"L", "character"),
    "id, lower case": (29, b"a", "character"),
    "dot": (30, b"-", "character"),
    "base": (31, b"00x", "character"),
    "n": (35, b" 004", "character"),
    "run": (40, b"+0001", "character"),
    "lane empty": (79, b" " * 16, "character"),
    "lane padded on the left": (79, b" high", "character"),
    "lane, upper case": (79, b"High", "character"),
    "options length": (96, b"0001_", "character"),
    "enqueued": (111, b"-000000000000001", "character"),
    "newline": (127, b" ", "character"),
    "n is 0": (35, b"0000", "contradict"),
    "n above total": (35, b"0005", "contradict"),
    "base beyond": (31, b"001", "contradict"),
    "total below": (46, b"0003", "contradict"),
    "total above 1000": (46, b"1001", "contradict"),
    "options flag missing": (2, b"A", "options do not fit"),
    "options flag without options": (96, b"00000", "options do not fit"),
    "options beyond the end": (96, b"99999", "options do not fit"),
    "fewer jobs than there are": (35, b"0003", "does not hold the jobs"),
    "options run into the body": (96, b"00019", "does not hold the jobs"),
    "type of length 0": (BODY, b"\0", "does not hold the jobs"),
    "type of length 65": (BODY, b"\x41", "does not hold the jobs"),
    "payload beyond the end": (BODY + 6, b"\xff\xff\xff\x3f", "does not hold the jobs"),
    "type with a space": (BODY + 1, b"E AIL", "malformed type name"),
    "type with a zero": (BODY + 1, b"EMAI\0", "malformed type name"),
}


@pytest.mark.parametrize(("at", "text", "refusal"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_by_every_reader(backend: ModuleType, at: int, text: bytes, refusal: str) -> None:
    frame = patched(make(backend, options=OPTIONS), at, text)
    for read in READERS.values():
        with pytest.raises(DamagedFrame, match=refusal):
            read(backend, frame)


def test_more_jobs_than_there_are_are_refused(backend: ModuleType) -> None:
    frame = patched(patched(make(backend), 46, b"0005"), 35, b"0005")
    with pytest.raises(DamagedFrame, match="does not hold the jobs"):
        backend.parse(frame)


def test_empty_options_of_a_job_are_refused(backend: ModuleType) -> None:
    # The bit means that there are some; otherwise one job would have two spellings.
    frame = backend.pack([(b"T", b"{}", b"o", False)], frame_id=ID, lane="a", tracked=True)
    start = 128 + 6
    assert frame[start : start + 2] == b"\x01\x00"
    with pytest.raises(DamagedFrame, match="does not hold the jobs"):
        backend.parse(patched(frame[: start + 2] + frame[start + 3 :], start, b"\0\0"))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_wrong_checksum_is_never_sealed_again(
    backend: ModuleType, read: Callable[[Any, bytes], Any]
) -> None:
    # A cut of a damaged frame under a new checksum would run a job that nobody submitted.
    frame = patched(make(backend), 150, b"!", sealed=False)
    with pytest.raises(DamagedFrame, match="checksum"):
        read(backend, frame)


def test_peek_looks_at_the_shape_alone(backend: ModuleType) -> None:
    frame = make(backend)
    assert backend.peek(patched(frame, 150, b"!", sealed=False)).n == 4
    with pytest.raises(DamagedFrame, match="character"):
        backend.peek(patched(frame, 127, b" "))


@pytest.mark.parametrize("version", [b"2", b"0", b"9", b"A", b"z"])
def test_another_version_is_not_damage(backend: ModuleType, version: bytes) -> None:
    frame = patched(make(backend), 1, version, sealed=False)
    # Nobody knows how long its header is.
    for bytes_ in (frame, frame[:2], frame[:100]):
        for read in (*READERS.values(), lambda b, f: b.peek(f)):
            with pytest.raises(NewerFrame):
                read(backend, bytes_)


def test_every_truncation_is_refused(backend: ModuleType) -> None:
    frame = make(backend, options=OPTIONS)
    for size in range(len(frame)):
        with pytest.raises(DamagedFrame):
            backend.parse(frame[:size])
    with pytest.raises(DamagedFrame):
        backend.parse(frame + b"\0")


def test_every_flipped_bit_is_noticed(backend: ModuleType) -> None:
    frame = make(backend, options=OPTIONS)
    for at in range(len(frame)):
        if 111 <= at < 127:
            continue
        for bit in range(8):
            flipped = bytearray(frame)
            flipped[at] ^= 1 << bit
            with pytest.raises(FrameError):
                backend.parse(bytes(flipped))


def test_a_flipped_bit_of_enqueued_is_caught_by_its_shape(backend: ModuleType) -> None:
    # It is outside of the checksum: what stays a digit passes, anything else does not.
    frame = make(backend, enqueued_us=1700000000123456)
    for at in range(111, 127):
        for bit in range(8):
            flipped = bytearray(frame)
            flipped[at] ^= 1 << bit
            if flipped[at : at + 1].isdigit():
                assert backend.parse(bytes(flipped)).enqueued_us != 1700000000123456
            else:
                with pytest.raises(DamagedFrame):
                    backend.parse(bytes(flipped))


# --- the checksum, the chooser ---


@pytest.mark.parametrize("by_table", [False, True])
def test_the_checksum_is_the_one_of_zlib(by_table: bool) -> None:
    seeded = random.Random(20240607)
    data = seeded.randbytes(5000)
    for size in [*range(200), 4096, 4999, 5000]:
        for start in (0, 1, 7):
            part, crc = data[start : start + size], seeded.getrandbits(32)
            assert _fast.crc32(part, by_table=by_table) == zlib.crc32(part)
            assert _fast.crc32(part, crc, by_table=by_table) == zlib.crc32(part, crc)


def test_an_empty_header_reads_no_memory_of_others() -> None:
    empty = _fast.Header.__new__(_fast.Header)
    assert fields(empty)["n"] == 0
    assert repr(empty)


def test_the_compiled_backend_is_chosen() -> None:
    # A silent fallback would cost two orders of magnitude of speed and no test would notice.
    assert codec.BACKEND == "compiled"
    assert codec.FALLBACK_REASON == ""
    assert codec.parse is _fast.parse


def test_both_backends_offer_the_same_functions() -> None:
    tree = ast.parse(Path(_pure.__file__).read_text("utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name in sorted(functions):
        if not name.startswith("_"):
            assert callable(getattr(_fast, name, None)), name
            assert getattr(_fast, name).__doc__.strip()
    for name in codec.__all__:
        assert getattr(codec, name) is not None


def test_the_twin_is_used_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqe._fast", None)
    monkeypatch.delattr(tqe, "_fast")
    spec = importlib.util.spec_from_file_location("codec_without_extension", codec.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.BACKEND == "pure"
    assert module.parse is _pure.parse
    assert module.FALLBACK_REASON
