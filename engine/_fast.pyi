"""Types of the compiled fast path."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, Final, final

from typing_extensions import Buffer

from tqe.errors import FrameError

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
    enqueued_us: int = 0,
) -> bytes: ...
def pack_mixed(
    types: list[bytes],
    payloads: list[bytes],
    *,
    frame_id: bytes,
    lane: str,
    tracked: bool,
    options: bytes = b"",
    enqueued_us: int = 0,
) -> bytes: ...
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
) -> tuple[bytes, int, int]: ...
def longest_line(lines: bytes) -> int: ...
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

# --- board and dispatch: the same as in _pure_board.py ---

RUN_ENDED: int
RUN_TIME: int
RUN_STOP: int
RUN_FULL: int
RUN_LEASE_END: int
RUN_SPECIAL: int
RUN_BLOCKED: int

def board_constants() -> dict[str, int]: ...

@final
class Slot:
    """A worker's own slot of the board."""

    def __init__(self, board: Buffer, offset: int) -> None: ...
    def free_rows(self) -> tuple[int, int]: ...
    def open_row(self, frame_id: bytes, base: int, n: int, run: int) -> int: ...
    def narrow_row(self, row: int, base: int, n: int) -> None: ...
    def close_row(self, row: int) -> None: ...
    def close_rows(self, leases: list[Lease]) -> None: ...
    def states(self, row: int) -> bytes: ...
    def set_state(self, row: int, index: int, state: int) -> None: ...
    def room(self) -> int: ...
    def record(
        self,
        row: int,
        index: int,
        status: int,
        *,
        delay_ms: int = 0,
        started_ms: int = 0,
        finished_ms: int = 0,
        error: bytes = b"",
        result: bytes = b"",
    ) -> None: ...
    def begin_settle(self, rows: Iterable[int]) -> int: ...
    def end_settle(self, half: int) -> None: ...
    def reset_halves(self) -> None: ...

