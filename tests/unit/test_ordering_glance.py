"""A lane of no-op jobs is left FIFO at a glance; every other one is read and ordered."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.predictors import Told
from tqe import codec
from tqe.store.model import Order
from tqe.worker import ordering
from tqe.worker.admission import Admission
from tqe.worker.ordering import Ordering

LONG = (b"LONG", b'{"ms":50}')
TINY = (b"TINY", b'{"ms":0.001}')
NEW = (b"NEW", b'{"ms":1}')


def entry(mean_ns: float) -> Any:
    return SimpleNamespace(mean_ns=mean_ns, seen=10_000, is_async=False)


@pytest.fixture
def worker() -> Ordering:
    tasks = {b"TINY": entry(900.0), b"LONG": entry(5e7), b"NEW": entry(-1.0)}
    view = SimpleNamespace(add=lambda *_: None, put=lambda *_: None, set=lambda *_: None)
    admission = Admission(tasks, quantum_ns=5_000_000)
    made = Ordering(Told(), cast(Any, view), tasks, admission, quantum_ns=5_000_000)
    made.follow(
        Order(
            modes={"normal": "bounded"},
            version="v1",
            sha256="",
            rung="model",
            bound_us=10_000_000,
            mean_us=1e6,
        )
    )
    return made


def frames(*jobs: Sequence[tuple[bytes, bytes]], flags: int = 0, options: bytes = b"") -> list[bytes]:
    return [
        codec.pack(
            [(kind, payload, b"", False) for kind, payload in ours],
            frame_id=b"01JD8Z3V7Q8K2M4N6P8R0T%04d" % at,
            lane="normal",
            tracked=True,
            flags=flags,
            options=options,
            enqueued_us=1_764_000_000_000_000 + at,
        )
        for at, ours in enumerate(jobs)
    ]


def arrange(worker: Ordering, waiting: list[bytes]) -> ordering.Plan:
    return worker.arrange(waiting, {"normal": 1 << 60}, held_ns=0, idle=True, free_slots=1)


def test_tiny_jobs_in_frames_of_one_are_left_unread(
    worker: Ordering, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(frame: bytes) -> None:
        raise AssertionError("a window was read")

    monkeypatch.setattr(codec, "parse", read)
    waiting = frames(*[[TINY]] * 50)
    assert arrange(worker, waiting) == ordering.Plan(waiting, {}, [], [])
    assert worker.bounds == {"normal": 0}, "FIFO until it is looked at again"
    assert not worker.on


@pytest.mark.parametrize(
    "waiting",
    [
        frames(*[[TINY]] * 40, [LONG]),
        frames(*[[TINY]] * 40, [NEW]),
        frames([TINY, TINY], [LONG]),
    ],
    ids=["one long job among them", "one of a type never measured", "a larger frame"],
)
def test_what_may_be_worth_it_is_read_and_scored(worker: Ordering, waiting: list[bytes]) -> None:
    arrange(worker, waiting)
    assert len(cast(Told, worker.predictor).asked) > 0
    assert worker.bounds["normal"] > 0


@pytest.mark.parametrize("damage", [100, 129], ids=["within its header", "within its first job"])
def test_a_damaged_frame_is_kept_for_who_refuses_it(worker: Ordering, damage: int) -> None:
    waiting = frames(*[[TINY]] * 3)
    waiting[1] = waiting[1][:damage]
    assert sorted(arrange(worker, waiting).kept) == sorted(waiting)


def test_the_judgement_is_that_of_a_window(worker: Ordering) -> None:
    """Frames with options are read; they come to the same end."""
    waiting = frames(*[[TINY]] * 50, options=b'{"max_retries":1}')
    assert arrange(worker, waiting).kept == waiting
    assert worker.bounds == {"normal": 0}
    assert cast(Told, worker.predictor).asked == []
