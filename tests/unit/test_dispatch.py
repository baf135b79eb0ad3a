"""The hot path: what it runs, what it leaves to Python, and what stands on the board meanwhile and after."""

import asyncio
import contextvars
import gc
import importlib.util
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import msgspec
import pytest

import tqe
from tests.support.hotpath import BACKENDS, FOREVER, NAMES, T0_US, Rig, frame, frame_id, job
from tests.support.waiting import await_until
from tqe import codec
from tqe.board import layout
from tqe.codec import hot
from tqe.errors import DamagedFrame, JobCancelled, NewerFrame, SoftTimeLimit
from tqe.job import bucket_of

SECOND = 10**9


@pytest.fixture(params=BACKENDS, ids=NAMES)
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def run_all(runner: hot.Runner, *leases: hot.Lease) -> tuple[int, int, int]:
    return runner.run(list(leases), 0, 60 * SECOND)


# --- arguments ---


def test_arguments_by_position_and_by_keyword(rig: Rig) -> None:
    got: list[Any] = []

    def task(a: int, b: str = "b", *, c: list[int], d: float = 0.5) -> None:
        got.append((a, b, c, d))

    rig.task(task)
    lease = rig.lease([
        job(payload=b'{"a":1,"b":"x","c":[1,2],"d":2.5}'),
        job(payload=b'{"c":[],"a":2}'),
    ])  # fmt: skip
    assert run_all(rig.runner(), lease) == (hot.RUN_ENDED, 1, 2)
    assert got == [(1, "x", [1, 2], 2.5), (2, "b", [], 0.5)]
    assert rig.states(lease) == "22"


def test_no_arguments_and_many(rig: Rig) -> None:
    names = [f"p{k}" for k in range(64)]
    got: list[Any] = []
    space: dict[str, Any] = {"got": got}
    exec(f"def many({', '.join(names)}): got.append([{', '.join(names)}])", space)
    rig.task(lambda: got.append("none"), "NONE")
    rig.task(space["many"], "MANY")
    payload = json.dumps({name: k for k, name in enumerate(names)}).encode()
    run_all(rig.runner(), rig.lease([job("NONE"), job("MANY", payload)]))
    assert got == ["none", list(range(64))]


class Mail(msgspec.Struct):
    to: str
    body: msgspec.Raw = msgspec.Raw(b"null")


def test_a_struct_is_the_one_argument(rig: Rig) -> None:
    got: list[Any] = []

    def task(mail: Mail) -> None:
        got.append(mail)

    rig.task(task)
    run_all(rig.runner(), rig.lease([job(payload=b'{"to":"a@example.com"}')]))
    assert [mail.to for mail in got] == ["a@example.com"]


def test_a_struct_may_keep_raw_bytes_longer_than_its_frame_lives(rig: Rig) -> None:
    """msgspec.Raw points into what it was decoded from: a view of a frame that is gone would be garbage."""
    kept: list[Mail] = []

    def task(mail: Mail) -> None:
        kept.append(mail)

    rig.task(task)
    body = b'"' + b"x" * 3_000 + b'"'
    run_all(rig.runner(), rig.lease([job(payload=b'{"to":"a","body":' + body + b"}")]))
    gc.collect()
    junk = [bytes([65 + k % 26]) * 3_100 for k in range(500)]
    assert bytes(kept[0].body) == body, len(junk)


def test_kwargs_take_what_comes(rig: Rig) -> None:
    got: list[Any] = []

    def task(a: int, **rest: Any) -> None:
        got.append((a, rest))

    rig.task(task)
    run_all(rig.runner(), rig.lease([job(payload=b'{"a":1,"x":[null],"y":"z"}')]))
    assert got == [(1, {"x": [None], "y": "z"})]


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a":"text"}', b'{"a":1,"z":2}', b"{}", b"[1]", b"null", b"", b"{", b'{"a":1}x', b'{"a":1e999}',
        b'{"b":"\xff"}', b"\x00" * 50, b'{"b":' + b"[" * 5_000,
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_told_apart_from_failures(rig: Rig, payload: bytes) -> None:
    called: list[int] = []

    def task(a: int, b: Any = None) -> None:
        called.append(a)

    rig.task(task)
    lease = rig.lease([job(payload=payload), job(payload=b'{"a":2}')])
    assert run_all(rig.runner(), lease) == (hot.RUN_ENDED, 1, 2)
    ((index, name, error, in_arguments),) = rig.failures
    assert (index, name, in_arguments) == (0, "A", True)
    assert isinstance(error, Exception)
    assert called == [2]
    assert rig.states(lease) == "32"


def test_a_limit_that_strikes_while_arguments_are_decoded_is_no_fault_of_theirs(rig: Rig) -> None:
    def decode(payload: bytes) -> Any:
        raise SoftTimeLimit

    rig.task(lambda: None, decode=decode)
    run_all(rig.runner(), rig.lease())
    ((_, _, error, in_arguments),) = rig.failures
    assert isinstance(error, SoftTimeLimit)
    assert not in_arguments
    assert rig.word(layout.C_IN_USER) == 0


# --- failures ---


@pytest.mark.parametrize(
    "kind",
    [
        ValueError, Exception, BaseException, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError,
        RecursionError, StopIteration, StopAsyncIteration, asyncio.CancelledError, SoftTimeLimit,
        JobCancelled,
    ],
)  # fmt: skip
def test_nothing_that_a_task_raises_leaves_run(rig: Rig, kind: type[BaseException]) -> None:
    def task(k: int) -> None:
        if k == 1:
            raise kind()

    rig.task(task)
    lease = rig.lease([job(payload=b'{"k":%d}' % k) for k in range(3)])
    assert run_all(rig.runner(), lease) == (hot.RUN_ENDED, 1, 3)
    ((index, name, error, in_arguments),) = rig.failures
    assert (index, name, type(error), in_arguments) == (1, "A", kind, False)
    assert error.__traceback__ is not None
    assert rig.states(lease) == "232"
    assert rig.records() == [(lease.row, 1, layout.OUT_RETRY, b'"failed"', b"")]


def test_a_failure_is_reported_outside_of_user_code(rig: Rig) -> None:
    """Or a limit signal would strike our own code, and a death then be charged to the job."""
    seen: list[tuple[int, str]] = []

    def on_failure(lease: hot.Lease, index: int, *_: Any) -> None:
        seen.append((rig.word(layout.C_IN_USER), rig.states(lease)))

    def task() -> None:
        raise ValueError

    rig.task(task)
    run_all(rig.runner(on_failure=on_failure), rig.lease())
    assert seen == [(0, "1")]


def test_an_error_of_our_own_leaves_run_with_everything_tidy(rig: Rig) -> None:
    def on_failure(*_: Any) -> None:
        raise MemoryError("the outcome half is full")

    def task() -> None:
        raise ValueError

    rig.task(task)
    runner = rig.runner(on_failure=on_failure)
    lease = rig.lease(3)
    with pytest.raises(MemoryError):
        run_all(runner, lease)
    assert runner.current() is None
    assert (rig.word(layout.C_IN_USER), rig.states(lease), lease.next) == (0, "100", 1)


# --- results ---


def test_results_are_recorded(rig: Rig) -> None:
    results = [None, 0, False, "", {"a": [1.5]}, "é"]
    rig.task(lambda k: results[k])
    lease = rig.lease([job(payload=b'{"k":%d}' % k) for k in range(6)])
    runner = rig.runner()
    runner.redis_offset_ms = 1_000_000_000_000
    before = runner.now_ms()
    run_all(runner, lease)
    assert rig.states(lease) == "233333"
    assert [
        (index, status, error, json.loads(result)) for _, index, status, error, result in rig.records()
    ] == [(k, layout.OUT_DONE, b"", results[k]) for k in range(1, 6)]
    for _, record in rig.view.records(0):
        assert before <= record.started_ms <= record.finished_ms <= runner.now_ms()


def test_results_of_untracked_jobs_are_dropped(rig: Rig) -> None:
    rig.task(lambda: "a result")
    lease = rig.lease(2, tracked=False)
    run_all(rig.runner(), lease)
    assert (rig.states(lease), rig.records(), rig.odd_results) == ("22", [], [])


@pytest.mark.parametrize(("size", "odd"), [(98, False), (99, True)])
def test_a_result_above_the_limit_goes_to_python(rig: Rig, size: int, odd: bool) -> None:
    rig.task(lambda: "x" * size)
    lease = rig.lease(2)
    assert run_all(rig.runner(result_max_bytes=100), lease) == (hot.RUN_ENDED, 1, 2)
    assert rig.odd_results == ([(0, "x" * size), (1, "x" * size)] if odd else [])
    assert rig.states(lease) == "33"


def test_no_setting_lifts_the_ceiling_of_results(rig: Rig) -> None:
    rig.task(lambda: "x" * 65_535)
    run_all(rig.runner(result_max_bytes=1 << 20), rig.lease())
    assert len(rig.odd_results) == 1


@pytest.mark.parametrize("result", [object(), {1: {2}, "x": object()}, float, "\ud800"])
def test_a_result_that_is_no_json_goes_to_python(rig: Rig, result: Any) -> None:
    rig.task(lambda: result)
    lease = rig.lease(2)
    assert run_all(rig.runner(), lease) == (hot.RUN_ENDED, 1, 2)
    assert rig.odd_results == [(0, result), (1, result)]
    assert rig.failures == []


# --- what ends a walk ---


def test_the_stop_word_is_seen_before_the_next_job(rig: Rig) -> None:
    """Also by tiny jobs, whose clock is read only once in 32."""

    def task(k: int) -> None:
        if k == 40:
            rig.view.set(layout.C_STOP, layout.STOP_DRAIN)

    entry = rig.task(task)
    lease = rig.lease([job(payload=b'{"k":%d}' % k) for k in range(100)])
    runner = rig.runner()
    entry.seen, entry.mean_ns = 1_000, 1.0
    assert runner.stopped() == layout.STOP_NONE
    assert run_all(runner, lease) == (hot.RUN_STOP, 0, 41)
    assert runner.stopped() == layout.STOP_DRAIN
    assert rig.states(lease) == "2" * 41 + "0" * 59
    assert (lease.next, lease.stop) == (41, 100)
    assert run_all(runner, lease) == (hot.RUN_STOP, 0, 0)
    rig.view.set(layout.C_STOP, layout.STOP_NONE)
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 59)


