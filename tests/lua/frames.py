"""Frames for tests of the scripts, made without the codec, so that one cannot hide the other's mistakes."""

import struct
import zlib

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
HEADER_BYTES = 128


def frame_id(number: int, char: str = "A") -> str:
    """A frame id that tells its number; `char` is its bucket character."""
    digits = ""
    for _ in range(11):
        digits = ALPHABET[number % 32] + digits
        number //= 32
    return f"01JDQWEAAA{char}{digits}00ZZ"[:24] + "00"


def make(
    fid: str,
    *,
    n: int = 1,
    base: int = 0,
    run: int = 0,
    total: int | None = None,
    lane: str = "high",
    tracked: bool = True,
    attempts: int = 0,
    boost_us: int = 0,
    enqueued_us: int = 0,
    payload: bytes = b'{"to":"a@example.com","subject":"forty bytes"}',
) -> bytes:
    """One frame with n jobs `EMAIL`, sealed."""
    job = b"\x05EMAIL" + struct.pack("<I", len(payload)) + payload
    flags = chr(64 + (1 if tracked else 0))
    head = (
        f"F1{flags} {fid}.{base:03d}.{n:04d}.{run:05d} {n + base if total is None else total:04d} "
        f"{attempts:04d}{0:09d} {boost_us:013d} {lane:<16s} {0:05d} "
    ).encode()
    body = job * n
    crc = zlib.crc32(body, zlib.crc32(head))
    whole = head + f"{crc:08x} {enqueued_us:016d}\n".encode() + body
    assert len(head) == 102 and len(whole) == HEADER_BYTES + len(body)
    return whole


def lease(frame: bytes) -> bytes:
    return frame[4:45]


def id_of(frame: bytes) -> bytes:
    return frame[4:30]


def enqueued_us(frame: bytes) -> int:
    return int(frame[111:127])


def at(frame: bytes, us: int) -> bytes:
    """The frame with another time of entry, as scripts rewrite it."""
    return frame[:111] + b"%016d" % us + frame[127:]
