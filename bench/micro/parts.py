"""The small parts that are measured, as functions that do them once: for the stopwatch and for counting.

`PARTS` names them. A part is set up anew where it is asked for; what the function returns is kept from
being optimised into nothing, and tells how many jobs one call stands for.

The engine is imported where a part is set up: what an old commit does not have yet costs a comparison one
part and not all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from tqe.codec import hot
    from tqe.registry import Task

FRAME: Final = 1_000
SINGLES: Final = 500
FEW: Final = 100
LANE: Final = "normal"
TYPE: Final = b"NOOP"
INCARNATION: Final = "W" * 26
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
    from tqe import codec

    return [
        codec.pack_same(TYPE, payloads(jobs), frame_id=frame_id(first + at), lane=LANE, tracked=True)
        for at in range(count)
    ]


# ------------------------------------------------------------------ codec


def pack_bulk() -> Callable[[], Any]:
    from tqe import codec

    bodies, fid = payloads(FRAME), frame_id(0)
    return lambda: codec.pack_same(TYPE, bodies, frame_id=fid, lane=LANE, tracked=True)


def pack_mixed() -> Callable[[], Any]:
    from tqe import codec

    jobs = [(TYPE, body, b"", False) for body in payloads(FRAME)]
    fid = frame_id(0)
    return lambda: codec.pack(jobs, frame_id=fid, lane=LANE, tracked=True)


def pack_one() -> Callable[[], Any]:
    from tqe import codec

    (body,), fid = payloads(1), frame_id(0)
    return lambda: codec.pack_same(TYPE, [body], frame_id=fid, lane=LANE, tracked=True)


def parse_bulk() -> Callable[[], Any]:
    from tqe import codec

    (frame,) = frames(1, FRAME)
    return lambda: codec.parse(frame)


def parse_one() -> Callable[[], Any]:
    from tqe import codec

    (frame,) = frames(1, 1)
    return lambda: codec.parse(frame)


def walk_bulk() -> Callable[[], Any]:
    from tqe import codec

    (frame,) = frames(1, FRAME)
    return lambda: codec.walk(frame)


def cut_in_two() -> Callable[[], Any]:
    from tqe import codec

    (frame,) = frames(1, FRAME)
    return lambda: codec.cut(frame, [(0, FRAME // 2), (FRAME // 2, FRAME // 2)])


# ------------------------------------------------------------------ dispatch


def _noop(to: str, n: int) -> None:
    pass


async def _noop_async(to: str, n: int) -> None:
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
        from tqe.board import layout
        from tqe.board.board import Board
        from tqe.codec import hot

        self.board = Board(1)
        self.view = self.board.slots[0]
        self.slot = hot.Slot(self.board.memory, layout.slot_offset(0))
        self.hot = hot
        entry = _entry(_task(func))
        self.entries = {entry.key: entry}
        self.runner = hot.Runner(
            self.slot,
            self.entries,
            on_failure=_never,
            on_result=_never,
            encode=msgspec.json.Encoder().encode,
        )
        self.runner.until_ns = FAR_NS

    def admit(self, found: list[bytes]) -> list[hot.Lease]:
        leases, _, odd = self.hot.admit(found, self.slot, {LANE: 0}, 1)
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


def _task(func: Callable[..., Any]) -> Task[..., Any]:
    from tqe.registry import Registry, Task, TaskOptions

    registry = Registry()
    registry.add(Task(TYPE.decode(), func, TaskOptions()))
    return next(iter(registry))


def _entry(task: Task[..., Any]) -> hot.Entry:
    from tqe.codec import hot

    return hot.Entry(
        name=task.name,
        number=0,
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


def dispatch_async() -> Callable[[], Any]:
    """Coroutines from the frame to the outcome, each driven to its end by hand: loops are not ours."""
    import contextvars

    started: list[Any] = []
    bench, found = Bench(_noop_async), frames(1, FRAME)
    bench.runner.beside(
        slots=FRAME,
        spawn=started.append,
        limit=_never,
        failed=_never,
        changed=lambda: None,
        context=contextvars.ContextVar("job"),
        ended=[],
    )

    def once() -> int:
        leases = bench.run(found)
        for job in started:
            try:
                job.send(None)
            except StopIteration:
                continue
            raise RuntimeError("a coroutine did not end")
        started.clear()
        bench.slot.close_rows(leases)
        return len(leases)

    return once


def hold() -> Callable[[], Any]:
    """Frames of one taken into a worker's hold and out again."""
    bench = Bench()
    leases = bench.run(frames(SINGLES, 1))
    held: dict[Any, None] = {}
    ready: list[list[Any]] = [[]]

    def once() -> int:
        ended: list[Any] = []
        bench.hot.hold_all(leases, held, ready, 1_000.0)
        bench.hot.start_all(ready[0], 0, len(leases), ended)
        held.clear()
        return len(ended) + len(bench.entries)  # the board must live as long as the leases

    return once