def test_nothing_starts_after_the_end_of_the_lease(rig: Rig) -> None:
    rig.task(lambda: None)
    runner = rig.runner()
    lease = rig.lease(3)
    runner.until_ns = 1
    assert run_all(runner, lease) == (hot.RUN_LEASE_END, 0, 0)
    assert (rig.states(lease), lease.started_ms) == ("000", 0)


@pytest.mark.parametrize(("seen", "most"), [(0, 1), (1_000, 32)])
def test_the_lease_may_end_during_a_walk(rig: Rig, seen: int, most: int) -> None:
    def task(k: int) -> None:
        if k == 0:
            runner.until_ns = 1

    entry = rig.task(task)
    runner = rig.runner()
    entry.seen, entry.mean_ns = seen, 1.0
    lease = rig.lease([job(payload=b'{"k":%d}' % k) for k in range(100)])
    assert run_all(runner, lease) == (hot.RUN_LEASE_END, 0, most)


def test_jobs_of_alternating_types_look_at_the_clock_too(rig: Rig) -> None:
    def end() -> None:
        runner.until_ns = 1

    first, second = rig.task(end, "A"), rig.task(lambda: None, "B")
    runner = rig.runner()
    for entry in (first, second):
        entry.seen, entry.mean_ns = 1_000, 1.0
    lease = rig.lease([job("AB"[k % 2]) for k in range(100)])
    assert run_all(runner, lease) == (hot.RUN_LEASE_END, 0, 1)
    runner.until_ns = FOREVER
    lease = rig.lease([job("BA"[k % 2]) for k in range(100)])
    code, at, jobs = runner.run([lease], 0, 0)
    assert (code, at, jobs) == (hot.RUN_TIME, 0, 1)


def test_the_time_given_is_kept_by_jobs_that_are_not_known_to_be_short(rig: Rig) -> None:
    entry = rig.task(lambda: None)
    runner = rig.runner()
    lease = rig.lease(100)
    assert runner.run([lease], 0, 0) == (hot.RUN_TIME, 0, 1)
    entry.seen, entry.mean_ns = 1_000, 1e6
    assert runner.run([lease], 0, 0) == (hot.RUN_TIME, 0, 1)
    entry.seen, entry.mean_ns = 1_000, 1.0
    assert runner.run([lease], 0, 0) == (hot.RUN_TIME, 0, 32)
    assert rig.states(lease) == "2" * 34 + "0" * 66


def test_no_job_starts_without_room_for_its_outcome(rig: Rig) -> None:
    rig.task(lambda: "x" * 60_000)
    runner = rig.runner()
    lease = rig.lease(100)
    code, at, jobs = run_all(runner, lease)
    assert (code, at) == (hot.RUN_FULL, 0)
    assert jobs == len(rig.records()) == 8
    assert rig.slot.room() < layout.ROOM_BYTES
    assert run_all(runner, lease) == (hot.RUN_FULL, 0, 0)
    assert rig.states(lease) == "3" * 8 + "0" * 92
    rig.slot.reset_halves()
    assert run_all(runner, lease)[2] == 8


