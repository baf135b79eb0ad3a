"""Time limits as the supervisor reads them from the board: by step, dated at first sight, never early."""

from collections.abc import Iterator

import pytest

from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.supervisor.limits import REPEAT_NS, Act, Limits, Verdict

MS = 1_000_000


@pytest.fixture
def slot() -> Iterator[SlotView]:
    yield Board(1).slots[0]


def runs(
    slot: SlotView, step: int, *, soft_ms: int = 0, hard_ms: int = 0, row: int = 0, index: int = 0
) -> None:
    for word, value in (
        (layout.C_TIMEOUT_MS, soft_ms),
        (layout.C_HARD_MS, hard_ms),
        (layout.C_ROW, row),
        (layout.C_INDEX, index),
        (layout.C_IN_USER, step),
    ):
        slot.set(word, value)


def test_a_job_without_limits_is_left_alone(slot: SlotView) -> None:
    limits = Limits()
    runs(slot, 1)
    assert [limits.look(slot, now) for now in (0, 10**18)] == [None, None]


def test_the_soft_limit_is_due_once_and_again_each_second(slot: SlotView) -> None:
    limits = Limits()
    runs(slot, 1, soft_ms=100)
    soft = Verdict(Act.INTERRUPT, 1, layout.CONDEMN_SOFT)
    assert limits.look(slot, 0) is None
    assert limits.look(slot, 99 * MS) is None
    assert limits.look(slot, 100 * MS) == soft
    assert limits.look(slot, 150 * MS) is None
    assert limits.look(slot, 100 * MS + REPEAT_NS) == soft


def test_the_hard_limit_kills(slot: SlotView) -> None:
    limits = Limits()
    runs(slot, 7, soft_ms=100, hard_ms=200)
    limits.look(slot, 0)
    assert limits.look(slot, 200 * MS) == Verdict(Act.KILL, 7, layout.CONDEMN_NONE)


def test_each_step_has_its_own_time(slot: SlotView) -> None:
    limits = Limits()
    runs(slot, 1, soft_ms=100)
    limits.look(slot, 0)
    runs(slot, 2, soft_ms=100)
    assert limits.look(slot, 150 * MS) is None  # seen first just now
    slot.set(layout.C_IN_USER, 0)
    assert limits.look(slot, 300 * MS) is None
    runs(slot, 2, soft_ms=100)
    assert limits.look(slot, 350 * MS) is None
    assert limits.look(slot, 450 * MS) == Verdict(Act.INTERRUPT, 2, layout.CONDEMN_SOFT)


def test_words_of_another_step_are_not_used(slot: SlotView, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits()
    runs(slot, 1, hard_ms=100)
    limits.look(slot, 0)
    get = slot.get

    def moves_on(offset: int) -> int:
        value = get(offset)
        if offset == layout.C_HARD_MS:
            slot.set(layout.C_IN_USER, 2)
        return value

    monkeypatch.setattr(slot, "get", moves_on)
    assert limits.look(slot, 200 * MS) is None


def test_a_new_life_in_the_slot_begins_anew(slot: SlotView) -> None:
    limits = Limits()
    runs(slot, 1, hard_ms=100)
    limits.look(slot, 0)
    limits.forget(slot)
    assert limits.look(slot, 200 * MS) is None


def cancel(slot: SlotView, *, step: int, row: int, index: int) -> None:
    slot.set(layout.C_CANCEL_STEP, step)
    slot.set(layout.C_CANCEL_ROW, (row + 1) << 32 | index)


def test_a_cancelled_job_is_interrupted(slot: SlotView) -> None:
    limits = Limits()
    runs(slot, 4, row=3, index=9)
    cancel(slot, step=4, row=3, index=9)
    assert limits.look(slot, 0) == Verdict(Act.INTERRUPT, 4, layout.CONDEMN_CANCEL)


@pytest.mark.parametrize(("step", "row", "index"), [(5, 3, 9), (0, 3, 9), (4, 2, 9), (4, 3, 8)])
def test_a_cancel_never_hits_another_job(slot: SlotView, step: int, row: int, index: int) -> None:
    limits = Limits()
    runs(slot, 4, row=3, index=9)
    cancel(slot, step=step, row=row, index=index)
    assert limits.look(slot, 0) is None


def test_a_limit_that_ends_after_a_cancel_is_told_at_once(slot: SlotView) -> None:
    limits = Limits()
    runs(slot, 4, soft_ms=100)
    cancel(slot, step=4, row=0, index=0)
    assert limits.look(slot, 0) == Verdict(Act.INTERRUPT, 4, layout.CONDEMN_CANCEL)
    assert limits.look(slot, 100 * MS) == Verdict(Act.INTERRUPT, 4, layout.CONDEMN_SOFT)
