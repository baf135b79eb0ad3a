"""Admission: how much of what was fetched a worker keeps, and into which pieces the rest is cut."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqe.worker.admission import PIECES_MAX, RAMP, UNMEASURED_PIECES, Admission, even_pieces

QUANTUM = 5_000_000  # ns
MS = 1_000_000


@dataclass
class Fake:
    mean_ns: float = -1.0
    seen: int = 10_000
    is_async: bool = False


TASKS: dict[bytes, Fake] = {
    b"NOOP": Fake(500.0),
    b"ZERO": Fake(0.0),
    b"MS": Fake(1.0 * MS),
    b"MS3": Fake(3.0 * MS),
    b"SECOND": Fake(1_000.0 * MS),
    b"NEW": Fake(-1.0, 0),
    b"NEW2": Fake(-1.0, 0),
    b"SLOW_IO": Fake(1_000.0 * MS, is_async=True),
    b"FAST_IO": Fake(1.0 * MS, is_async=True),
    b"NEW_IO": Fake(-1.0, 0, is_async=True),
}
SLOTS = 10  # coroutines at once


def keep(
    *ahead: tuple[bytes, int], held_ms: float = 0, free_slots: int = 0, must: bool = False
) -> tuple[int, float, tuple[int, ...]]:
    kept = Admission(TASKS, quantum_ns=QUANTUM, slots=SLOTS).keep(
        list(ahead), held_ns=held_ms * MS, free_slots=free_slots, must=must
    )
    return kept.jobs, kept.predicted_ns, kept.pieces


# --- how much ---


def test_a_quantum_of_predicted_work_is_kept() -> None:
    assert keep((b"NOOP", 1_000)) == (1_000, 500_000, ())
    assert keep((b"MS", 5)) == (5, 5 * MS, ())
    assert keep((b"MS", 1_000))[:2] == (5, 5 * MS)
    assert keep((b"MS", 1_000), held_ms=2.5)[:2] == (2, 2 * MS)
    assert keep((b"MS3", 1_000))[:2] == (1, 3 * MS)


@pytest.mark.parametrize("held_ms", [5, 6, 1_000_000])
def test_nothing_is_kept_by_a_worker_that_has_its_quantum(held_ms: float) -> None:
    assert keep((b"MS", 10), held_ms=held_ms)[:2] == (0, 0)
    assert keep((b"SECOND", 10))[:2] == (0, 0)


def test_an_idle_worker_takes_one_job_however_long() -> None:
    assert keep((b"SECOND", 10), must=True)[:2] == (1, 1_000 * MS)
    assert keep((b"SECOND", 1), (b"NOOP", 9), must=True)[:2] == (1, 1_000 * MS)
    assert keep((b"MS", 10), held_ms=9, must=True)[:2] == (1, 1 * MS)


def test_must_asks_for_one_job_of_the_frame_not_for_one_of_each_type() -> None:
    assert keep((b"MS", 2), (b"SECOND", 3), must=True)[:2] == (2, 2 * MS)


def test_several_types_share_the_quantum() -> None:
    assert keep((b"MS", 2), (b"MS3", 1), (b"NOOP", 100))[0] == 3
    assert keep((b"MS", 1), (b"MS3", 1), (b"NOOP", 1_000)) == (1_002, 4.5 * MS, ())
    assert keep((b"MS", 1), (b"MS3", 5), (b"NOOP", 1_000))[0] == 2  # what follows one that does not fit


def test_what_takes_no_time_is_kept_whole() -> None:
    assert keep((b"ZERO", 1_000)) == (1_000, 0, ())


def test_an_unknown_type_is_kept_to_be_settled() -> None:
    assert keep((b"UNKNOWN", 1_000), held_ms=99) == (1_000, 0, ())
    assert keep((b"UNKNOWN", 2), (b"SECOND", 2))[0] == 2
    assert keep((b"UNKNOWN", 2), (b"SECOND", 2), must=True)[0] == 2  # those give it something to do


# --- types that were never measured ---


@pytest.mark.parametrize(
    ("seen", "jobs"), [(0, 1), (1, 8), (8, 8), (9, 64), (72, 64), (73, 512), (585, 1_000)]
)
def test_the_ramp(seen: int, jobs: int) -> None:
    tasks = {b"T": Fake(500.0, seen)}
    kept = Admission(tasks, quantum_ns=QUANTUM).keep([(b"T", 1_000)], held_ns=0, free_slots=0, must=True)
    assert kept.jobs == jobs


def test_the_ramp_climbs_by_what_it_lets_in() -> None:
    seen = 0
    for bound, jobs in RAMP:
        assert seen < bound
        seen += jobs
    assert seen == RAMP[-1][0]


def test_a_job_never_measured_fills_the_quantum() -> None:
    """Or a fetch of a thousand frames of one would be kept whole, whatever they turn out to take."""
    jobs, predicted, pieces = keep((b"NEW", 1_000), must=True)
    assert (jobs, predicted, sum(pieces)) == (1, QUANTUM, 999)
    assert keep((b"NEW", 1))[:2] == (1, QUANTUM)
    assert keep((b"NEW", 1), held_ms=QUANTUM / MS)[:2] == (0, 0)
    assert keep((b"NEW", 1), held_ms=0.1)[:2] == (0, 0)


def test_types_that_alternate_do_not_climb_past_the_ramp() -> None:
    ahead = [(b"NEW", 1), (b"NEW2", 1)] * 500
    assert keep(*ahead, must=True)[0] == 1
    tasks = {b"A": Fake(1.0, 1), b"B": Fake(1.0, 1)}
    kept = Admission(tasks, quantum_ns=QUANTUM).keep(
        [(b"A", 1), (b"B", 1)] * 500, held_ns=0, free_slots=0, must=True
    )
    assert kept.jobs == 16
    assert sum(kept.pieces) == 984


# --- coroutines ---


@pytest.mark.parametrize("name", [b"SLOW_IO", b"NEW_IO"])
def test_as_many_coroutines_as_can_start(name: bytes) -> None:
    assert keep((name, 1_000), free_slots=7, held_ms=99)[0] == 7
    assert keep((name, 4), free_slots=7)[0] == 4
    assert keep((name, 10), free_slots=0)[0] == 0
    assert keep((name, 10), free_slots=0, must=True)[0] == 1
    assert keep((name, 10), free_slots=-5, must=True)[0] == 1


def test_of_short_coroutines_as_many_as_will_have_started_within_the_quantum() -> None:
    """Ten slots, a millisecond each: fifty in five milliseconds."""
    assert keep((b"FAST_IO", 1_000), free_slots=0)[:2] == (50, 5 * MS)
    assert keep((b"FAST_IO", 1_000), free_slots=10, held_ms=3)[:2] == (20, 2 * MS)
    assert keep((b"FAST_IO", 1_000), free_slots=10, held_ms=99)[:2] == (10, 1 * MS)


def test_coroutines_that_were_not_measured_often_enough_count_as_long() -> None:
    for seen, jobs in ((SLOTS - 1, 3), (SLOTS, 50)):
        admission = Admission({b"T": Fake(1.0 * MS, seen, is_async=True)}, quantum_ns=QUANTUM, slots=SLOTS)
        assert admission.keep([(b"T", 100)], held_ns=0, free_slots=3, must=True).jobs == jobs


def test_coroutines_count_for_what_follows_them() -> None:
    assert keep((b"FAST_IO", 30), (b"MS", 9), free_slots=10)[:2] == (32, 5 * MS)
    assert keep((b"NEW_IO", 3), (b"MS", 9), free_slots=10)[:2] == (8, 5 * MS)
    assert keep((b"SLOW_IO", 1), (b"MS", 9), free_slots=10)[:2] == (1, 100 * MS)


def test_runs_of_coroutines_share_the_slots() -> None:
    assert keep((b"NEW_IO", 7), (b"NOOP", 5), (b"NEW_IO", 7), free_slots=10)[0] == 15
    assert keep((b"NEW_IO", 20), (b"NOOP", 5), free_slots=10)[0] == 10


# --- pieces ---


def test_nothing_left_makes_no_pieces() -> None:
    assert keep((b"MS", 5))[2] == ()
    assert even_pieces(5, 5) == (1, 1, 1, 1, 1)
    assert even_pieces(7, 3) == (3, 2, 2)


@pytest.mark.parametrize(
    ("jobs", "pieces"),
    [
        (1, (1,)), (4, (4,)), (9, (9,)), (10, (5, 5)), (11, (6, 5)), (14, (7, 7)), (15, (5, 5, 5)),
        (160, (5,) * 32), (995, (32,) * 3 + (31,) * 29),
    ],
)  # fmt: skip
def test_pieces_of_one_type_are_even_and_at_least_a_quantum(jobs: int, pieces: tuple[int, ...]) -> None:
    assert keep((b"MS", jobs), held_ms=99) == (0, 0, pieces)


def test_long_jobs_go_back_one_by_one() -> None:
    assert keep((b"SECOND", 10), must=True) == (1, 1_000 * MS, (1,) * 9)
    assert keep((b"SECOND", 100), must=True)[2] == (4,) * 3 + (3,) * 29


def test_what_is_not_measured_goes_back_in_eight() -> None:
    assert keep((b"NEW", 1_000), held_ms=99)[2] == (125,) * UNMEASURED_PIECES
    assert keep((b"NEW", 5), held_ms=99)[2] == (1,) * 5
    assert keep((b"SECOND", 4), (b"FAST_IO", 6), held_ms=99)[2] == (2, 2, 1, 1, 1, 1, 1, 1)


def test_pieces_of_several_types_have_equal_work() -> None:
    jobs, _, pieces = keep((b"SECOND", 1), (b"MS", 10), (b"NOOP", 100), (b"MS3", 2))
    assert jobs == 0
    assert pieces == (1, 10 + 100 + 2)  # a 32nd of the work is 31 ms: the second, and all the rest
    assert keep((b"MS3", 4), (b"MS", 4), held_ms=99)[2] == (2, 6)
    assert keep((b"MS3", 4), (b"MS", 5), held_ms=99)[2] == (2, 2, 5)
    assert keep((b"MS", 10), (b"MS3", 5), held_ms=99)[2] == (5, 5, 2, 3)
    assert keep((b"NOOP", 10), (b"MS", 25))[2] == (6, 5, 5, 5)  # all that is left is of one type
    assert keep((b"MS3", 4), (b"MS", 1), held_ms=99)[2] == (2, 3)  # less than a quantum joins what is before


RUNS = st.lists(st.tuples(st.sampled_from(sorted(TASKS)), st.integers(1, 300)), min_size=1, max_size=12)


@given(
    RUNS, st.floats(0, 20), st.integers(-1, 40), st.booleans(), st.sampled_from([b"UNKNOWN", b"NOOP"])
)  # fmt: skip
def test_what_is_kept_and_the_pieces_are_the_frame(
    runs: list[tuple[bytes, int]], held_ms: float, free_slots: int, must: bool, last: bytes
) -> None:
    runs = [*runs, (last, 1)]
    total = sum(jobs for _, jobs in runs)
    jobs, predicted, pieces = keep(*runs, held_ms=held_ms, free_slots=free_slots, must=must)
    assert jobs + sum(pieces) == total
    assert len(pieces) <= PIECES_MAX
    assert all(piece >= 1 for piece in pieces)
    flat = [key for key, n in runs for _ in range(n)]
    assert predicted == pytest.approx(sum(map(cost_of, flat[:jobs])))
    assert jobs >= 1 or not must
    # what follows fits into the quantum, but for the one job that an idle worker must take
    work = 0.0
    for at, key in enumerate(flat[:jobs]):
        work += cost_of(key)
        if key in TASKS and not TASKS[key].is_async and cost_of(key):
            assert held_ms * MS + work <= QUANTUM * (1 + 1e-9) or (must and at == 0)
    assert sum(key == b"NEW_IO" for key in flat[:jobs]) <= max(free_slots, 1 if must else 0)
    rest = flat[jobs:]
    measured = all(key in TASKS and TASKS[key].mean_ns >= 0 and not TASKS[key].is_async for key in rest)
    if measured and len(pieces) > 1:
        at = 0
        for piece in pieces:
            assert sum(map(cost_of, rest[at : at + piece])) >= QUANTUM * (1 - 1e-9)
            at += piece


def cost_of(key: bytes) -> float:
    """Predicted time that a job takes of its worker, ns."""
    task = TASKS.get(key)
    if task is None:
        return 0.0
    if task.is_async:
        return task.mean_ns / SLOTS if task.seen >= SLOTS else 0.0
    return task.mean_ns if task.mean_ns >= 0 else QUANTUM


# --- frames that need no look ---


def test_quick_is_for_types_that_are_known_to_be_short() -> None:
    known = {b"A": Fake(500.0), b"B": Fake(1_000.0)}
    admission = Admission(known, quantum_ns=QUANTUM)
    both = {b"A", b"B"}
    assert admission.quick(both, 1_000, 0) == 1_000
    assert admission.quick({b"A"}, 1_000, 0) == 500
    assert admission.quick(both, 10_000, 0) == 1_000
    assert admission.quick(both, 10_001, 0) is None
    assert admission.quick(both, 5_000, QUANTUM) == 1_000
    assert admission.quick(both, 5_001, QUANTUM) is None
    for odd in (Fake(1.0, 584), Fake(1.0, 584, is_async=True), Fake(-1.0, 0)):
        admission = Admission(known | {b"C": odd}, quantum_ns=QUANTUM)
        assert admission.quick(both | {b"C"}, 1, 0) is None
        assert admission.quick(both, 1, 0) == 1_000  # not fetched: it says nothing
    assert admission.quick({b"UNKNOWN"}, 1, 0) is None
    slow = Fake(1e6, is_async=True)
    assert Admission(known | {b"C": slow}, quantum_ns=QUANTUM, slots=100).quick(both | {b"C"}, 1, 0) == 10_000