@pytest.mark.parametrize(
    "odd",
    [
        job(zstd=True), job(options=b'{"timeout_ms":1}'), job("UNKNOWN"), job("AA"), job("a"),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_python(rig: Rig, odd: Any) -> None:
    rig.task(lambda: None)
    lease = rig.lease([job(), odd, odd, job(), job()])
    runner = rig.runner()
    assert run_all(runner, lease) == (hot.RUN_SPECIAL, 0, 1)
    assert rig.states(lease) == "20000"
    assert lease.next_type() == odd[0]
    assert run_all(runner, lease) == (hot.RUN_SPECIAL, 0, 0)
    assert runner.take(lease) == (1, *odd)
    assert runner.take(lease) == (2, *odd)
    assert rig.states(lease) == "20000"  # who takes a job says what becomes of it
    runner.started(lease, 1)
    runner.done(lease, 2)
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 2)
    assert rig.states(lease) == "21222"
    with pytest.raises(IndexError):
        runner.take(lease)
    with pytest.raises(IndexError):
        lease.next_type()


def test_frames_with_options_or_cancels_are_left_to_python(rig: Rig) -> None:
    rig.task(lambda: None)
    runner = rig.runner()
    plain, options, cancels = rig.lease(2), rig.lease(2, options=b'{"timeout_ms":7}'), rig.lease(2)
    cancels.cancels = {1}
    assert (plain.options, options.options) == (None, {"timeout_ms": 7})
    leases = [plain, options, cancels]
    assert runner.run(leases, 0, SECOND) == (hot.RUN_SPECIAL, 1, 2)
    for _ in range(2):
        runner.take(options)
    assert runner.run(leases, 1, SECOND) == (hot.RUN_SPECIAL, 2, 0)
    cancels.cancels = None
    assert runner.run(leases, 2, SECOND) == (hot.RUN_ENDED, 3, 2)


def test_several_leases_and_several_types_in_order(rig: Rig) -> None:
    got: list[str] = []
    for name in "ABC":
        rig.task(lambda k, name=name: got.append(f"{name}{k}"), name)
    runner = rig.runner()
    lines = ["AABBA", "A", "ABC", "C", "C", "BBBB"]
    leases, expected = [], []
    for number, line in enumerate(lines):
        leases.append(rig.lease([job(t, b'{"k":%d}' % k) for k, t in enumerate(line)], number=number))
        expected += [f"{t}{k}" for k, t in enumerate(line)]
    assert leases[0].types_ahead() == [(b"A", 2), (b"B", 2), (b"A", 1)]
    assert runner.run(leases, 0, 60 * SECOND) == (hot.RUN_ENDED, 6, 15)
    assert got == expected
    assert all(lease.ended() and lease.to_settle() for lease in leases)
    assert all(0 < lease.started_ms <= lease.finished_ms for lease in leases)
    assert {name: words[layout.T_COMPLETED // 8] for name, words in rig.view.tasks()} == {
        "A": 5,
        "B": 7,
        "C": 3,
    }
    assert runner.run(leases, 6, SECOND) == (hot.RUN_ENDED, 6, 0)


def test_a_part_of_a_frame_runs_by_its_own_indexes(rig: Rig) -> None:
    got: list[Any] = []
    rig.task(lambda k: got.append((k, rig.word(layout.C_INDEX))))
    whole = frame([job(payload=b'{"k":%d}' % k) for k in range(20)])
    (part,) = codec.cut(whole, [(7, 5)])
    lease = rig.backend.Lease(part, rig.slot)
    run_all(rig.runner(), lease)
    assert got == [(k, k) for k in range(7, 12)]
    assert (lease.base, lease.n, lease.next, lease.stop) == (7, 5, 12, 12)


# --- the board while user code runs ---

WORDS = (
    layout.C_IN_USER, layout.C_STEP, layout.C_ROW, layout.C_INDEX, layout.C_TASK, layout.C_TIMEOUT_MS,
    layout.C_HARD_MS, layout.C_RETRIES,
)  # fmt: skip


def test_the_board_tells_which_job_runs(rig: Rig) -> None:
    seen: list[Any] = []

    def look(name: str) -> Callable[[], None]:
        return lambda: seen.append((name, [rig.word(at) for at in WORDS], rig.states(leases[1])))

    rig.task(look("A"), "A", timeout_ms=10, hard_ms=20, retries=30)
    rig.task(look("B"), "B", timeout_ms=11, hard_ms=21, retries=1 << 63)
    runner = rig.runner()
    leases = [rig.lease(1, number=1), rig.lease([job("A"), job("B"), job("A")], number=2)]
    run_all(runner, *leases)
    first, second = (lease.row for lease in leases)
    assert seen == [
        ("A", [1, 1, first, 0, 0, 10, 20, 30], "000"),
        ("A", [2, 2, second, 0, 0, 10, 20, 30], "100"),
        ("B", [3, 3, second, 1, 1, 11, 21, 1 << 63], "210"),
        ("A", [4, 4, second, 2, 0, 10, 20, 30], "221"),
    ]
    assert [rig.word(at) for at in WORDS] == [0, 4, second, 2, 0, 10, 20, 30]


def test_steps_count_on_from_what_the_board_says(rig: Rig) -> None:
    """A runner made anew must not give a step twice: a limit that is on its way names the step it is for."""
    rig.task(lambda: None)
    rig.view.set(layout.C_STEP, 41)
    run_all(rig.runner(), rig.lease(3))
    assert rig.word(layout.C_STEP) == 44


def test_current_is_the_job_that_runs(rig: Rig) -> None:
    seen: list[Any] = []
    entry = rig.task(lambda: seen.append(runner.current()))
    runner = rig.runner()
    lease = rig.lease(2)
    assert runner.current() is None
    run_all(runner, lease)
    assert seen == [(lease, 0, entry), (lease, 1, entry)]
    assert runner.current() is None


def test_each_job_is_timed_with_its_weight(rig: Rig) -> None:
    tiny, slow = rig.task(lambda: None, "TINY"), rig.task(lambda: None, "SLOW")
    runner = rig.runner()
    slow.seen = tiny.seen = 1_000
    tiny.mean_ns, slow.mean_ns = 1.0, 1e9
    run_all(runner, rig.lease([job("TINY")] * 100 + [job("SLOW")] * 3))
    for name, jobs in (("TINY", 100), ("SLOW", 3)):
        words = rig.task_words(name)
        assert words[layout.T_COMPLETED // 8] == words[layout.T_TIMED // 8] == jobs
        assert sum(rig.bins(name).values()) == jobs
        assert 0 < words[layout.T_SUM_NS // 8] < 10 * SECOND
    assert (tiny.seen, slow.seen) == (1_100, 1_003)
    assert slow.mean_ns < 1e9


def test_what_ran_before_an_error_of_our_own_is_accounted(rig: Rig) -> None:
    def task(k: int) -> None:
        if k == 5:
            raise ValueError

    def on_failure(*_: Any) -> None:
        raise MemoryError

    entry = rig.task(task)
    runner = rig.runner(on_failure=on_failure)
    entry.seen, entry.mean_ns = 1_000, 1.0
    with pytest.raises(MemoryError):
        run_all(runner, rig.lease([job(payload=b'{"k":%d}' % k) for k in range(10)]))
    assert entry.seen == 1_005


# --- one job by hand ---


def test_call_runs_one_job_with_its_own_limits(rig: Rig) -> None:
    seen: list[Any] = []

    def task(k: int) -> int:
        seen.append(([rig.word(at) for at in WORDS], runner.current(), rig.states(lease)))
        return k

    entry = rig.task(task, timeout_ms=1, hard_ms=2, retries=3)
    runner = rig.runner()
    lease = rig.lease([job(payload=b'{"k":9}', options=b'{"timeout_ms":70}')] * 2)
    index, _, payload, _, _ = runner.take(lease)
    runner.call(lease, index, entry, payload, timeout_ms=70, hard_ms=80, retries=90)
    assert seen == [([1, 1, lease.row, 0, 0, 70, 80, 90], (lease, 0, entry), "10")]
    assert rig.states(lease) == "30"
    assert rig.records() == [(lease.row, 0, layout.OUT_DONE, b"", b"9")]
    assert runner.current() is None
    assert entry.seen == 1
    assert lease.started_ms <= lease.finished_ms
    index, *_ = runner.take(lease)
    runner.call(lease, index, entry, b"[]", timeout_ms=0, hard_ms=0, retries=0)
    assert [(at, told) for at, _, _, told in rig.failures] == [(1, True)]
    assert rig.word(layout.C_IN_USER) == 0
    assert entry.seen == 2


def test_run_restores_the_limits_of_the_task_after_call(rig: Rig) -> None:
    seen: list[int] = []
    entry = rig.task(lambda: seen.append(rig.word(layout.C_TIMEOUT_MS)), timeout_ms=5)
    runner = rig.runner()
    lease = rig.lease(3)
    run_all(runner, rig.lease())
    runner.call(lease, runner.take(lease)[0], entry, b"{}", timeout_ms=70, hard_ms=0, retries=0)
    run_all(runner, lease)
    assert seen == [5, 70, 5, 5]


def test_invoke_stays_off_the_board(rig: Rig) -> None:
    def task(a: int, *, b: int = 2) -> tuple[int, int, int]:
        return a, b, rig.word(layout.C_IN_USER)

    entry = rig.task(task)
    runner = rig.runner()
    assert runner.invoke(entry, entry.decode(b'{"a":1}')) == (1, 2, 0)
    with pytest.raises(TypeError):
        runner.invoke(rig.task(lambda **rest: None, "B"), {1: 2})


# --- coroutines ---


class Parked:
    """Awaited, it gives itself to whoever drives, and goes on when driven again."""

    def __await__(self) -> Any:
        return (yield self)


CONTEXT: ContextVar[Any] = ContextVar("job", default=None)


class Beside:
    """What a worker tells its runner about coroutines. Jobs are driven by hand: `spawned` holds them."""

    def __init__(
        self, runner: hot.Runner, slots: int = 100, spawn: Callable[[Any], Any] | None = None
    ) -> None:
        self.spawned: list[hot.AsyncJob] = []
        self.limited: list[hot.AsyncJob] = []
        self.failed: list[tuple[int, BaseException, bool]] = []
        self.changes = 0
        self.ended: list[hot.Lease] = []
        runner.beside(
            slots=slots,
            spawn=spawn or self.spawned.append,
            limit=self.limited.append,
            failed=lambda job, error, in_arguments: self.failed.append((job.index, error, in_arguments)),
            changed=self.change,
            context=CONTEXT,
            ended=self.ended,
        )

    def change(self) -> None:
        self.changes += 1


def end(job: hot.AsyncJob) -> None:
    """Drive a job to its end."""
    for _ in range(100):
        try:
            job.send(None)
        except StopIteration as e:
            assert e.value is None  # nothing of a job reaches the loop's task
            return
    raise AssertionError("the job does not end")


def test_coroutines_start_until_no_slot_is_free(rig: Rig) -> None:
    async def task() -> None:
        await Parked()

    entry = rig.task(task)
    runner = rig.runner()
    beside = Beside(runner, slots=3)
    lease = rig.lease(5)
    assert run_all(runner, lease) == (hot.RUN_BLOCKED, 0, 3)
    assert rig.states(lease) == "11100"
    assert (lease.next, lease.running, len(runner.active), rig.word(layout.C_ASYNC)) == (3, 3, 3, 3)
    assert [(job.lease, job.index, job.entry, job.own) for job in beside.spawned] == [
        (lease, k, entry, None) for k in range(3)
    ]
    assert run_all(runner, lease) == (hot.RUN_BLOCKED, 0, 0)
    assert beside.changes == 0
    end(beside.spawned[1])
    assert beside.changes == 1  # the slot that was missed
    assert run_all(runner, lease) == (hot.RUN_BLOCKED, 0, 1)
    for one in beside.spawned[:1] + beside.spawned[2:]:
        end(one)
    assert rig.states(lease) == "22220"
    assert (beside.ended, lease.running, rig.word(layout.C_ASYNC), runner.ended) == ([], 0, 0, 4)
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 1)
    end(beside.spawned[-1])
    assert beside.ended == [lease]
    assert (runner.active, runner.ended, entry.seen) == (set(), 5, 5)
    assert rig.task_words("A")[layout.T_COMPLETED // 8] == 5


def test_each_step_of_a_coroutine_stands_on_the_board(rig: Rig) -> None:
    seen: list[Any] = []

    async def task(told: str) -> str:
        for _ in range(2):
            seen.append((told, [rig.word(at) for at in WORDS], CONTEXT.get()))
            await Parked()
            told += told[0]
        return told

    rig.task(task, timeout_ms=1, hard_ms=2, retries=3)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease([job(payload=b'{"told":"a"}'), job(payload=b'{"told":"b"}')])
    run_all(runner, lease)
    assert beside.limited == beside.spawned  # both have a time limit
    assert [one.timeout_ms for one in beside.spawned] == [1, 1]
    for _ in range(2):
        for one in beside.spawned:
            assert isinstance(contextvars.copy_context().run(one.send, None), Parked)
            assert rig.word(layout.C_IN_USER) == 0
    for one in beside.spawned:
        end(one)
        assert rig.word(layout.C_IN_USER) == 0
    row, (a, b) = lease.row, beside.spawned
    assert [(told, words) for told, words, _ in seen] == [
        ("a", [1, 1, row, 0, 0, 1, 2, 3]), ("b", [2, 2, row, 1, 0, 1, 2, 3]),
        ("aa", [3, 3, row, 0, 0, 1, 2, 3]), ("bb", [4, 4, row, 1, 0, 1, 2, 3]),
    ]  # fmt: skip
    assert [context for *_, context in seen[:2]] == [a, b]
    assert rig.word(layout.C_STEP) == 6
    assert [result for *_, result in rig.records()] == [b'"aaa"', b'"bbb"']


def test_a_step_of_a_task_that_a_job_has_started_is_marked_too(rig: Rig) -> None:
    """Unless the job's own step runs, which stays marked, or the job is over."""
    nested: list[bool] = []

    async def task(k: int) -> None:
        nested.append(beside.spawned[k].mark())
        await Parked()

    rig.task(task, timeout_ms=1, hard_ms=2, retries=3)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease([job(payload=b'{"k":0}'), job(payload=b'{"k":1}')])
    run_all(runner, lease)
    first, second = beside.spawned
    second.send(None)
    first.send(None)
    assert nested == [False, False]
    assert second.mark() is True
    assert [rig.word(at) for at in WORDS] == [3, 3, lease.row, 1, 0, 1, 2, 3]
    second.unmark()
    assert rig.word(layout.C_IN_USER) == 0
    end(second)
    assert second.mark() is False
    assert [rig.word(at) for at in (layout.C_IN_USER, layout.C_STEP)] == [0, 4]
    end(first)


def test_outcomes_of_coroutines(rig: Rig) -> None:
    async def task(k: int) -> Any:
        await Parked()
        match k:
            case 0:
                return None
            case 1:
                return "a result"
            case 2:
                return object()
            case 3:
                raise ValueError("told")
            case 4:
                raise SystemExit
            case 5:
                raise asyncio.CancelledError
            case 6:
                raise StopIteration
        return "x" * 200

    rig.task(task)
    runner = rig.runner(result_max_bytes=100)
    beside = Beside(runner)
    payloads = [b'{"k":%d}' % k for k in range(8)] + [b'{"k":"x"}']
    lease = rig.lease([job(payload=payload) for payload in payloads])
    run_all(runner, lease)
    for one in beside.spawned:
        end(one)
    assert rig.states(lease) == "233111131"
    assert [(index, error) for _, index, _, error, _ in rig.records()] == [
        (1, b""),
        (2, b'"odd"'),
        (7, b'"odd"'),
    ]
    assert [(index, type(error), told) for index, error, told in beside.failed] == [
        (3, ValueError, False), (4, SystemExit, False), (5, asyncio.CancelledError, False),
        (6, RuntimeError, False), (8, msgspec.ValidationError, True),
    ]  # fmt: skip
    assert beside.ended == [lease]
    assert rig.word(layout.C_IN_USER) == 0
    assert lease.first_done_ns > 0
    assert 0 < lease.started_ms <= lease.finished_ms


def test_untracked_coroutines_tell_nothing(rig: Rig) -> None:
    async def task() -> str:
        return "a result"

    rig.task(task)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease(tracked=False)
    run_all(runner, lease)
    end(beside.spawned[0])
    assert (rig.states(lease), rig.records()) == ("2", [])


def test_a_limit_that_strikes_while_a_coroutines_arguments_are_decoded(rig: Rig) -> None:
    async def task() -> None: ...

    def decode(payload: bytes) -> Any:
        assert rig.word(layout.C_IN_USER)
        raise SoftTimeLimit

    rig.task(task, decode=decode)
    runner = rig.runner()
    beside = Beside(runner)
    run_all(runner, rig.lease())
    end(beside.spawned[0])
    ((_, error, in_arguments),) = beside.failed
    assert (type(error), in_arguments) == (SoftTimeLimit, False)


def test_a_coroutine_may_be_cancelled_before_it_began(rig: Rig) -> None:
    async def task() -> None:
        raise AssertionError("it never runs")

    rig.task(task)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease()
    run_all(runner, lease)
    with pytest.raises(StopIteration):
        beside.spawned[0].throw(asyncio.CancelledError())
    ((_, error, _),) = beside.failed
    assert isinstance(error, asyncio.CancelledError)
    assert (runner.active, beside.ended, rig.word(layout.C_IN_USER)) == (set(), [lease], 0)


def test_what_is_thrown_into_a_coroutine_is_a_step_too(rig: Rig) -> None:
    seen: list[Any] = []

    async def task(k: int) -> str | None:
        try:
            await Parked()
        except BaseException as e:
            seen.append((k, type(e), rig.word(layout.C_IN_USER)))
            if k == 0:
                return "it went well"
            if k == 1:
                await Parked()
                return None
            raise
        return None

    rig.task(task)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease([job(payload=b'{"k":%d}' % k) for k in range(4)])
    run_all(runner, lease)
    for one in beside.spawned:
        one.send(None)
    returns, goes_on, fails, closed = beside.spawned
    with pytest.raises(StopIteration) as ended:
        returns.throw(ValueError)
    assert ended.value.value is None
    assert isinstance(goes_on.throw(KeyError("x")), Parked)
    assert rig.word(layout.C_IN_USER) == 0
    end(goes_on)
    with pytest.raises(StopIteration):
        fails.throw(KeyError, KeyError("y"))
    closed.close()
    closed.close()
    assert seen == [(0, ValueError, 5), (1, KeyError, 6), (2, KeyError, 8), (3, GeneratorExit, 0)]
    assert [(index, str(error)) for index, error, _ in beside.failed] == [(2, "'y'")]
    assert rig.states(lease) == "3211"


def test_outcomes_wait_while_they_are_held(rig: Rig) -> None:
    async def task(k: int) -> int:
        if k:
            raise ValueError
        return k

    rig.task(task)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease([job(payload=b'{"k":%d}' % k) for k in range(2)] + [job(payload=b"{}")])
    run_all(runner, lease)
    runner.late = []
    for one in beside.spawned:
        end(one)
    assert [(one, result, type(error), told) for one, result, error, told in runner.late] == [
        (beside.spawned[0], 0, type(None), False), (beside.spawned[1], None, ValueError, False),
        (beside.spawned[2], None, msgspec.ValidationError, True),
    ]  # fmt: skip
    assert (rig.states(lease), beside.failed, rig.records()) == ("111", [], [])
    assert (beside.ended, lease.running) == ([lease], 0)
    late, runner.late = runner.late, None
    runner.conclude(late[0][0].lease, late[0][0].index, late[0][0].entry, late[0][1])
    assert [(index, result) for _, index, _, _, result in rig.records()] == [(0, b"0")]


def test_a_lost_lease_writes_no_more(rig: Rig) -> None:
    """Its row may be another lease's before the record is gone."""

    async def task() -> str:
        return "a result"

    entry = rig.task(task)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease(2)
    run_all(runner, lease)
    lease.lost = True
    end(beside.spawned[0])
    runner.conclude(lease, 1, entry, None)
    assert (rig.states(lease), rig.records()) == ("11", [])


def test_a_coroutine_with_its_own_limits(rig: Rig) -> None:
    seen: list[Any] = []

    async def task() -> None:
        seen.append([rig.word(at) for at in WORDS])

    entry = rig.task(task, timeout_ms=1)
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease([job(options=b"{}")] * 2)
    for timeout_ms in (70, 0):
        index, _, payload, _, _ = runner.take(lease)
        made = runner.start(
            lease, index, entry, payload, "own", timeout_ms=timeout_ms, hard_ms=80, retries=90
        )
        assert (made.own, made.timeout_ms, made.ending, made.timer) == ("own", timeout_ms, "", None)
        end(made)
    assert beside.limited == beside.spawned[:1]
    assert seen == [[1, 1, lease.row, 0, 0, 70, 80, 90], [2, 2, lease.row, 1, 0, 0, 80, 90]]
    assert beside.ended == [lease]


def test_a_timer_ends_with_its_job(rig: Rig) -> None:
    class Timer:
        cancelled = 0

        def cancel(self) -> None:
            self.cancelled += 1

    async def task() -> None: ...

    rig.task(task)
    runner = rig.runner()
    beside = Beside(runner)
    run_all(runner, rig.lease())
    (one,) = beside.spawned
    timer = one.timer = Timer()
    end(one)
    assert (timer.cancelled, one.timer) == (1, None)


def test_synchronous_jobs_beside_coroutines_are_left_to_python(rig: Rig) -> None:
    """Timers and connections of coroutines must not wait for a job that runs inline."""

    async def task() -> None:
        await Parked()

    rig.task(task, "ASYNC")
    rig.task(lambda: None, "SYNC")
    runner = rig.runner()
    beside = Beside(runner)
    lease = rig.lease([job("ASYNC"), job("SYNC"), job("ASYNC")])
    assert run_all(runner, lease) == (hot.RUN_SPECIAL, 0, 1)
    assert beside.changes == 0
    end(beside.spawned[0])
    assert beside.changes == 1  # nothing runs beside others any more
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 2)


def test_apart_synchronous_jobs_are_left_to_python_though_nothing_runs_beside_them(rig: Rig) -> None:
    entry = rig.task(lambda: None, "SYNC")
    runner = rig.runner()
    lease = rig.lease([job("SYNC")] * 3)
    runner.apart = True
    assert run_all(runner, lease) == (hot.RUN_SPECIAL, 0, 0)
    entry.timed(100, 100 * 1_000)
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 3)
    runner.apart, entry.mean_ns = False, 1e9
    assert run_all(runner, rig.lease([job("SYNC")], number=2)) == (hot.RUN_ENDED, 1, 1)


def beside_a_coroutine(rig: Rig, sync: Callable[[], None]) -> tuple[hot.Runner, hot.Entry]:
    """A runner with one coroutine under way, and the task SYNC, known to be short."""

    async def task() -> None:
        await Parked()

    rig.task(task, "ASYNC")
    entry = rig.task(sync, "SYNC")
    runner = rig.runner()
    Beside(runner)
    run_all(runner, rig.lease([job("ASYNC")]))
    entry.timed(100, 100 * 1_000)
    return runner, entry


def test_a_short_synchronous_job_runs_between_the_steps_of_coroutines(rig: Rig) -> None:
    runner, entry = beside_a_coroutine(rig, lambda: None)
    lease = rig.lease([job("SYNC")] * 3, number=2)
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 3)
    assert rig.states(lease) == str(layout.JOB_DONE) * 3
    # Each was timed by itself, so that one long one is seen.
    assert entry.seen == 103


@pytest.mark.parametrize(
    ("jobs", "long", "short"), [(99, 0, False), (100, 0, True), (100, 5, True), (100, 6, False)]
)
def test_short_is_what_nearly_always_took_less_than_a_millisecond(
    rig: Rig, jobs: int, long: int, short: bool
) -> None:
    """At most one in twenty of the last hundred: one slow request in ten would hold up two hundred timers."""
    entry = rig.task(lambda: None)
    rig.runner()
    for number in range(jobs):
        entry.timed(1, 1_100_000 if number < long else 1_000)
    assert entry.short() is short


def test_a_type_that_has_become_long_is_not_short_any_more(rig: Rig) -> None:
    entry = rig.task(lambda: None)
    rig.runner()
    entry.timed(10_000, 10_000 * 1_000)
    assert entry.short()
    for _ in range(6):
        entry.timed(1, 1_100_000)
    assert not entry.short()


def test_what_others_have_measured_as_long_is_not_short(rig: Rig) -> None:
    entry = rig.task(lambda: None)
    entry.mean_ns, entry.seen = 2e6, 1_000
    assert not entry.short()
    entry.mean_ns = 1e5
    assert entry.short()


def test_short_jobs_leave_the_loop_its_turn(rig: Rig) -> None:
    """After two milliseconds of them the timers of coroutines come first, whatever still waits."""

    def slow() -> None:
        end = time.monotonic() + 0.0025
        while time.monotonic() < end:
            pass

    runner, entry = beside_a_coroutine(rig, slow)
    lease = rig.lease([job("SYNC")] * 3, number=2)
    assert run_all(runner, lease) == (hot.RUN_TIME, 0, 1)
    entry.mean_ns = 1e3  # whatever this machine did meanwhile, the type counts as short
    assert run_all(runner, lease) == (hot.RUN_TIME, 0, 0)  # still the same turn
    runner.beside_until_ns = 0
    assert run_all(runner, lease) == (hot.RUN_TIME, 0, 1)


def test_what_is_done_around_jobs_can_be_rehearsed(rig: Rig) -> None:
    entry = rig.task(lambda: None)
    runner, lease = rig.runner(), rig.lease(3)
    step = rig.word(layout.C_STEP)
    assert runner.rehearse(lease, entry, 64) == 64
    assert rig.word(layout.C_STEP) == step + 64 and rig.word(layout.C_IN_USER) == 0
    assert entry.seen == 64 and rig.states(lease) == str(layout.JOB_DONE) * 3


def test_other_jobs_beside_count_for_the_slots(rig: Rig) -> None:
    async def task() -> None: ...

    rig.task(task)
    runner = rig.runner()
    beside = Beside(runner, slots=1)
    runner.active.add("a job on the helper thread")
    lease = rig.lease()
    assert run_all(runner, lease) == (hot.RUN_BLOCKED, 0, 0)
    runner.leave("a job on the helper thread")
    assert (beside.changes, rig.word(layout.C_ASYNC)) == (1, 0)
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 1)
    end(beside.spawned[0])


