"""Owns what a job is outside of Redis: its id, the options of its submission, its record and its status."""

import hashlib
import math
import os
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import groupby
from typing import Any, Final, TypedDict

import msgspec

from tqe import clock
from tqe.errors import InvalidOption, UnknownLane
from tqe.formats import (
    FRAME_ID_CHARS,
    FRAME_JOBS_MAX,
    ID_RANDOM_CHARS,
    ID_TIME_CHARS,
    IDEMPOTENCY_KEY_BYTES_MAX,
    IDEMPOTENCY_KEY_PLAIN_BYTES_MAX,
)

# ------------------------------------------------------------------ ids

ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32: no I, L, O, U
SHARD: Final = "00"

# An id maker keeps its bucket character for so many ids: one bulk submission touches few snapshot buckets,
# and no bucket grows beyond a few thousand fields (the expiry of a hash of millions stops Redis for seconds).
BUCKET_IDS_MAX: Final = 512

_PAIRS: Final = [a + b for a in ALPHABET for b in ALPHABET]
_TAIL_BITS: Final = 5 * (ID_RANDOM_CHARS - 1)  # the random part without the bucket character
_LOW_BITS: Final = 20  # the last four characters: what counting up within a millisecond mostly changes
_HIGH_SHIFTS: Final = range(_TAIL_BITS - 15, _LOW_BITS - 1, -10)
_DIGITS: Final = str.maketrans(ALPHABET, "0123456789abcdefghijklmnopqrstuv")
_FRAME_ID: Final = re.compile(f"[{ALPHABET}]{{{FRAME_ID_CHARS}}}")
_JOB_ID: Final = re.compile(rf"([{ALPHABET}]{{{FRAME_ID_CHARS}}})\.(0|[1-9][0-9]{{0,2}})")
_TYPE_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")

_makers: "weakref.WeakSet[IdMaker]" = weakref.WeakSet()


class IdMaker:
    """Makes frame ids, and incarnations, which have the same form: unique, and increasing within one maker.

    Within a millisecond, and while the clock stands behind an id that was already given, the random part
    counts up. A fork makes the child begin anew, or both processes would count on from the same id.
    """

    def __init__(self, time: clock.Clock = clock.SYSTEM) -> None:
        self._time = time
        self._begin()
        _makers.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # a new one: the parent's may have been held during the fork
        self._last_ms = -1
        self._tail = 0
        self._prefix = ""
        self._high = -1  # the upper bits of the tail for which `_head` was made, -1: for none
        self._head = ""
        self._bucket = -1
        self._bucket_left = 0

    def frame_id(self) -> bytes:
        with self._lock:
            now_ms = self._time.wall_ms()
            if now_ms > self._last_ms:
                self._step_to(now_ms)
                self._bucket_left = self._bucket_left or self._turn_bucket()
            else:
                self._tail += 1
                if self._bucket_left == 0:
                    before = self._bucket
                    self._bucket_left = self._turn_bucket()
                    if self._bucket <= before:
                        # The character stands before the counter: without this step the order would break.
                        self._step_to(self._last_ms + 1)
            self._bucket_left -= 1
            tail = self._tail
            if tail >> _LOW_BITS != self._high:
                self._make_head()
            head = self._head
        return f"{head}{_PAIRS[(tail >> 10) & 1023]}{_PAIRS[tail & 1023]}{SHARD}".encode()

    def _make_head(self) -> None:
        """All of an id but its last characters."""
        tail = self._tail
        self._high = tail >> _LOW_BITS
        pairs = "".join(_PAIRS[(tail >> shift) & 1023] for shift in _HIGH_SHIFTS)
        self._head = f"{self._prefix}{ALPHABET[self._bucket]}{ALPHABET[tail >> (_TAIL_BITS - 5)]}{pairs}"

    def _step_to(self, now_ms: int) -> None:
        self._last_ms = now_ms
        self._high = -1
        # One bit more than these 64 is free, so that counting up never overflows into the bucket character.
        self._tail = int.from_bytes(os.urandom(8))
        self._prefix = "".join(_PAIRS[(now_ms >> shift) & 1023] for shift in range(40, -1, -10))

    def _turn_bucket(self) -> int:
        self._high = -1
        self._bucket = os.urandom(1)[0] % 32
        return BUCKET_IDS_MAX


def _begin_in_child() -> None:
    for maker in list(_makers):
        maker._begin()


os.register_at_fork(after_in_child=_begin_in_child)

IDS: Final = IdMaker()


def id_time_ms(frame_id: bytes | str) -> int:
    """Milliseconds since 1970 at which the id was made, by the clock of its maker."""
    text = frame_id if isinstance(frame_id, str) else frame_id.decode("ascii")
    return int(text[:ID_TIME_CHARS].translate(_DIGITS), 32)


