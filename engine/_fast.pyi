"""Types of the compiled fast path."""

from typing import Any, Final, final

COMPILED: bool

# --- frame: the same functions as in _pure.py ---

HEADER_BYTES: Final = 128

@final
class Header:
    """The header of a checked frame."""

    @property
    def flags(self) -> int: ...
    @property
    def frame_id(self) -> bytes: ...
    @property
    def base(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def run(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def attempts(self) -> int: ...
    @property
    def crashes(self) -> int: ...
    @property
    def reaps(self) -> int: ...
    @property
    def unknowns(self) -> int: ...
    @property
    def boost_us(self) -> int: ...
    @property
    def lane(self) -> str: ...
    @property
    def enqueued_us(self) -> int: ...
    @property
    def options(self) -> bytes: ...
    @property
    def lease(self) -> bytes: ...

def crc32(data: bytes, crc: int = 0, *, by_table: bool = False) -> int: ...
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
) -> bytes: ...
def pack_same(
    type: bytes,
    payloads: list[bytes],
    *,
    frame_id: bytes,
    lane: str,
    tracked: bool,
    options: bytes = b"",
) -> bytes: ...
def parse(frame: bytes) -> Header: ...
def peek(frame: bytes) -> Header: ...
def walk(frame: bytes) -> list[tuple[int, bytes, bytes, bytes, bool]]: ...
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
) -> list[bytes]: ...
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
) -> bytes: ...
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
) -> bytes: ...
def types(frame: bytes) -> str: ...
def job_at(frame: bytes, index: int) -> tuple[bytes, bytes, bytes, bool]: ...
def plain_payloads(payloads: list[Any]) -> int: ...