def test_the_lease_may_end_while_many_coroutines_start(rig: Rig) -> None:
    async def task() -> None: ...

    rig.task(task)
    runner = rig.runner()
    spawned: list[hot.AsyncJob] = []

    def spawn(one: hot.AsyncJob) -> None:
        spawned.append(one)
        runner.until_ns = 1

    Beside(runner, slots=1_000, spawn=spawn)
    assert run_all(runner, rig.lease(1_000)) == (hot.RUN_LEASE_END, 0, 32)
    for one in spawned:
        end(one)


class Callable2:
    async def __call__(self, k: int) -> int:
        return k * 2


class Result:
    """No JSON, and known by name."""


def test_nothing_of_what_ran_stays_in_memory(rig: Rig) -> None:
    async def task(k: int) -> Any:
        await Parked()
        if k:
            raise ValueError
        return Result()

    def plain(k: int) -> Any:
        if k:
            raise ValueError
        return Result()

    rig.task(task, "ASYNC")
    rig.task(plain, "PLAIN")
    runner = rig.runner(on_failure=lambda *_: None, on_result=lambda *_: None)
    kinds = ("AsyncJob", "Lease", "Token", "coroutine", "ValueError", "traceback", "Result")

    def live() -> dict[str, int]:
        gc.collect()
        counts = Counter(type(one).__name__ for one in gc.get_objects())
        return {kind: counts[kind] for kind in kinds}

    def life() -> None:
        beside = Beside(runner)
        beside.failed = SkipList()
        payloads = [b'{"k":0}', b'{"k":1}', b'{"k":"x"}']
        leases = [rig.lease([job(name, payload) for payload in payloads]) for name in ("PLAIN", "ASYNC")]
        assert runner.run(leases, 0, SECOND)[0] == hot.RUN_ENDED
        for one in beside.spawned:
            contextvars.Context().run(end, one)
        rig.slot.close_rows(leases)

    life()
    before = live()
    for _ in range(50):
        life()
    after = live()
    assert all(after[kind] < before[kind] + 10 for kind in kinds), (before, after)