def bucket_of(frame_id: bytes | str) -> tuple[int, str]:
    """(second, bucket character): which snapshot bucket holds the frame."""
    text = frame_id if isinstance(frame_id, str) else frame_id.decode("ascii")
    return id_time_ms(text) // 1000, text[ID_TIME_CHARS]


def is_frame_id(text: str) -> bool:
    return _FRAME_ID.fullmatch(text) is not None


def job_id(frame_id: bytes | str, index: int) -> str:
    return f"{frame_id if isinstance(frame_id, str) else frame_id.decode('ascii')}.{index}"


def split_job_id(text: str) -> tuple[bytes, int]:
    """(frame id, index); ValueError when the text is no job id."""
    found = _JOB_ID.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:64]!r} is not a job id: it should be 26 characters, a dot and an index")
    return found[1].encode(), int(found[2])


def is_job_id(text: str) -> bool:
    return _JOB_ID.fullmatch(text) is not None


def is_type_name(text: str) -> bool:
    return _TYPE_NAME.fullmatch(text) is not None


# ------------------------------------------------------------------ options of a submission

TIME_MS_MAX: Final = 10 * 365 * 86_400_000  # what lies ten years away is a mistake, such as a wrong unit
RETRIES_MAX: Final = 1_000
Span = float | timedelta  # seconds


class Options(TypedDict, total=False):
    """Options of one submission, as callers give them by name; None is the same as not given."""

    priority: str | None
    lane: str | None  # another name of priority
    delay: Span | None
    run_at: datetime | float | None  # with a time zone, or seconds since 1970
    timeout: Span | None
    max_retries: int | None
    expires: datetime | Span | None
    idempotency_key: str | None
    track: bool | None


