"""Whose loop is kept free while both kinds of jobs come: the decision as a table, over time, on the board."""

from typing import Any, cast

import pytest

from tests.support.fake_clock import FakeClock
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.settings import Settings
from tqe.steward.context import Context
from tqe.steward.roles import COMES, ENDS, UNTIL_MS, Kinds, Roles, RolesReport, Seen, after, decide
from tqe.store.keys import Keys
from tqe.worker.peers import Peers

BOTH = Kinds(1.0, 1.0)


@pytest.mark.parametrize(
    ("workers", "free"),
    [
        # nobody to share the kinds with
        ([], None),
        ([Seen(0, 5)], None),
        ([Seen(0, 5, True)], None),
        # the one with the most coroutines, else the first
        ([Seen(0, 3), Seen(1, 9)], 1),
        ([Seen(4, 3), Seen(6, 3)], 4),
        ([Seen(4, 0), Seen(6, 0)], 4),
        # it stays so
        ([Seen(0, 9), Seen(1, 0, True)], 1),
        # the one before has gone
        ([Seen(0, 0), Seen(2, 4)], 2),
    ],
)
def test_whose_loop_is_kept_free(workers: list[Seen], free: int | None) -> None:
    assert decide(workers, BOTH) == free


def test_it_begins_when_both_kinds_come_and_ends_when_one_of_them_is_rare() -> None:
    before, during = [Seen(0, 0), Seen(1, 1)], [Seen(0, 0), Seen(1, 1, True)]
    between = (COMES + ENDS) / 2
    for kinds in (Kinds(1.0, between), Kinds(between, 1.0)):
        assert (decide(before, kinds), decide(during, kinds)) == (None, 1)
    for kinds in (Kinds(1.0, ENDS / 2), Kinds(ENDS / 2, 1.0)):
        assert decide(during, kinds) is None


def test_one_look_at_both_kinds_is_not_enough_and_a_second_of_them_is() -> None:
    kinds = after(Kinds(), sync=True, coroutines=True)
    assert decide([Seen(0, 1), Seen(1, 1)], kinds) is None
    for _ in range(9):
        kinds = after(kinds, sync=True, coroutines=True)
    assert decide([Seen(0, 1), Seen(1, 1)], kinds) == 0


@pytest.fixture
def context(fake_clock: FakeClock) -> Context:
    """Without Redis: roles are a matter of the board."""
    return Context(Settings(), Board(3), cast(Any, None), Keys(), "here", fake_clock)


def worker(context: Context, number: int, *, coroutines: int = 0, helper: int = 0) -> SlotView:
    slot = context.board.slots[number]
    slot.set(layout.C_STATE, layout.LIVE)
    slot.set(layout.C_READY, 1)
    slot.set(layout.C_ASYNC, coroutines + helper)
    slot.set(layout.C_HELPER, helper)
    return slot


def looks(duty: Roles, times: int = 20) -> int | None:
    return [duty.run_once() for _ in range(times)][-1].free


def test_it_is_renewed_at_each_look(context: Context, fake_clock: FakeClock) -> None:
    first, second = worker(context, 0, coroutines=4, helper=1), worker(context, 1, coroutines=2)
    duty = Roles(context)
    assert duty.run_once() == RolesReport()
    assert looks(duty) == 0
    fake_clock.advance(ms=1_000)
    duty.run_once()
    assert first.get(layout.C_APART_UNTIL) == context.now_ns() + UNTIL_MS * 1_000_000
    assert second.get(layout.C_APART_UNTIL) == 0


@pytest.mark.parametrize(
    "word", [(layout.C_READY, 0), (layout.C_STOP, layout.STOP_DRAIN), (layout.C_STATE, layout.DEAD)]
)
def test_who_cannot_work_is_not_counted(context: Context, word: tuple[int, int]) -> None:
    worker(context, 0, coroutines=4, helper=1).set(*word)
    alone = worker(context, 1, coroutines=2, helper=1)
    assert looks(Roles(context)) is None
    assert alone.get(layout.C_APART_UNTIL) == 0


def test_one_kind_alone_needs_nothing(context: Context) -> None:
    for number in (0, 1):
        worker(context, number, coroutines=3).set(layout.C_IN_USER, 7)  # the step of a coroutine
    assert looks(Roles(context)) is None
    for number in (0, 1):
        worker(context, number, helper=1)
    assert looks(Roles(context)) is None


def test_a_synchronous_job_of_a_worker_without_coroutines_is_seen_too(context: Context) -> None:
    worker(context, 0).set(layout.C_IN_USER, 7)
    worker(context, 1, coroutines=3)
    assert looks(Roles(context)) == 1


def test_it_ends_with_the_mixture(context: Context) -> None:
    slots = [worker(context, 0, coroutines=4, helper=1), worker(context, 1, coroutines=2)]
    duty = Roles(context)
    assert looks(duty) == 0
    worker(context, 0, coroutines=4)
    assert looks(duty) == 0, "it may only be a pause"
    assert looks(duty, 200) is None
    assert [slot.get(layout.C_APART_UNTIL) for slot in slots] == [0, 0]


def test_no_synchronous_job_is_handed_to_a_loop_that_is_kept_free(context: Context) -> None:
    """There it would be off the main thread too."""
    own, other = worker(context, 0, coroutines=1), worker(context, 1)
    other.set(layout.C_PHASE, layout.PHASE_IDLE)
    peers = Peers(context.board, own)
    assert peers.takes_sync()
    other.set(layout.C_APART_UNTIL, 1 << 62)
    assert not peers.takes_sync()


def test_the_next_steward_goes_on_with_what_is_not_void(context: Context, fake_clock: FakeClock) -> None:
    worker(context, 0, coroutines=4, helper=1)
    worker(context, 1, coroutines=2)
    looks(Roles(context))
    fake_clock.advance(ms=UNTIL_MS - 1)
    assert Roles(context).run_once() == RolesReport(0)
    fake_clock.advance(ms=UNTIL_MS)
    assert Roles(context).run_once() == RolesReport()