class SkipList(list[Any]):
    """Forgets what is appended."""

    def append(self, _: Any) -> None: ...


def test_any_awaitable_will_do(rig: Rig) -> None:
    """Not only what `async def` makes."""

    class Ready:
        def __await__(self) -> Any:
            yield Parked()
            return "ready"

    async def task() -> None: ...

    entry = rig.task(Callable2(), "CALLABLE")
    assert entry.is_async
    other = rig.backend.Entry(
        name="READY", number=1, func=Ready, decode=rig.task(task, "X").decode, positional=(), keyword_only=(),
        mode=0, is_async=True,
    )  # fmt: skip
    rig.entries[b"READY"] = other
    runner = rig.runner()
    beside = Beside(runner)
    run_all(runner, rig.lease([job("CALLABLE", b'{"k":4}'), job("READY")]))
    for one in beside.spawned:
        end(one)
    assert [result for *_, result in rig.records()] == [b"8", b'"ready"']


async def test_coroutines_run_as_tasks_of_a_real_loop(rig: Rig) -> None:
    seen: dict[int, Any] = {}

    async def task(k: int) -> int:
        seen[k] = CONTEXT.get().index
        await asyncio.sleep(0)
        assert rig.word(layout.C_IN_USER)
        async with asyncio.timeout(5):
            await asyncio.gather(asyncio.sleep(0.001), asyncio.sleep(0))
        assert rig.word(layout.C_IN_USER)
        if k == 3:
            await asyncio.Event().wait()
        return k * 2

    rig.task(task)
    runner = rig.runner()
    done = asyncio.Event()
    ended: list[hot.Lease] = []
    failed: list[tuple[int, type]] = []

    def fail(job: Any, error: BaseException, in_arguments: bool) -> None:
        failed.append((job.index, type(error)))
        rig.slot.record(job.lease.row, job.index, layout.OUT_RETRY)

    runner.beside(
        slots=100,
        spawn=asyncio.get_running_loop().create_task,
        limit=lambda one: None,
        failed=fail,
        changed=done.set,
        context=CONTEXT,
        ended=ended,
    )
    lease = rig.lease([job(payload=b'{"k":%d}' % k) for k in range(10)])
    assert run_all(runner, lease)[0] == hot.RUN_ENDED
    jobs = {one.index: one for one in runner.active}
    await await_until(lambda: lease.running == 1, 5, "all but the third have ended")
    assert rig.word(layout.C_IN_USER) == 0
    jobs[3].task.cancel()
    await done.wait()
    assert ended == [lease]
    assert failed == [(3, asyncio.CancelledError)]
    assert seen == {k: k for k in range(10)}
    done_ones = {index: result for _, index, status, _, result in rig.records() if status == layout.OUT_DONE}
    assert done_ones == {k: b"%d" % (k * 2) for k in range(10) if k != 3}
    assert not runner.active
    await jobs[3].task
    assert not jobs[3].task.cancelled()


