"""The plain-Python twin of the compiled frame codec: same functions, same results, same refusals.

It serves machines where the extension was not built, and the tests, which run every case over both.
docs/WIRE_FORMAT.md is the contract; checks are in the same order in both, so a frame with two faults is
refused for the same one.
"""

import re
import zlib
from collections.abc import Iterator
from itertools import islice
from math import isfinite
from typing import Any, Final, final

from tqe.errors import DamagedFrame, NewerFrame

COMPILED = False
HEADER_BYTES: Final = 128

_TRACKED = 1
_OPTIONS = 16
_SETTABLE = 15  # the options flag follows from the options
_JOBS_MAX = 1_000
_OPTIONS_BYTES_MAX = 99_999
_JOB_OPTIONS_BYTES_MAX = 65_535
_PAYLOAD_BYTES_MAX = (1 << 30) - 1
_DEPTH_MAX = 64  # of a payload
_BIT_ZSTD = 1 << 30
_BIT_OPTIONS = 1 << 31

_HEADER = re.compile(
    rb"F1([@-_]) "
    rb"(?P<frame_id>[0-9A-HJKMNP-TV-Z]{26})\.([0-9]{3})\.([0-9]{4})\.([0-9]{5}) "
    rb"([0-9]{4}) "
    rb"([0-9]{4})([0-9]{3})([0-9]{3})([0-9]{3}) "
    rb"([0-9]{13}) "
    rb"(?P<lane>[a-z0-9_ -]{16}) "
    rb"([0-9]{5}) "
    rb"(?P<crc>[0-9a-f]{8}) "
    rb"([0-9]{16})\n"
)
_FRAME_ID = re.compile(rb"[0-9A-HJKMNP-TV-Z]{26}")
_LANE = re.compile(r"[a-z0-9_-]{1,16}")
_TYPE = re.compile(rb"[A-Za-z0-9_.:-]{1,64}")

_NEWER = "the frame was written by another version of the engine"
_SHORT = "the frame is shorter than a header"
_MAGIC = "the frame does not begin like one"
_SHAPE = "the header has a character that its field does not allow"
_RANGE = "the numbers of the header contradict each other"
_UNFIT = "the options do not fit the header"
_CRC = "the checksum differs"
_BODY = "the body does not hold the jobs that the header counts"
_NAME = "a job has a malformed type name"


@final
class Header:
    """The header of a checked frame."""

    __slots__ = (
        "attempts", "base", "boost_us", "crashes", "enqueued_us", "flags", "frame_id", "lane", "lease", "n",
        "options", "reaps", "run", "total", "unknowns",
    )  # fmt: skip

    flags: int
    frame_id: bytes
    base: int
    n: int
    run: int
    total: int
    attempts: int
    crashes: int
    reaps: int
    unknowns: int
    boost_us: int
    lane: str
    enqueued_us: int
    options: bytes
    lease: bytes

    def __repr__(self) -> str:
        return f"<Header {self.lease.decode()} total={self.total} lane={self.lane} flags={self.flags}>"


def crc32(data: bytes, crc: int = 0, *, by_table: bool = False) -> int:
    """CRC-32 of `data`: zlib's. `by_table` exists for the compiled twin."""
    return zlib.crc32(data, crc)


def pack(
    jobs: list[tuple[bytes, bytes, bytes, bool]],
    *,
    frame_id: bytes,
    lane: str,
    tracked: bool,
    options: bytes = b"",
    flags: int = 0,
    run: int = 0,
    attempts: int = 0,
    crashes: int = 0,
    reaps: int = 0,
    unknowns: int = 0,
    boost_us: int = 0,
    enqueued_us: int = 0,
) -> bytes:
    """Make a frame of jobs, each (type, payload, options, zstd). `flags` adds bits to `tracked`."""
    changes = _changes(run, attempts, crashes, reaps, unknowns, boost_us, flags)
    changes[2] = (1, (changes[2][1] | (_TRACKED if tracked else 0)))
    _check_count(len(jobs), options)
    body: list[bytes] = []
    for name, payload, own, zstd in jobs:
        for part in (name, payload, own):
            _bytes(part)
        if not isinstance(zstd, bool):
            raise TypeError("a job is (type, payload, options, zstd): bytes, bytes, bytes, bool")
        _check_type(name)
        if len(payload) > _PAYLOAD_BYTES_MAX:
            raise ValueError("a payload is limited to 1073741823 bytes")
        if len(own) > _JOB_OPTIONS_BYTES_MAX:
            raise ValueError("the options of a job are limited to 65535 bytes")
        word = len(payload) | (_BIT_ZSTD if zstd else 0) | (_BIT_OPTIONS if own else 0)
        body += (bytes((len(name),)), name, word.to_bytes(4, "little"))
        if own:
            body += (len(own).to_bytes(2, "little"), own)
        body.append(payload)
    head = _new_header(len(jobs), frame_id, lane, 0, options)
    _edit(head, changes)
    head[111:127] = b"%016d" % _counter(enqueued_us, "enqueued_us", 16)
    return _sealed(head, options, *body)