OPTION_NAMES: Final = tuple(Options.__annotations__)
# How the same options are spelt in NDJSON lines and REST bodies.
OUTWARD_NAMES: Final[Mapping[str, str]] = {
    "runAt": "run_at",
    "maxRetries": "max_retries",
    "idempotencyKey": "idempotency_key",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """One submission's options, checked. 0, None and "" mean: not given."""

    lane: str
    due: str = "0"  # as `enqueue` takes it: 0 now, +<ms> from now, =<ms since 1970>
    delay_ms: int = 0  # from now to the due time, by our clock; how much longer a key must be held
    expires_ms: int = 0  # ms since 1970
    timeout_ms: int = 0
    max_retries: int | None = None
    key: str | None = None
    track: bool = True
    trace: tuple[tuple[str, str], ...] = ()  # of who submits, for a tracer in the worker

    def limits(self) -> bytes:
        """What workers must know, as JSON for the header of a frame or the entry of a job."""
        found: dict[str, Any] = {}
        if self.timeout_ms:
            found["timeout_ms"] = self.timeout_ms
        if self.max_retries is not None:
            found["max_retries"] = self.max_retries
        if self.expires_ms:
            found["expires_ms"] = self.expires_ms
        if self.trace:
            found["trace"] = dict(self.trace)
        return msgspec.json.encode(found) if found else b""


def submit_options(
    given: Mapping[str, Any], *, lanes: Sequence[str], default_lane: str, now_ms: int
) -> SubmitOptions:
    """Check what a caller gave by name; `now_ms` is the wall clock. Raises InvalidOption, UnknownLane."""
    for name in given:
        if name not in OPTION_NAMES:
            raise InvalidOption(f"{name} is not an option; there are: {', '.join(OPTION_NAMES)}")
    due, delay_ms = _due(given.get("delay"), given.get("run_at"), now_ms)
    expires_ms = _expires(given.get("expires"), now_ms)
    if expires_ms and expires_ms <= now_ms + delay_ms:
        raise InvalidOption("expires lies before the job is due: it could never run")
    timeout, key, track = given.get("timeout"), given.get("idempotency_key"), given.get("track")
    if track is not None and not isinstance(track, bool):
        raise InvalidOption(f"track takes true or false, not {track!r}")
    return SubmitOptions(
        lane=lane_name(given, lanes=lanes, default_lane=default_lane),
        due=due,
        delay_ms=delay_ms,
        expires_ms=expires_ms,
        timeout_ms=0 if timeout is None else timeout_to_ms(timeout),
        max_retries=check_retries(given.get("max_retries")),
        key=None if key is None else check_key(key),
        track=track is not False,
    )


def lane_name(given: Mapping[str, Any], *, lanes: Sequence[str], default_lane: str) -> str:
    """`priority` and `lane` mean the same; case does not matter outside of the engine."""
    lane, priority = given.get("lane"), given.get("priority")
    if lane is not None and priority is not None and lane != priority:
        raise InvalidOption("priority and lane are two names of one option: give one of them")
    name = priority if lane is None else lane
    if name is None:
        return default_lane
    if not isinstance(name, str):
        raise InvalidOption(f"priority takes the name of a lane, not {_shown(name)}")
    if name.lower() not in lanes:
        raise UnknownLane(name, lanes)
    return name.lower()


def seconds_to_ms(name: str, value: object) -> int:
    """A span given as a number of seconds or a timedelta, in whole milliseconds, rounded up."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidOption(f"{name} takes a number of seconds or a timedelta, not {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidOption(f"{name} takes a finite number of seconds, not {value}")
    if value < 0:
        raise InvalidOption(f"{name} is negative: {_shown(value)} seconds")
    if value * 1000 > TIME_MS_MAX:
        raise InvalidOption(f"{name} is more than ten years: {_shown(value)} seconds")
    return math.ceil(value * 1000)


def timeout_to_ms(value: object) -> int:
    span_ms = seconds_to_ms("timeout", value)
    if span_ms == 0:
        raise InvalidOption("timeout is 0: leave it out for no limit")
    return span_ms


def check_retries(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= RETRIES_MAX:
        raise InvalidOption(f"max_retries takes a whole number from 0 to {RETRIES_MAX}, not {_shown(value)}")
    return value


def check_key(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidOption(f"idempotency_key takes a text, not {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as e:
        raise InvalidOption("idempotency_key is not valid Unicode") from e
    if not 1 <= size <= IDEMPOTENCY_KEY_BYTES_MAX:
        raise InvalidOption(f"idempotency_key takes 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes, not {size}")
    return value


def _due(delay: object, run_at: object, now_ms: int) -> tuple[str, int]:
    if delay is not None and run_at is not None:
        raise InvalidOption("delay and run_at exclude each other")
    if delay is not None:
        delay_ms = seconds_to_ms("delay", delay)
        return (f"+{delay_ms}" if delay_ms else "0"), delay_ms
    if run_at is not None:
        at_ms = _instant_ms("run_at", run_at, now_ms)
        return (f"={at_ms}", at_ms - now_ms) if at_ms > now_ms else ("0", 0)
    return "0", 0


def _expires(value: object, now_ms: int) -> int:
    if value is None:
        return 0
    if isinstance(value, datetime):
        return _instant_ms("expires", value, now_ms)
    span_ms = seconds_to_ms("expires", value)
    if span_ms == 0:
        raise InvalidOption("expires is 0: the job could never run")
    return now_ms + span_ms


def _instant_ms(name: str, value: object, now_ms: int) -> int:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise InvalidOption(f"{name} takes a datetime with a time zone; {value.isoformat()} has none")
        value = value.timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidOption(
            f"{name} takes a datetime with a time zone or seconds since 1970, not {_shown(value)}"
        )
    if abs(value * 1000 - now_ms) > TIME_MS_MAX:
        raise InvalidOption(f"{name} is more than ten years away: {_shown(value)}")
    return math.ceil(value * 1000)


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # Python prints no integers of more than 4,300 digits
        return "a huge number"


# ------------------------------------------------------------------ idempotency


def stored_key(key: str) -> str:
    """The key as it stands in Redis: hashed when it is long. Plain ones are shorter, so they never meet."""
    raw = key.encode()
    if len(raw) <= IDEMPOTENCY_KEY_PLAIN_BYTES_MAX:
        return key
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def request_hash(type_name: str, lane: str, canonical: bytes) -> str:
    """16 hex digits that tell one request from another; `canonical` is the payload with sorted keys."""
    return hashlib.sha256(b"\0".join((type_name.encode(), lane.encode(), canonical))).hexdigest()[:16]


# ------------------------------------------------------------------ the record in Redis

QUEUED, RETRYING, COMPLETED, DEAD, CANCELLED, EXPIRED, DAMAGED = "Q", "R", "C", "D", "X", "E", "B"
TERMINAL: Final = frozenset({COMPLETED, DEAD, CANCELLED, EXPIRED, DAMAGED})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What Redis keeps of a frame: one state for all of its jobs, or one character a job once they differ."""

    states: str
    total: int
    due_ms: int
    started_ms: int
    finished_ms: int
    lane: str
    types: str

    @classmethod
    def parse(cls, value: bytes) -> "Snapshot":
        """ValueError when the value has another shape."""
        states, total, due, started, finished, lane, types = value.decode().split(",", 6)
        snapshot = cls(states, int(total), int(due), int(started), int(finished), lane, types)
        if not 1 <= snapshot.total <= FRAME_JOBS_MAX or len(states) not in (1, snapshot.total):
            raise ValueError(f"a record of {snapshot.total} jobs with {len(states)} states")
        return snapshot

    def make(self) -> bytes:
        return (
            f"{self.states},{self.total},{self.due_ms},{self.started_ms},{self.finished_ms},"
            f"{self.lane},{self.types}"
        ).encode()

    def state_of(self, index: int) -> str:
        return self.states if len(self.states) == 1 else self.states[index]

    def type_of(self, index: int) -> str:
        for run in self.types.split(";"):
            name, _, count = run.rpartition("*")
            index -= int(count)
            if index < 0:
                return name
        return ""


def types_run_length(types: Sequence[str]) -> str:
    """`EMAIL*2;SMS*1`: what each job of a frame is, for readers that no longer have the frame."""
    if types.count(types[0]) == len(types):
        return f"{types[0]}*{len(types)}"
    return ";".join(f"{name}*{sum(1 for _ in run)}" for name, run in groupby(types))


@lru_cache(maxsize=256)
def new_snapshot(total: int, lane: str, types: str) -> bytes:
    """The record of a frame that is being submitted; `enqueue` fills in its due time."""
    return Snapshot(QUEUED, total, 0, 0, 0, lane, types).make()


# ------------------------------------------------------------------ status

STATUSES: Final = (
    "scheduled",
    "queued",
    "running",
    "retrying",
    "completed",
    "dead",
    "cancelled",
    "unknown",
)
_ENDED: Final = {
    COMPLETED: "completed",
    DEAD: "dead",
    CANCELLED: "cancelled",
    EXPIRED: "cancelled",
    DAMAGED: "dead",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """One job as its record tells it. Times of a job without a record of its own are those of its frame.

    `attempts` counts runs: those that failed, and the one that runs or has succeeded.
    """

    id: str
    status: str
    type: str | None = None
    lane: str | None = None
    attempts: int = 0
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    result: Any = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "dead", "cancelled")

    def as_dict(self) -> dict[str, Any]:
        """The shape of `tqe job --json`: times as ISO 8601 in UTC."""
        return {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "lane": self.lane,
            "attempts": self.attempts,
            "submitted_at": to_iso(self.submitted_at),
            "started_at": to_iso(self.started_at),
            "finished_at": to_iso(self.finished_at),
            "result": self.result,
            "error": self.error,
        }


def job_status(
    frame_id: bytes,
    index: int,
    *,
    snapshot: Snapshot | None,
    own: Mapping[str, Any],
    running_since_ms: int | None,
    cancel_requested: bool,
    now_ms: int,
) -> JobStatus:
    """Derive the state: `own` is the job's own record, `running_since_ms` what a steward published of it."""
    name = job_id(frame_id, index)
    if snapshot is None or index >= snapshot.total:
        return JobStatus(id=name, status="unknown")
    state = snapshot.state_of(index)
    due_ms = int(own.get("due_ms") or snapshot.due_ms)
    started_ms = int(own.get("started_at") or snapshot.started_ms)
    finished_ms = int(own.get("finished_at") or snapshot.finished_ms)
    attempts = int(own.get("attempts") or 0)
    error = error_text(own.get("error"))
    if state in _ENDED:
        status = _ENDED[state]
        attempts = attempts or int(state == COMPLETED)
        error = error or own.get("reason") or _ENDED_WHY.get(state)
    else:
        finished_ms = 0
        if running_since_ms is not None:
            status, started_ms, attempts = "running", running_since_ms, attempts + 1
        elif due_ms > now_ms:
            status = "retrying" if state == RETRYING else "scheduled"
        elif state == RETRYING and due_ms == 0:
            status = "retrying"
        else:
            status = "queued"
        if cancel_requested:
            error = error or "cancellation requested"
    return JobStatus(
        id=name,
        status=status,
        type=snapshot.type_of(index) or None,
        lane=snapshot.lane,
        attempts=attempts,
        submitted_at=to_datetime(id_time_ms(frame_id)),
        started_at=to_datetime(started_ms),
        finished_at=to_datetime(finished_ms),
        result=own.get("result"),
        error=error,
    )


def error_text(error: Any) -> str | None:
    """The words of an error as a settle recorded it: an object with `message`, perhaps more."""
    if isinstance(error, Mapping):
        error = error.get("traceback") or error.get("message") or error.get("reason")
    return None if error is None else str(error)


_ENDED_WHY: Final = {
    EXPIRED: "expired before it was started",
    DAMAGED: "its frame was damaged in Redis and is kept in quarantine",
}


def to_datetime(ms: int) -> datetime | None:
    return datetime.fromtimestamp(ms / 1000, UTC) if ms else None


def to_iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