# --- leases ---


def test_a_lease_tells_its_frame(rig: Rig) -> None:
    raw = frame(9, number=4, tracked=False, lane="low", run=3, attempts=2)
    lease = rig.backend.Lease(raw, rig.slot, 5)
    assert (lease.frame, lease.frame_id, lease.lane, lease.rank) == (raw, frame_id(4), "low", 5)
    assert (lease.base, lease.n, lease.run, lease.attempts) == (0, 9, 3, 2)
    assert (lease.tracked, lease.enqueued_us) == (False, T0_US)
    assert lease.name == raw[4:45]
    assert lease.header.lease == lease.name
    assert (lease.next, lease.stop, lease.claims, lease.pieces) == (0, 9, [(0, 9)], ())
    assert (lease.cancels, lease.options, lease.settling, lease.lost, lease.running) == (
        None,
        None,
        False,
        False,
        0,
    )
    assert (lease.started_ms, lease.finished_ms, lease.first_done_ns, lease.predicted_ns) == (0, 0, 0, 0.0)
    (row,) = rig.view.rows()
    assert (row.frame_id, row.run, row.n) == (frame_id(4), 3, 9)


def test_giving_back_and_what_is_ahead(rig: Rig) -> None:
    rig.task(lambda: None)
    rig.task(lambda: None, "B")
    runner = rig.runner()
    lease = rig.lease([job("A")] * 4 + [job("B")] * 3 + [job("A")] * 3)
    assert not lease.to_settle()
    lease.give_back(8)
    assert lease.types_ahead() == [(b"A", 4), (b"B", 3), (b"A", 1)]
    assert rig.states(lease) == "0000000044"
    assert lease.to_settle()
    assert runner.run([lease], 0, 0)[2] == 1
    assert lease.types_ahead() == [(b"A", 3), (b"B", 3), (b"A", 1)]
    for index in (0, 9, 10, 11):
        with pytest.raises(ValueError, match="ahead"):
            lease.give_back(index)
    assert not lease.ended()
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 7)
    assert rig.states(lease) == "2222222244"
    assert lease.ended()
    assert lease.types_ahead() == []


def test_a_lost_lease_starts_nothing_more_and_says_nothing(rig: Rig) -> None:
    rig.task(lambda: None)
    lease = rig.lease(5)
    runner = rig.runner()
    runner.run([lease], 0, 0)
    lease.skip_rest()
    assert run_all(runner, lease) == (hot.RUN_ENDED, 1, 0)
    assert rig.states(lease) == "20000"


def test_only_claims_count_for_what_is_to_settle(rig: Rig) -> None:
    lease = rig.lease(10)
    rig.slot.set_state(lease.row, 3, layout.JOB_STARTED)
    assert not lease.to_settle()
    for state in (layout.JOB_DONE, layout.JOB_RECORDED, layout.JOB_RETURNED):
        rig.slot.set_state(lease.row, 3, state)
        for claims, told in (
            ([(0, 10)], True), ([(3, 1)], True), ([(0, 3), (4, 6)], False), ([], False),
            ([(0, 1), (3, 2)], True),
        ):  # fmt: skip
            lease.claims = claims
            assert lease.to_settle() is told


def test_a_running_job_keeps_its_lease_from_ending(rig: Rig) -> None:
    lease = rig.lease(1)
    runner = rig.runner()
    runner.take(lease)
    lease.running += 1
    assert not lease.ended()
    lease.running -= 1
    assert lease.ended()


# --- taking in what was fetched ---


def test_admit_sorts_out_what_is_no_lease(rig: Rig) -> None:
    good = [frame(3, number=1), frame(20, number=2, lane="low"), frame(1, number=3, lane="other")]
    damaged = [
        b"",
        b"F1",
        good[0][:-1],
        good[0][:-1] + b"x",
        frame(2, options=b"[1]"),
        frame(2, options=b"{"),
    ]
    newer = b"F2" + good[0][2:]
    frames = [good[0], damaged[0], *damaged[1:3], newer, good[1], *damaged[3:], good[2]]
    leases, jobs, odd = rig.backend.admit(frames, rig.slot, {"high": 0, "low": 1}, 7)
    assert [lease.frame for lease in leases] == good
    assert [lease.rank for lease in leases] == [0, 1, 7]
    assert jobs == 24
    assert [raw for raw, _ in odd] == [*damaged[:3], newer, *damaged[3:]]
    assert [type(error) for _, error in odd] == [
        *[DamagedFrame] * 3, NewerFrame, *[DamagedFrame] * 3,
    ]  # fmt: skip
    assert len(rig.view.rows()) == 3


def test_admit_tells_what_found_no_row(rig: Rig) -> None:
    for _ in range(layout.BLOCKS - 1):
        rig.slot.open_row(frame_id(9), 0, 9, 0)
    frames = [frame(9, number=1), frame(9, number=2), frame(8, number=3)]
    leases, jobs, odd = rig.backend.admit(frames, rig.slot, {"high": 0}, 1)
    assert [lease.frame for lease in leases] == [frames[0], frames[2]]
    assert odd == [(frames[1], None)]
    assert jobs == 17


