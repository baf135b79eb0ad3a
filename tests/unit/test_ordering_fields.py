"""Reading payloads for predictions: on the clock, named on the board, and nobody else's fault."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.predictors import Told
from tqe import codec
from tqe.board import layout
from tqe.board.board import Board
from tqe.codec import payload
from tqe.ml import score
from tqe.store.model import Order
from tqe.worker import fields, ordering
from tqe.worker.admission import Admission
from tqe.worker.fields import Fields, Marks
from tqe.worker.ordering import NotHere, Ordering, Waiting


@dataclass
class Hand:
    """A clock that moves when it is told."""

    now_ns: int = 1

    def monotonic_ns(self) -> int:
        return self.now_ns

    boottime_ns = monotonic_ns


def reader(clock: Hand, took_us: float) -> Fields:
    """Of a task whose function takes so long."""

    def function(given: dict[str, Any]) -> dict[str, Any]:
        clock.now_ns += int(took_us * 1000)
        return given

    return Fields(function, name="JOB", time=cast(Any, clock))


def batch(read: Fields, jobs: int = 256) -> list[Any]:
    found = [read(b'{"n":1}') for _ in range(jobs)]
    read.end_batch()
    return found


def test_the_limits_are_those_of_predicting() -> None:
    names = ("BATCH_US_MAX", "JOB_US_MAX", "CALL_US", "SLOW_BATCHES_MAX")
    assert [getattr(fields, name) for name in names] == [getattr(score, name) for name in names]


def test_a_function_of_150_us_is_left_alone_for_a_minute_and_then_tried_once() -> None:
    clock = Hand()
    read = reader(clock, 150)
    for _ in range(fields.SLOW_BATCHES_MAX):
        assert batch(read)[0] == {"n": 1.0}
    assert batch(read) == [None] * 256
    clock.now_ns += fields.BREAK_NS
    assert batch(read)[0] == {"n": 1.0}, "the trial"
    assert batch(read) == [None] * 256


def test_a_function_that_is_quick_or_slow_once_is_kept() -> None:
    clock = Hand()
    read = reader(clock, 5)
    for _ in range(10):
        clock.now_ns += 0 if batch(read)[-1] == {"n": 1.0} else pytest.fail("not read")
    slow = reader(clock, 300)
    for _ in range(10):
        batch(slow, 8)
        slow._function = lambda given: given
        batch(slow, 8)
        slow._function = reader(clock, 300)._function
    assert batch(slow, 8)[0] is not None


def test_no_batch_is_read_on_for_more_than_50_ms() -> None:
    clock = Hand()
    found = batch(reader(clock, 20_000))
    assert [one is not None for one in found] == [True] * 3 + [False] * 253


@pytest.fixture
def worker() -> Ordering:
    tasks = {b"JOB": SimpleNamespace(mean_ns=5e7, seen=10_000, is_async=False)}
    view = SimpleNamespace(add=lambda *_: None, put=lambda *_: None, set=lambda *_: None)
    made = Ordering(Told(), cast(Any, view), tasks, Admission(tasks, quantum_ns=1), quantum_ns=1)  # type: ignore[arg-type]
    made.follow(Order("v1", "11" * 32, 1_000_000, 1e6, {"normal": "bounded"}, "model"))
    return made


def test_a_slow_function_closes_its_type_and_not_the_predictor(worker: Ordering) -> None:
    clock = Hand()
    worker.time, worker.fields = cast(Any, clock), {b"JOB": reader(clock, 150)}
    kinds = [(b"JOB", json.dumps({"ms": n + 1}).encode(), b"", False) for n in range(100)]
    frame = codec.pack(
        kinds, frame_id=b"01JD8Z3V7Q8K2M4N6P8R0T0000", lane="normal", tracked=True, enqueued_us=10**15
    )
    for _ in range(fields.SLOW_BATCHES_MAX + 2):
        worker.arrange([frame], {"normal": 1}, held_ns=0, idle=True, free_slots=1)
    asked = cast(Told, worker.predictor).asked
    assert [job.fields is None for job in asked[::100]] == [False] * 4 + [True] * 2
    assert worker.bounds["normal"] > 0 and worker._own["slow"] == 1


def test_a_payload_that_is_too_long_to_be_read_is_not_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "decompress", lambda stored: pytest.fail("decompressed"))
    plain = json.dumps({"text": "a" * 100_000}).encode()
    stored, zstd = payload.compress(plain)
    assert zstd
    one = codec.pack([(b"JOB", b"{}", b"", False)], frame_id=b"0" * 26, lane="normal", tracked=True)
    header = codec.parse(one)
    job = ordering._waiting(header, (0, b"JOB", stored, b"", True))
    assert (job.payload, job.payload_bytes) == (b"", len(plain))
    assert Waiting("JOB", "normal", b"{}", 0, 1).payload_bytes == 2


# ------------------------------------------------------------------ what the board says


def test_the_board_names_the_type_while_its_function_runs() -> None:
    board = Board(1)
    view = board.slots[0]
    seen: list[int] = []

    def function(given: dict[str, Any]) -> dict[str, Any]:
        seen.append(view.get(layout.C_FEATURES))
        return given

    read = Fields(function, name="JOB", number=6, marks=Marks(board, view))
    assert read(b"{}") == {} and (seen, view.get(layout.C_FEATURES)) == ([7], 0)
    assert board.blame_features("JOB") == 1 and read(b"{}") == {}
    assert board.blame_features("JOB") == 2 and read(b"{}") is None
    assert len(seen) == 2 and not board.features_off("OTHER")


def test_where_too_many_types_have_ended_workers_all_are_off() -> None:
    board = Board(1)
    for number in range(layout.FEATURES_MAX):
        board.blame_features(chr(65 + number) * 64)
    assert not board.features_off("A" * 64) and not board.features_off("Z")
    board.blame_features("Z")
    assert board.features_off("A" * 64) and board.features_off("Z"), "then it is all of them"


# ------------------------------------------------------------------ a version that cannot be loaded


@pytest.mark.parametrize("error", [NotHere("v2"), ValueError("damaged")])
def test_what_stays_loaded_keeps_its_own_T_and_m_and_is_to_blame(worker: Ordering, error: Exception) -> None:
    def load(version: str) -> None:
        raise error

    cast(Any, worker.predictor).load = load
    used: list[str] = []
    cast(Any, worker.predictor).use = used.append
    worker.follow(Order("v2", "22" * 32, 9_000_000, 9e6, {"normal": "bounded", "low": "sjf"}, "mean"))
    order = worker._order
    assert (order.version, order.sha256, order.bound_us, order.mean_us) == ("v1", "11" * 32, 1_000_000, 1e6)
    assert order.modes["low"] == "sjf" and used == ["mean"], "it rises no higher, and falls when told"
    assert worker.bounds["normal"] == 1_000_000