def pack_same(
    type: bytes,
    payloads: list[bytes],
    *,
    frame_id: bytes,
    lane: str,
    tracked: bool,
    options: bytes = b"",
    enqueued_us: int = 0,
) -> bytes:
    """Make a frame of jobs of one type without options of their own or compression: the fast way for bulk."""
    _check_type(_bytes(type))
    _check_count(len(payloads), options)
    body = [part for payload in payloads for part in _plain_job(type, payload)]
    return _sealed(
        _plain_header(len(payloads), frame_id, lane, tracked, options, enqueued_us), options, *body
    )


def pack_mixed(
    types: list[bytes],
    payloads: list[bytes],
    *,
    frame_id: bytes,
    lane: str,
    tracked: bool,
    options: bytes = b"",
    enqueued_us: int = 0,
) -> bytes:
    """The same for jobs of several types: payload i is one of type i."""
    _check_count(len(payloads), options)
    if len(types) != len(payloads):
        raise ValueError(f"there are {len(types)} types for {len(payloads)} payloads")
    body: list[bytes] = []
    for name, payload in zip(types, payloads, strict=True):
        _check_type(_bytes(name))
        body += _plain_job(name, payload)
    return _sealed(
        _plain_header(len(payloads), frame_id, lane, tracked, options, enqueued_us), options, *body
    )


def pack_lines(
    type: bytes,
    lines: bytes,
    start: int,
    *,
    bytes_max: int,
    frame_id: bytes,
    lane: str,
    tracked: bool,
    options: bytes = b"",
    enqueued_us: int = 0,
) -> tuple[bytes, int, int]:
    """Make a frame like pack_same of the payloads in `lines` from `start` on, each with a newline behind it.

    It takes as many as fit in 1000 jobs and `bytes_max` bytes, at least one: (frame, jobs, where the next one
    begins).
    """
    _check_type(_bytes(type))
    _check_count(1, options)
    if not 0 <= start < len(_bytes(lines)) or not lines.endswith(b"\n"):
        raise ValueError("lines hold payloads from `start` on, and end with a newline")
    body: list[bytes] = []
    at, n, size = start, 0, HEADER_BYTES + len(options)
    while at < len(lines) and n < _JOBS_MAX:
        stop = lines.index(b"\n", at)
        if n and size + 5 + len(type) + stop - at > bytes_max:
            break
        size += 5 + len(type) + stop - at
        body += _plain_job(type, lines[at:stop])
        n += 1
        at = stop + 1
    return _sealed(_plain_header(n, frame_id, lane, tracked, options, enqueued_us), options, *body), n, at


def longest_line(lines: bytes) -> int:
    """Bytes of the longest line, without its newline; what follows the last newline counts as a line."""
    return max(map(len, _bytes(lines).split(b"\n")))


def parse(frame: bytes) -> Header:
    """Check all of a frame (header, checksum, body); its header. Raises DamagedFrame or NewerFrame."""
    return _sound(frame)[0]


def peek(frame: bytes) -> Header:
    """Check only the shape of the header and return it. Raises DamagedFrame or NewerFrame."""
    return _peek(frame)[0]


def walk(frame: bytes) -> list[tuple[int, bytes, bytes, bytes, bool]]:
    """The jobs of a frame: a list of (index, type, payload as stored, options, zstd)."""
    header, _ = _sound(frame)
    jobs = _jobs(frame, header)
    return [
        (index, name, payload, options, zstd)
        for index, (_, name, payload, options, zstd) in enumerate(jobs, header.base)
    ]