# --- leases that are settled all at once ---


def naive_plain_done(leases: list[hot.Lease], slot: hot.Slot) -> tuple[dict[Any, list[int]], list[int]]:
    """The contract, spelled out: positions instead of leases."""
    groups: dict[Any, list[int]] = {}
    others = []
    for at, lease in enumerate(leases):
        header = codec.parse(lease.frame)
        whole = lease.claims == [(0, header.total)] and header.n == header.total
        done = (
            lease.ended() and lease.stop == header.total and set(slot.states(lease.row)) == {layout.JOB_DONE}
        )
        if lease.settling or not whole or not done or header.attempts or header.crashes:
            others.append(at)
            continue
        key: Any = (0, "", b"")
        if header.flags & codec.TRACKED:
            second, char = bucket_of(header.frame_id)
            times = f"{lease.started_ms},{lease.finished_ms}"
            value = f"C,{header.total},0,{times},{header.lane},{codec.types(lease.frame)}"
            key = (second, char, value.encode())
        groups.setdefault(key, []).append(at)
    return groups, others


def random_lease(rig: Rig, runner: hot.Runner, rng: random.Random, number: int) -> hot.Lease:
    types = rng.choice(["A", "A", "B", "AB", "AAB"]) * rng.choice([1, 1, 1, 5])
    name = b"01HF7YATZ0" + rng.choice([b"A", b"B"]) + b"%013d00" % number
    if rng.random() < 0.2:
        name = b"01HF7YBT" + name[8:]
    raw = frame(
        [job(t) for t in types], lane=rng.choice(["high", "low"]), frame_id=name, tracked=rng.random() < 0.8,
        attempts=rng.random() < 0.1, crashes=rng.random() < 0.1,
    )  # fmt: skip
    if len(types) > 1 and rng.random() < 0.1:
        (raw,) = codec.cut(raw, [(0, len(types) - 1)])
    lease: hot.Lease = rig.backend.Lease(raw, rig.slot)
    chance = rng.random()
    while lease.next < lease.stop and (chance > 0.1 or rng.random() < 0.5):
        state = layout.JOB_DONE if chance > 0.2 or rng.random() < 0.8 else rng.randrange(5)
        rig.slot.set_state(lease.row, runner.take(lease)[0], state)
    lease.started_ms, lease.finished_ms = rng.randrange(2), rng.randrange(2, 4)
    lease.running = rng.random() < 0.05
    lease.settling = rng.random() < 0.05
    if rng.random() < 0.05:
        lease.claims = rng.choice([[], [(0, 1)], [(0, 1), (1, 1)]])
    return lease


