"""The small parts that are measured, as functions that do them once: for the stopwatch and for counting.

`PARTS` names them. A part is set up anew where it is asked for; what the function returns is kept from
being optimised into nothing, and tells how many jobs one call stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tqe import codec
from tqe.board import layout
from tqe.board.board import Board
from tqe.codec import hot
from tqe.job import new_snapshot
from tqe.registry import Registry, Task, TaskOptions
from tqe.store import producing, settling
from tqe.store.keys import Keys
from tqe.store.producing import Outgoing

FRAME: Final = 1_000
SINGLES: Final = 500
LANE: Final = "normal"
TYPE: Final = b"NOOP"
KEYS: Final = Keys()
FAR_NS: Final = 1 << 62  # a lease, or a time slice, without an end


@dataclass(frozen=True)
class Part:
    """`make()` sets up; what it gives does the work once, for `jobs` jobs."""

    make: Callable[[], Callable[[], Any]]
    jobs: int


def payloads(n: int) -> list[bytes]:
    return [
        msgspec.json.encode({"to": f"user{k}@mail.example.com", "n": k})
        for k in range(1_000_000, 1_000_000 + n)
    ]


def frame_id(number: int) -> bytes:
    """Ids of one moment and one bucket, the same each time: chance would blur what is counted."""
    return b"01JDQWEAAAA%013d00" % number


def frames(count: int, jobs: int, *, first: int = 0) -> list[bytes]:
    return [
        codec.pack_same(TYPE, payloads(jobs), frame_id=frame_id(first + at), lane=LANE, tracked=True)
        for at in range(count)
    ]


# ------------------------------------------------------------------ codec


def pack_bulk() -> Callable[[], Any]:
    bodies, fid = payloads(FRAME), frame_id(0)
    return lambda: codec.pack_same(TYPE, bodies, frame_id=fid, lane=LANE, tracked=True)


def pack_mixed() -> Callable[[], Any]:
    jobs = [(TYPE, body, b"", False) for body in payloads(FRAME)]
    fid = frame_id(0)
    return lambda: codec.pack(jobs, frame_id=fid, lane=LANE, tracked=True)


def pack_one() -> Callable[[], Any]:
    (body,), fid = payloads(1), frame_id(0)
    return lambda: codec.pack_same(TYPE, [body], frame_id=fid, lane=LANE, tracked=True)


def parse_bulk() -> Callable[[], Any]:
    (frame,) = frames(1, FRAME)
    return lambda: codec.parse(frame)


def parse_one() -> Callable[[], Any]:
    (frame,) = frames(1, 1)
    return lambda: codec.parse(frame)


def walk_bulk() -> Callable[[], Any]:
    (frame,) = frames(1, FRAME)
    return lambda: codec.walk(frame)


def cut_in_two() -> Callable[[], Any]:
    (frame,) = frames(1, FRAME)
    return lambda: codec.cut(frame, [(0, FRAME // 2), (FRAME // 2, FRAME // 2)])


# ------------------------------------------------------------------ dispatch


def _noop(to: str, n: int) -> None:
    pass


def _result(to: str, n: int) -> int:
    return n


def _kwargs(**given: Any) -> None:
    pass


class _Message(msgspec.Struct):
    to: str
    n: int


def _struct(message: _Message) -> None:
    pass


class Bench:
    """A worker's hot path without its loop: a slot of a board, the tasks, the runner."""

    def __init__(self, func: Callable[..., Any] = _noop) -> None:
        self.board = Board(1)
        self.view = self.board.slots[0]
        self.slot = hot.Slot(self.board.memory, layout.slot_offset(0))
        registry = Registry()
        registry.add(Task(TYPE.decode(), func, TaskOptions()))
        self.entries = {task.key: _entry(number, task) for number, task in enumerate(registry)}
        self.runner = hot.Runner(
            self.slot,
            self.entries,
            on_failure=_never,
            on_result=_never,
            encode=msgspec.json.Encoder().encode,
        )
        self.runner.until_ns = FAR_NS

    def admit(self, found: list[bytes]) -> list[hot.Lease]:
        leases, _, odd = hot.admit(found, self.slot, {LANE: 0}, 1)
        if odd:
            raise RuntimeError("a frame was refused")
        return leases

    def run(self, found: list[bytes]) -> list[hot.Lease]:
        leases = self.admit(found)
        self.runner.run(leases, 0, FAR_NS)
        return leases

    def run_and_forget(self, found: list[bytes]) -> int:
        leases = self.run(found)
        self.slot.close_rows(leases)
        return len(leases)