def cut(
    frame: bytes,
    ranges: list[tuple[int, int]],
    *,
    run: int | None = None,
    attempts: int | None = None,
    crashes: int | None = None,
    reaps: int | None = None,
    unknowns: int | None = None,
    boost_us: int | None = None,
    flags: int | None = None,
) -> list[bytes]:
    """Frames of the jobs in each range (base, n): absolute indexes, inside of the frame, without overlap.

    Keywords change these fields of all of them; what is not given is kept.
    """
    changes = _changes(run, attempts, crashes, reaps, unknowns, boost_us, flags)
    header, starts = _sound(frame)
    taken: set[int] = set()
    parts = []
    for base, n in ranges:
        _check_range(header, base, n)
        for index in range(base, base + n):
            # A job in two parts would run twice.
            if index in taken:
                raise ValueError(f"job {index} is in two ranges")
            taken.add(index)
        parts.append(_part(frame, header, starts, base, n, changes))
    return parts


def single(
    frame: bytes,
    index: int,
    *,
    run: int | None = None,
    attempts: int | None = None,
    crashes: int | None = None,
    reaps: int | None = None,
    unknowns: int | None = None,
    boost_us: int | None = None,
    flags: int | None = None,
) -> bytes:
    """The frame of one for the job at an absolute index, with the given fields changed."""
    changes = _changes(run, attempts, crashes, reaps, unknowns, boost_us, flags)
    header, starts = _sound(frame)
    _check_range(header, index, 1)
    return _part(frame, header, starts, index, 1, changes)


def rewrite(
    frame: bytes,
    *,
    run: int | None = None,
    attempts: int | None = None,
    crashes: int | None = None,
    reaps: int | None = None,
    unknowns: int | None = None,
    boost_us: int | None = None,
    flags: int | None = None,
    lane: str | None = None,
) -> bytes:
    """The same frame with the given fields of its header changed."""
    changes = _changes(run, attempts, crashes, reaps, unknowns, boost_us, flags)
    _sound(frame)
    head = bytearray(frame[:HEADER_BYTES])
    _edit(head, changes)
    if lane is not None:
        head[79:95] = _lane(lane)
    return _sealed(head, frame[HEADER_BYTES:])


def types(frame: bytes) -> str:
    """The types of a frame's jobs in order, run-length: "EMAIL*2;SMS*1"."""
    header, _ = _sound(frame)
    runs: list[tuple[bytes, int]] = []
    for _, name, *_ in _jobs(frame, header):
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    return ";".join(f"{name.decode()}*{k}" for name, k in runs)


def plain_payloads(payloads: list[Any]) -> int:
    """How many payloads, from the first on, are certainly sound: dicts of plain JSON data, not too deep.

    The one at the place returned may still be sound; it needs the slow look of tqe.codec.payload.
    """
    for i, payload in enumerate(payloads):
        if type(payload) is not dict or not _plain(payload, 0):
            return i
    return len(payloads)


def job_at(frame: bytes, index: int) -> tuple[bytes, bytes, bytes, bool]:
    """The job at an absolute index: (type, payload as stored, options, zstd)."""
    header, _ = _sound(frame)
    _check_range(header, index, 1)
    _, name, payload, options, zstd = next(islice(_jobs(frame, header), index - header.base, None))
    return name, payload, options, zstd


# --- reading ---


def _peek(frame: bytes) -> tuple[Header, int]:
    """The header and the checksum that it states."""
    _bytes(frame)
    # A version is a letter or a digit, anything else is damage. What follows it may have any form and length.
    if frame[:1] == b"F" and frame[1:2] != b"1" and frame[1:2].isalnum():
        raise NewerFrame(_NEWER)
    if len(frame) < HEADER_BYTES:
        raise DamagedFrame(_SHORT)
    if frame[:2] != b"F1":
        raise DamagedFrame(_MAGIC)
    match = _HEADER.match(frame)
    lane = match["lane"].decode().rstrip(" ") if match else ""
    if match is None or not _LANE.fullmatch(lane):
        raise DamagedFrame(_SHAPE)
    flags, _, base, n, run, total, attempts, crashes, reaps, unknowns, boost, _, size, _, enqueued = (
        match.groups()
    )
    header = Header()
    header.flags = flags[0] - 64
    header.frame_id = match["frame_id"]
    header.base = int(base)
    header.n = int(n)
    header.run = int(run)
    header.total = int(total)
    header.attempts = int(attempts)
    header.crashes = int(crashes)
    header.reaps = int(reaps)
    header.unknowns = int(unknowns)
    header.boost_us = int(boost)
    header.lane = lane
    header.enqueued_us = int(enqueued)
    header.lease = frame[4:45]
    if header.n < 1 or header.total > _JOBS_MAX or header.base + header.n > header.total:
        raise DamagedFrame(_RANGE)
    if bool(header.flags & _OPTIONS) != (int(size) > 0) or len(frame) - HEADER_BYTES < int(size):
        raise DamagedFrame(_UNFIT)
    header.options = frame[HEADER_BYTES : HEADER_BYTES + int(size)]
    return header, int(match["crc"], 16)