def floor() -> Callable[[], Any]:
    """What no dispatch can be below: decode the payload, call the function, in a bare loop."""
    decode, bodies = _task(_noop).decoder.decode, payloads(FRAME)

    def once() -> None:
        for body in bodies:
            s = decode(body)
            _noop(s.to, s.n)

    return once


# ------------------------------------------------------------------ messages


def settler() -> Callable[[list[hot.Lease]], list[Any]]:
    """What makes the calls of the script that settle leases that have ended."""
    from tqe.codec import hot
    from tqe.store import settling
    from tqe.store.keys import Keys

    keys = Keys()

    def calls(leases: list[hot.Lease]) -> list[Any]:
        batch = settling.SettleBatch()
        groups, others = hot.plain_done(leases)
        if others:
            raise RuntimeError("a lease is no plain one")
        for (second, char, value), done in groups.items():
            bucket = (second, char) if value else None
            batch.add_done(bucket, value, [lease.name for lease in done], done)
        return batch.calls(keys, INCARNATION, result_ttl_s=3_600, dlq_max=1_000)

    return calls


def settle(count: int, jobs: int) -> Callable[[], Callable[[], Any]]:
    """From leases that have ended to the call of the script."""

    def make() -> Callable[[], Any]:
        (bench, leases), calls = _ended(count, jobs), settler()

        def once() -> int:
            for lease in leases:
                lease.settling = False  # as if it were the first time
            # Named here so that the board, into which leases point, lives as long as they do.
            return len(calls(leases)) + len(bench.entries)

        return once

    return make


def _ended(count: int, jobs: int) -> tuple[Bench, list[hot.Lease]]:
    bench = Bench()
    leases = bench.run(frames(count, jobs))
    for lease in leases:
        # The real times are of two or three milliseconds, and each is a group of its own: chance again.
        lease.started_ms = lease.finished_ms = 1_700_000_000_000
    return bench, leases


def settle_command() -> Callable[[], Any]:
    """The same call as the bytes that go to Redis."""
    from tqe import codec

    bench, leases = _ended(SINGLES, 1)
    commands = [one.call.evalsha() for one in settler()(leases)]
    return lambda: [codec.pack_command(command) for command in commands] and bench


def outgoing(count: int, jobs: int, *, first: int = 0) -> list[Any]:
    """Packed frames with their snapshots, as `enqueue` takes them."""
    from tqe.job import new_snapshot
    from tqe.store.producing import Outgoing

    value = new_snapshot(jobs, LANE, f"{TYPE.decode()}*{jobs}")
    return [
        Outgoing(frame[4:30], jobs, frame, LANE, "0", value) for frame in frames(count, jobs, first=first)
    ]


def enqueue_message() -> Callable[[], Any]:
    """From packed frames of one to the call of the script."""
    from tqe.store import producing
    from tqe.store.keys import Keys

    sent, keys = outgoing(SINGLES, 1), Keys()
    return lambda: producing.enqueue_call(keys, sent)


def submission(jobs: int, *, alike: bool) -> Callable[[], Callable[[], Any]]:
    """A producer's way from Python's objects to the bytes that go to Redis: checked, encoded, packed."""

    def make() -> Callable[[], Any]:
        from tqe import codec
        from tqe.client.packing import Item, Maker, pack_lines, pack_one
        from tqe.client.payloads import PayloadEncoder
        from tqe.job import SubmitOptions
        from tqe.store import producing
        from tqe.store.keys import Keys

        encoder = PayloadEncoder(payload_max_bytes=1 << 20, zstd_threshold_bytes=1 << 10)
        making, task, keys, options = Maker(_Ids(), encoder), _task(_noop), Keys(), SubmitOptions(lane=LANE)
        objects = [msgspec.json.decode(payload) for payload in payloads(jobs)]
        name = TYPE.decode()

        def bulk() -> bytes:
            lines, _ = encoder.encode_lines(objects, task)
            parcels = pack_lines(name, lines, options, first=0, make=making)
            call, *_ = producing.enqueue_call(keys, [parcel.frame for parcel in parcels])
            return codec.pack_command(call.evalsha())

        def single() -> None:
            for one in objects:
                item = Item(0, name, encoder.encode(one, task), options)
                call, *_ = producing.enqueue_call(keys, (pack_one(item, making).frame,))
                codec.pack_command(call.evalsha())

        return bulk if alike else single

    return make


class _Ids:
    """One id for all."""

    def frame_id(self) -> bytes:
        return frame_id(0)


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
    "dispatch, coroutines": Part(dispatch_async, FRAME),
    "hold, frames of one": Part(hold, SINGLES),
    "settle, frames of one": Part(settle(SINGLES, 1), SINGLES),
    "settle, frames of one, as bytes": Part(settle_command, SINGLES),
    "enqueue, frames of one": Part(enqueue_message, SINGLES),
    "submit, 1000 alike": Part(submission(FRAME, alike=True), FRAME),
    "submit, one by one": Part(submission(FEW, alike=False), FEW),
}