def _never(*_: Any) -> None:
    raise RuntimeError("a job did not end as it should")


def _entry(number: int, task: Task[..., Any]) -> hot.Entry:
    return hot.Entry(
        name=task.name,
        number=number,
        func=task.func,
        decode=task.decoder.decode,
        positional=task.positional,
        keyword_only=task.keyword_only,
        mode=hot.MODES[task.mode],
        is_async=task.is_async,
    )


def dispatch(func: Callable[..., Any], count: int, jobs: int) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        bench, found = Bench(func), frames(count, jobs)
        return lambda: bench.run_and_forget(found)

    return make


def dispatch_results() -> Callable[[], Any]:
    """Results are written to the outcome area, which is given free again each time."""
    bench, found = Bench(_result), frames(1, FRAME)

    def once() -> int:
        leases = bench.run(found)
        half = bench.slot.begin_settle([lease.row for lease in leases])
        bench.slot.end_settle(half)
        bench.slot.close_rows(leases)
        return len(leases)

    return once


def floor() -> Callable[[], Any]:
    """What no dispatch can be below: decode the payload, call the function, in a bare loop."""
    decode, bodies = Task(TYPE.decode(), _noop, TaskOptions()).decoder.decode, payloads(FRAME)

    def once() -> None:
        for body in bodies:
            s = decode(body)
            _noop(s.to, s.n)

    return once


# ------------------------------------------------------------------ messages


def settle(count: int, jobs: int) -> Callable[[], Callable[[], Any]]:
    """From leases that have ended to the call of the script."""

    def make() -> Callable[[], Any]:
        bench = Bench()
        leases = bench.run(frames(count, jobs))
        for lease in leases:
            # The real times are of two or three milliseconds, and each is a group of its own: chance again.
            lease.started_ms = lease.finished_ms = 1_700_000_000_000

        def once() -> int:
            for lease in leases:
                lease.settling = False  # as if it were the first time
            batch = settling.SettleBatch()
            groups, others = hot.plain_done(leases)
            for (second, char, value), done in groups.items():
                bucket = (second, char) if value else None
                batch.add_done(bucket, value, [lease.name for lease in done], done)
            calls = batch.calls(KEYS, "W" * 26, result_ttl_s=3_600, dlq_max=1_000)
            # Named here so that the board, into which leases point, lives as long as they do.
            return len(calls) + len(others) + len(bench.entries)

        return once

    return make


def enqueue_message() -> Callable[[], Any]:
    """From packed frames of one to the call of the script."""
    outgoing = [
        Outgoing(frame[4:30], 1, frame, LANE, "0", new_snapshot(1, LANE, "NOOP*1"))
        for frame in frames(SINGLES, 1)
    ]
    return lambda: producing.enqueue_call(KEYS, outgoing)


PARTS: Final[dict[str, Part]] = {
    "codec.pack, 1000 alike": Part(pack_bulk, FRAME),
    "codec.pack, 1000 that differ": Part(pack_mixed, FRAME),
    "codec.pack, one": Part(pack_one, 1),
    "codec.parse, 1000": Part(parse_bulk, FRAME),
    "codec.parse, one": Part(parse_one, 1),
    "codec.walk, 1000": Part(walk_bulk, FRAME),
    "codec.cut, 1000 in two": Part(cut_in_two, FRAME),
    "floor: decode and call": Part(floor, FRAME),
    "dispatch, frame of 1000": Part(dispatch(_noop, 1, FRAME), FRAME),
    "dispatch, frames of one": Part(dispatch(_noop, SINGLES, 1), SINGLES),
    "dispatch, struct": Part(dispatch(_struct, 1, FRAME), FRAME),
    "dispatch, keywords": Part(dispatch(_kwargs, 1, FRAME), FRAME),
    "dispatch, with result": Part(dispatch_results, FRAME),
    "settle, frames of one": Part(settle(SINGLES, 1), SINGLES),
    "enqueue, frames of one": Part(enqueue_message, SINGLES),
}