def _sound(frame: bytes) -> tuple[Header, list[int]]:
    """Check everything; the header and the n + 1 offsets of the jobs' bounds."""
    header, crc = _peek(frame)
    if crc != _checksum(frame):
        raise DamagedFrame(_CRC)
    starts = []
    for start, name, *_ in _jobs(frame, header):
        if not _TYPE.fullmatch(name):
            raise DamagedFrame(_NAME)
        starts.append(start)
    starts.append(len(frame))
    return header, starts


def _jobs(frame: bytes, header: Header) -> Iterator[tuple[int, bytes, bytes, bytes, bool]]:
    """Each job as (offset, type, payload, options, zstd); DamagedFrame where the body does not fit."""
    at = HEADER_BYTES + len(header.options)
    end = len(frame)
    for _ in range(header.n):
        start = at
        if end - at < 1:
            raise DamagedFrame(_BODY)
        k = frame[at]
        if not 1 <= k <= 64 or end - at < k + 5:
            raise DamagedFrame(_BODY)
        name = frame[at + 1 : at + 1 + k]
        word = int.from_bytes(frame[at + 1 + k : at + 5 + k], "little")
        at += k + 5
        options = b""
        if word & _BIT_OPTIONS:
            if end - at < 2:
                raise DamagedFrame(_BODY)
            k = int.from_bytes(frame[at : at + 2], "little")
            at += 2
            if k == 0 or end - at < k:
                raise DamagedFrame(_BODY)
            options = frame[at : at + k]
            at += k
        k = word & _PAYLOAD_BYTES_MAX
        if end - at < k:
            raise DamagedFrame(_BODY)
        yield start, name, frame[at : at + k], options, bool(word & _BIT_ZSTD)
        at += k
    if at != end:
        raise DamagedFrame(_BODY)


def _checksum(frame: bytes | bytearray) -> int:
    """Over all bytes but itself and `enqueued`, which scripts rewrite."""
    view = memoryview(frame)
    return zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[:102]))


def _plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if value is None or kind is str or kind is bool:
        return True
    if kind is int:
        return bool(-(1 << 63) <= value < 1 << 63)
    if kind is float:
        return isfinite(value)
    if depth >= _DEPTH_MAX:
        return False
    if kind is dict:
        return all(type(key) is str and _plain(item, depth + 1) for key, item in value.items())
    return (kind is list or kind is tuple) and all(_plain(item, depth + 1) for item in value)


# --- writing ---

_Changes = dict[int, tuple[int, int]]  # offset of a field -> its width, its new value


def _changes(
    run: int | None,
    attempts: int | None,
    crashes: int | None,
    reaps: int | None,
    unknowns: int | None,
    boost_us: int | None,
    flags: int | None,
) -> _Changes:
    changes: _Changes = {}
    if run is not None:
        if run < 0:
            raise ValueError("run must not be negative")
        # Wraps: what a lease's name needs is to differ from the ones shortly before it.
        changes[40] = (5, run % 100_000)
    for at, width, name, value in (
        (51, 4, "attempts", attempts),
        (55, 3, "crashes", crashes),
        (58, 3, "reaps", reaps),
        (61, 3, "unknowns", unknowns),
        (65, 13, "boost_us", boost_us),
    ):
        if value is not None:
            changes[at] = (width, _counter(value, name, width))
    if flags is not None:
        if flags < 0 or flags & ~31:
            raise ValueError("flags must be a sum of the bits 1, 2, 4, 8 and 16")
        changes[2] = (1, flags & _SETTABLE)
    return changes