@final
class Entry:
    """A task as the hot path sees it."""

    mean_ns: float
    seen: int
    def __init__(
        self,
        *,
        name: str,
        number: int,
        func: Callable[..., Any],
        decode: Callable[[Any], Any],
        positional: tuple[str, ...],
        keyword_only: tuple[str, ...],
        mode: int,
        is_async: bool,
        timeout_ms: int = 0,
        hard_ms: int = 0,
        retries: int = 0,
        mean_ns: float = -1.0,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def key(self) -> bytes: ...
    @property
    def number(self) -> int: ...
    @property
    def func(self) -> Callable[..., Any]: ...
    @property
    def decode(self) -> Callable[[Any], Any]: ...
    @property
    def positional(self) -> tuple[str, ...]: ...
    @property
    def keyword_only(self) -> tuple[str, ...]: ...
    @property
    def mode(self) -> int: ...
    @property
    def is_async(self) -> bool: ...
    @property
    def timeout_ms(self) -> int: ...
    @property
    def hard_ms(self) -> int: ...
    @property
    def retries(self) -> int: ...
    def bind(self, slot: Slot) -> None: ...
    def timed(self, jobs: int, ns: int) -> None: ...
    def waited(self, jobs: int, us: int) -> None: ...
    def count(self, word: int) -> None: ...

@final
class Lease:
    """A frame that this worker holds."""

    running: int
    cancels: set[int] | None
    options: dict[str, Any] | None
    claims: list[tuple[int, int]]
    pieces: Sequence[tuple[int, int]]
    settling: bool
    lost: bool
    started_ms: int
    finished_ms: int
    first_done_ns: int
    predicted_ns: float
    def __init__(self, frame: bytes, slot: Slot, rank: int = 0) -> None: ...
    @property
    def frame(self) -> bytes: ...
    @property
    def row(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def next(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def header(self) -> Header: ...
    @property
    def frame_id(self) -> bytes: ...
    @property
    def name(self) -> bytes: ...
    @property
    def lane(self) -> str: ...
    @property
    def base(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def run(self) -> int: ...
    @property
    def tracked(self) -> bool: ...
    @property
    def attempts(self) -> int: ...
    @property
    def enqueued_us(self) -> int: ...
    def ended(self) -> bool: ...
    def to_settle(self) -> bool: ...
    def next_type(self) -> bytes: ...
    def give_back(self, index: int) -> None: ...
    def skip_rest(self) -> None: ...
    def types_ahead(self) -> list[tuple[bytes, int]]: ...

def admit(
    frames: list[bytes], slot: Slot, ranks: dict[str, int], other_rank: int
) -> tuple[list[Lease], int, list[tuple[bytes, FrameError | None]]]: ...
def plain_done(
    leases: list[Lease],
) -> tuple[dict[tuple[int, str, bytes], list[Lease]], list[Lease]]: ...

@final
class Runner:
    """Runs the jobs of leases on the calling thread."""

    until_ns: int
    redis_offset_ms: int
    def __init__(
        self,
        slot: Slot,
        entries: dict[bytes, Entry],
        *,
        on_failure: Callable[[Lease, int, Entry, BaseException, bool], object],
        on_result: Callable[[Lease, int, Entry, Any], object],
        encode: Callable[[Any], bytes],
        result_max_bytes: int = 65536,
    ) -> None: ...
    @property
    def slot(self) -> Slot: ...
    @property
    def entries(self) -> dict[bytes, Entry]: ...
    def current(self) -> tuple[Lease, int, Entry] | None: ...
    def now_ms(self) -> int: ...
    def stopped(self) -> int: ...
    def run(self, leases: list[Lease], head: int, limit_ns: int) -> tuple[int, int, int]: ...
    def take(self, lease: Lease) -> tuple[int, bytes, bytes, bytes, bool]: ...
    def done(self, lease: Lease, index: int) -> None: ...
    def started(self, lease: Lease, index: int) -> None: ...
    def call(
        self,
        lease: Lease,
        index: int,
        entry: Entry,
        payload: bytes,
        *,
        timeout_ms: int,
        hard_ms: int,
        retries: int,
    ) -> None: ...
    def invoke(self, entry: Entry, args: Any) -> Any: ...
    @property
    def active(self) -> set[Any]: ...
    @property
    def ended(self) -> int: ...
    late: list[tuple[Any, Any, BaseException | None, bool]] | None
    def beside(
        self,
        *,
        slots: int,
        spawn: Callable[[Any], Any],
        limit: Callable[[Any], object],
        failed: Callable[[Any, BaseException, bool], object],
        changed: Callable[[], object],
        context: ContextVar[Any],
        ended: list[Lease],
    ) -> None: ...
    def start(
        self,
        lease: Lease,
        index: int,
        entry: Entry,
        payload: bytes,
        own: Any,
        *,
        timeout_ms: int,
        hard_ms: int,
        retries: int,
    ) -> AsyncJob: ...
    def leave(self, job: Any) -> None: ...
    def conclude(self, lease: Lease, index: int, entry: Entry, result: Any) -> None: ...

@final
class AsyncJob:
    """A job that runs as a coroutine, and is the coroutine that the event loop's task drives."""

    ending: str
    timer: Any
    @property
    def lease(self) -> Lease: ...
    @property
    def index(self) -> int: ...
    @property
    def entry(self) -> Entry: ...
    @property
    def own(self) -> Any: ...
    @property
    def task(self) -> Any: ...
    @property
    def timeout_ms(self) -> int: ...
    def __await__(self) -> Generator[Any, Any, Any]: ...
    def __iter__(self) -> AsyncJob: ...
    def __next__(self) -> Any: ...
    def send(self, value: Any) -> Any: ...
    def throw(self, kind: Any, value: Any = None, traceback: Any = None) -> Any: ...
    def close(self) -> None: ...