@pytest.mark.parametrize("seed", range(30))
def test_plain_done_equals_the_contract(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    runner = rig.runner()
    leases = [random_lease(rig, runner, rng, k) for k in range(120)]
    expected_groups, expected_others = naive_plain_done(leases, rig.slot)
    places = {id(lease): at for at, lease in enumerate(leases)}
    before = [lease.settling for lease in leases]
    groups, others = rig.backend.plain_done(leases)
    assert {key: [places[id(one)] for one in group] for key, group in groups.items()} == expected_groups
    assert [places[id(one)] for one in others] == expected_others
    # what was grouped is on its way
    grouped = {at for group in expected_groups.values() for at in group}
    assert [lease.settling for lease in leases] == [at in grouped or was for at, was in enumerate(before)]
    assert len(expected_groups) > 3
    assert expected_others


def test_a_lease_settled_in_part_is_not_settled_whole(rig: Rig) -> None:
    """Redis knows the rest by another name: the whole one would be refused, and the jobs run again."""
    lease = rig.lease(4)
    runner = rig.runner()
    for _ in range(4):
        runner.done(lease, runner.take(lease)[0])
    for claims in ([(0, 2)], [(2, 2)], [(0, 3)], [(0, 2), (2, 2)], []):
        lease.claims = claims
        assert rig.backend.plain_done([lease]) == ({}, [lease])
    lease.claims = [(0, 4)]
    groups, others = rig.backend.plain_done([lease])
    assert (list(groups.values()), others) == ([[lease]], [])


def test_plain_done_of_nothing(rig: Rig) -> None:
    assert rig.backend.plain_done([]) == ({}, [])


# --- leases whose jobs completed, some with a result ---


def naive_results_of(rig: Rig, leases: list[hot.Lease]) -> tuple[Any, Any, Any]:
    """The same from records and states as anybody can read them."""
    records: dict[tuple[int, int], Any] = {}
    for row, record in rig.view.all_records():
        records[row, record.index] = record
    ones: dict[Any, tuple[list[hot.Lease], list[bytes]]] = {}
    larger: list[tuple[hot.Lease, list[bytes]]] = []
    others = []
    for lease in leases:
        header = lease.header
        told: list[bytes] = []
        good = len(lease.claims) == 1 and not (header.attempts or header.crashes or lease.settling)
        good = good and lease.tracked
        for index in range(*(lease.claims[0][0], sum(lease.claims[0])) if good else (0,)):
            state = rig.slot.states(lease.row)[index - lease.base]
            record = records.get((lease.row, index))
            if state == layout.JOB_RECORDED and record is not None:
                good = good and record.status == layout.OUT_DONE and not record.error
                head = f'{{"attempts":1,"started_at":{record.started_ms},"finished_at":{record.finished_ms}'
                told.append(lease.frame_id + b".%d" % index)
                told.append(head.encode() + b',"result":' + (record.result or b"null") + b"}")
            elif state != layout.JOB_DONE:
                good = False
        if not good or (header.total == 1 and not told):
            others.append(lease)
        elif header.total > 1:
            larger.append((lease, told))
        else:
            second, char = bucket_of(header.frame_id)
            times = f"{lease.started_ms},{lease.finished_ms}"
            value = f"C,1,0,{times},{header.lane},{codec.types(lease.frame)}".encode()
            group = ones.setdefault((second, char, value), ([], []))
            group[0].append(lease)
            group[1].append(told[1])
    return ones, larger, others


@pytest.mark.parametrize("seed", range(10))
def test_results_of_equals_the_contract(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    runner = rig.runner()
    leases = [random_lease(rig, runner, rng, number) for number in range(150)]
    for k in range(2):  # some stand in both halves: the later record is the truth
        for lease in leases:
            for index in range(lease.base, lease.base + lease.n):
                if rng.random() < (0.6 if lease.n == 1 else 0.3):
                    rig.slot.record(
                        lease.row, index, layout.OUT_DONE if rng.random() < 0.95 else layout.OUT_RETRY,
                        started_ms=rng.randrange(2), finished_ms=rng.randrange(2, 4),
                        error=b"" if rng.random() < 0.95 else b"{}",
                        result=rng.choice([b"", b"1", b'"' + b"x" * 300 + b'"']),
                    )  # fmt: skip
        if not k:
            rig.slot.begin_settle(rng.sample([lease.row for lease in leases], 75))
    expected = naive_results_of(rig, leases)
    before = [lease.settling for lease in leases]
    ones, larger, others = rig.backend.results_of(rig.slot, leases)
    assert (ones, larger, others) == expected
    # what was read is on its way
    read = {id(lease) for group, _ in ones.values() for lease in group} | {id(lease) for lease, _ in larger}
    assert [lease.settling for lease in leases] == [
        was or id(lease) in read for lease, was in zip(leases, before, strict=True)
    ]
    assert len(ones) > 3
    assert len(larger) > 3
    assert others


def test_of_a_lease_settled_in_part_only_the_rest_is_told(rig: Rig) -> None:
    lease = rig.lease(4)
    runner = rig.runner()
    for index in range(4):
        runner.take(lease)
        rig.slot.record(lease.row, index, layout.OUT_DONE, started_ms=1, finished_ms=2, result=b"%d" % index)
    lease.claims = [(2, 2)]
    ones, larger, others = rig.backend.results_of(rig.slot, [lease])
    head = b'{"attempts":1,"started_at":1,"finished_at":2,"result":'
    told = [lease.frame_id + b".2", head + b"2}", lease.frame_id + b".3", head + b"3}"]
    assert (ones, larger, others) == ({}, [(lease, told)], [])


def test_a_job_whose_record_is_missing_is_left_to_others(rig: Rig) -> None:
    lease = rig.lease(1)
    rig.runner().take(lease)
    rig.slot.set_state(lease.row, 0, layout.JOB_RECORDED)
    assert rig.backend.results_of(rig.slot, [lease]) == ({}, [], [lease])
    assert not lease.settling


# --- both backends write the same board ---


def outcome_task(k: int, **_: Any) -> Any:
    match k % 7:
        case 0 | 1:
            return None
        case 2:
            return {"k": k, "text": "x" * (k % 97)}
        case 3:
            raise ValueError(k)
        case 4:
            return object()
        case 5:
            return "y" * 300
        case _:
            return k


def plain_task(k: int, text: str = "") -> Any:
    return outcome_task(k)


def random_jobs(rng: random.Random) -> list[Any]:
    jobs = []
    for name, _ in groupby(rng.choices(["A", "B", "C", "UNKNOWN"], [8, 4, 2, 1], k=rng.randrange(1, 30))):
        for _ in range(rng.randrange(1, 5)):
            payload = b'{"k":%d}' % rng.randrange(1_000)
            if rng.random() < 0.1:
                payload = rng.choice([b'{"k":"x"}', b"{}", b"", b'{"k":1,"zz":2}', b"\xff"])
            options = b'{"max_retries":1}' if rng.random() < 0.05 else b""
            jobs.append(job(name, payload, options, rng.random() < 0.03))
    return jobs


def play(rig: Rig, seed: int) -> Any:
    """One seeded life of a slot; what it did, and the image that it leaves, without its times."""
    rng = random.Random(seed)
    rig.task(plain_task, "A", timeout_ms=5)
    rig.task(outcome_task, "B", hard_ms=6)
    rig.task(lambda k: None, "C", retries=7)
    runner = rig.runner(result_max_bytes=250)
    log: list[Any] = []
    leases: list[hot.Lease] = []
    half: int | None = None
    for number in range(60):
        jobs = random_jobs(rng)
        raw = frame(
            jobs, number=number, tracked=rng.random() < 0.8, run=rng.randrange(9), attempts=rng.random() < 0.2
        )
        if len(jobs) > 2 and rng.random() < 0.3:
            raw = codec.cut(raw, [(1, len(jobs) - 2)])[0]
        leases += rig.backend.admit([raw], rig.slot, {"high": 0}, 1)[0]
        if rng.random() < 0.3:
            leases[-1].give_back(rng.randrange(leases[-1].next, leases[-1].stop + 1))
        while (result := runner.run(leases, 0, 1 << 60))[0] == hot.RUN_SPECIAL:
            index, key, _, options, zstd = runner.take(leases[result[1]])
            log.append((result, index, key, options, zstd))
            (runner.started if rng.random() < 0.3 else runner.done)(leases[result[1]], index)
        log.append(result)
        for lease in leases:
            lease.started_ms, lease.finished_ms = 5, 6
        if rng.random() < 0.5:
            groups, others = rig.backend.plain_done(leases)
            log.append(
                (
                    {key: [one.name for one in group] for key, group in groups.items()},
                    [one.name for one in others],
                )
            )
            for group in groups.values():
                rig.slot.close_rows(group)
            leases = others
        if half is not None:
            rig.slot.end_settle(half)
            half = None
        if leases and rng.random() < 0.3:
            ended = [one for one in leases if rng.random() < 0.5]
            half = rig.slot.begin_settle([one.row for one in ended])
            for one in ended:
                rig.slot.close_row(one.row)
            leases = [one for one in leases if one not in ended]
        for one in leases:
            if rng.random() < 0.1 and one.n > 2 and one.claims == [(one.base, one.n)]:
                one.claims = [(one.base + 1, one.n - 2)]
                rig.slot.narrow_row(one.row, *one.claims[0])
    failures = [(index, name, type(error), told) for index, name, error, told in rig.failures]
    odd = [(index, type(result)) for index, result in rig.odd_results]
    return log, failures, odd, rig.slot.free_rows(), image(rig)


def image(rig: Rig) -> Any:
    """The board without the times that were measured, and without what lies behind the ends of its
    records."""
    raw = bytearray(rig.view._bytes)
    for task in range(3):
        start = layout.O_TASKS + task * layout.TASK_BYTES
        for at in (layout.T_SUM_NS, layout.T_MEAN_NS):
            raw[start + at : start + at + 8] = bytes(8)
        raw[start + layout.T_RUN_BINS : start + layout.T_WAIT_BINS] = bytes(
            layout.T_WAIT_BINS - layout.T_RUN_BINS
        )
    records = [
        [(row, one._replace(started_ms=0, finished_ms=0)) for row, one in rig.view.records(half)]
        for half in range(layout.HALVES)
    ]
    return bytes(raw[: layout.O_HALVES]), records


@pytest.mark.parametrize("seed", range(12))
def test_both_backends_leave_the_same_board(seed: int) -> None:
    compiled, pure = (play(Rig(backend), seed) for backend in BACKENDS)
    for ours, theirs in zip(compiled[:4], pure[:4], strict=True):
        assert ours == theirs
    assert compiled[4][1] == pure[4][1]
    assert compiled[4][0] == pure[4][0]
    assert compiled[1]
    assert compiled[2]
    assert any(compiled[4][1])


# --- what a worker does with leases by the hundred ---


def test_names_rows_and_types_of_leases(rig: Rig) -> None:
    a, b = rig.lease(3, number=1), rig.lease([job("B")], number=2)
    mixed = rig.lease([job("A"), job("B")], number=3)
    again = rig.lease([job("A"), job("B"), job("A")], number=4)
    assert rig.backend.names_of([a, b]) == [a.name, b.name]
    assert rig.backend.rows_of([b, a]) == [b.row, a.row]
    assert rig.backend.types_of([a, b, a, b]) == {b"A", b"B"}
    assert rig.backend.types_of([a]) == {b"A"}
    assert rig.backend.types_of([]) == set()
    assert rig.backend.types_of([rig.lease(2, number=5, options=b'{"timeout_ms":1}')]) == {b"A"}
    for one in (mixed, again):
        assert rig.backend.types_of([a, one]) is None


def test_waits_are_counted_under_the_next_type(rig: Rig) -> None:
    for name in "AB":
        rig.task(lambda: None, name)
    runner = rig.runner()
    leases = [
        rig.lease(4, number=1),
        rig.lease([job("B")] * 3, number=2),
        rig.lease([job("UNKNOWN")], number=3),
    ]
    leases += [rig.lease([job("A"), job("B")], number=4), rig.lease(number=5)]
    runner.take(leases[3])  # its next one is of type B
    runner.take(leases[4])  # nothing of it waits
    leases[0].give_back(1)
    rig.backend.waited(leases, runner.entries, T0_US + 5_000)
    assert rig.bins("A", layout.T_WAIT_BINS) == {12: 1}
    assert rig.bins("B", layout.T_WAIT_BINS) == {12: 4}
    assert rig.task_words("B")[layout.T_WAIT_SUM_US // 8] == 20_000
    rig.backend.waited(leases[:1], runner.entries, T0_US - 1)  # a clock that went back is no wait
    assert rig.bins("A", layout.T_WAIT_BINS) == {0: 1, 12: 1}


# --- which backend serves ---


def test_both_backends_have_all_that_the_engine_uses() -> None:
    fast, pure = BACKENDS
    for name in set(hot.__all__) - {"MODES"}:
        assert getattr(hot, name) is getattr(fast, name), "a silent fallback would cost two orders of speed"
        assert type(getattr(fast, name)) in (int, type) or callable(getattr(pure, name))
    for name in ("Slot", "Entry", "Lease", "Runner", "AsyncJob"):
        theirs = {one for one in dir(getattr(fast, name)) if not one.startswith("_")}
        ours = {one for one in dir(getattr(pure, name)) if not one.startswith("_")}
        data = {one for one in theirs if not callable(getattr(getattr(fast, name), one))}
        assert theirs - data <= ours, name
        assert all(
            getattr(getattr(pure, name), one).__doc__ for one in theirs - data - {"send", "throw", "close"}
        )


def test_the_twin_serves_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqe._fast", None)
    monkeypatch.delattr(tqe, "_fast")
    spec = importlib.util.spec_from_file_location("hot_without_extension", hot.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(getattr(module, name) is getattr(BACKENDS[1], name) for name in set(hot.__all__) - {"MODES"})