def _counter(value: int, name: str, width: int) -> int:
    """A counter for the header. Stops at its field's end: an overflow must not keep a job from settling."""
    if value < 0:
        raise ValueError(f"{name} must not be negative")
    most: int = 10**width - 1
    return min(value, most)


def _edit(head: bytearray, changes: _Changes) -> None:
    for at, (width, value) in changes.items():
        if at == 2:
            head[2] = 64 | value | ((head[2] - 64) & _OPTIONS)
        else:
            head[at : at + width] = b"%0*d" % (width, value)


def _part(frame: bytes, header: Header, starts: list[int], base: int, n: int, changes: _Changes) -> bytes:
    """A new frame of n jobs from `base` on of a checked one."""
    head = bytearray(frame[:HEADER_BYTES])
    head[31:34] = b"%03d" % base
    head[35:39] = b"%04d" % n
    _edit(head, changes)
    first = base - header.base
    return _sealed(head, header.options, frame[starts[first] : starts[first + n]])


def _new_header(n: int, frame_id: bytes, lane: str, flags: int, options: bytes) -> bytearray:
    if not _FRAME_ID.fullmatch(_bytes(frame_id)):
        raise ValueError(f"a frame id is 26 characters of Crockford's base32, not {frame_id!r}")
    return bytearray(
        b"F1%c %b.000.%04d.00000 %04d 0000000000000 0000000000000 %b %05d 00000000 0000000000000000\n"
        % (64 | flags | (_OPTIONS if options else 0), frame_id, n, n, _lane(lane), len(options))
    )


def _plain_header(
    n: int, frame_id: bytes, lane: str, tracked: bool, options: bytes, enqueued_us: int
) -> bytearray:
    head = _new_header(n, frame_id, lane, _TRACKED if tracked else 0, options)
    head[111:127] = b"%016d" % _counter(enqueued_us, "enqueued_us", 16)
    return head


def _plain_job(name: bytes, payload: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """A job without options of its own or compression."""
    if len(_bytes(payload)) > _PAYLOAD_BYTES_MAX:
        raise ValueError("a payload is limited to 1073741823 bytes")
    return bytes((len(name),)), name, len(payload).to_bytes(4, "little"), payload


def _sealed(head: bytearray, *rest: bytes) -> bytes:
    frame = bytearray().join((head, *rest))
    frame[102:110] = b"%08x" % _checksum(frame)
    return bytes(frame)


def _lane(lane: str) -> bytes:
    if not _LANE.fullmatch(lane):
        raise ValueError(f"a lane is named by 1 to 16 of a-z, 0-9, '_' and '-', not by {lane!r}")
    return lane.encode().ljust(16)


def _check_type(name: bytes) -> None:
    if not _TYPE.fullmatch(name):
        allowed = "1 to 64 of A-Z, a-z, 0-9, '_', '.', ':' and '-'"
        raise ValueError(f"a type is named by {allowed}, not by {name!r}")


def _check_count(n: int, options: bytes) -> None:
    if not 1 <= n <= _JOBS_MAX:
        raise ValueError(f"a frame holds 1 to 1000 jobs, not {n}")
    if len(_bytes(options)) > _OPTIONS_BYTES_MAX:
        raise ValueError("the options of a frame are limited to 99999 bytes")


def _check_range(header: Header, base: int, n: int) -> None:
    if n < 1 or base < header.base or base + n > header.base + header.n:
        raise ValueError(f"the range {base}, {n} does not lie in the frame's {header.base}, {header.n}")


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise TypeError(f"expected bytes, got {type(value).__name__}")
    return value


def pack_command(arguments: tuple[bytes | str | int | float, ...]) -> bytes:
    """A command of bytes, texts and numbers as Redis reads it."""
    pieces = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        text = argument if isinstance(argument, bytes) else _as_text(argument)
        pieces.append(b"$%d\r\n%b\r\n" % (len(text), text))
    return b"".join(pieces)


def _as_text(argument: object) -> bytes:
    if isinstance(argument, str):
        return argument.encode()
    if isinstance(argument, int | float) and not isinstance(argument, bool):
        return repr(argument).encode()
    raise TypeError(f"Redis takes bytes, texts and numbers, not {type(argument).__name__}")
