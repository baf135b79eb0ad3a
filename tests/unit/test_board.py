"""The board: rows, states and outcome records as a worker writes them and as the steward reads them."""

import struct
from types import ModuleType
from typing import Any

import pytest

from tests.support import hotpath
from tests.support.hotpath import BACKENDS, NAMES, Rig, frame_id
from tqe import formats
from tqe.board import layout
from tqe.board.board import Board, Record, Row, SlotView, find_row
from tqe.telemetry import metrics

ID = frame_id(1)


@pytest.fixture(params=BACKENDS, ids=NAMES)
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def leave_rows(rig: Rig, rows: int) -> None:
    """Take rows until so many are left."""
    while rig.slot.free_rows()[0] > rows:
        rig.slot.open_row(ID, 0, 1, 0)


def half_of(view: SlotView, number: int) -> memoryview:
    start = layout.O_HALVES + number * layout.HALF_BYTES
    return view._bytes[start : start + layout.HALF_BYTES]


# --- the layout ---


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
def test_both_backends_use_the_layout(backend: ModuleType) -> None:
    constants = backend.board_constants()
    assert constants == {name: getattr(layout, name) for name in constants}
    assert len(constants) > 45


def test_the_layout_has_no_overlaps() -> None:
    header = [layout.H_BURST_DONE + 8, layout.H_RECOVERY + layout.SLOTS_MAX * layout.RECOVERY_BYTES]
    assert header[0] <= layout.H_RECOVERY
    assert layout.H_CLIMB + 2 * layout.WORD * len(metrics.TOTALS) <= layout.H_FEATURES
    assert layout.H_FEATURES + layout.FEATURES_MAX * layout.FEATURES_BYTES <= layout.H_RECOVERY
    assert layout.FEATURES_BYTES == layout.WORD + layout.TASK_NAME_BYTES
    assert header[1] <= layout.HEADER_BYTES
    words = {
        name: at for name, at in vars(layout).items() if name.startswith("C_") and at < layout.C_COUNTERS
    }
    assert len(set(words.values())) == len(words)
    assert all(at % layout.WORD == 0 for at in words.values())
    assert layout.C_COUNTERS + layout.WORD * len(layout.COUNTERS) <= layout.C_INCARNATION
    assert layout.C_CANCEL_ID + 32 <= layout.CONTROL_BYTES
    assert layout.T_RUN_BINS + layout.WORD * layout.BINS <= layout.T_WAIT_BINS
    assert layout.T_WAIT_BINS + layout.WORD * layout.BINS <= layout.TASK_BYTES
    assert layout.R_STATES + layout.INLINE_JOBS == layout.ROW_BYTES
    assert layout.BLOCK_BYTES >= formats.FRAME_JOBS_MAX
    assert struct.calcsize(layout.RECORD_STRUCT) == layout.RECORD_HEADER_BYTES
    assert layout.SLOT_BYTES % layout.WORD == 0
    # what a job may leave behind: its result, its error, both headers
    assert layout.ROOM_BYTES >= formats.RESULT_BYTES_CEILING + 8_192 + layout.RECORD_HEADER_BYTES


def test_a_board_says_what_it_is() -> None:
    board = Board(3)
    assert board.memory.nbytes == layout.board_bytes(3)
    assert bytes(board.memory[:8]) == b"TQEBOARD"
    assert board.get(layout.H_VERSION) == formats.BOARD
    assert (board.get(layout.H_SLOTS), board.get(layout.H_SLOT_BYTES)) == (3, layout.SLOT_BYTES)
    assert [view.number for view in board.slots] == [0, 1, 2]


@pytest.mark.parametrize("slots", [0, -1, layout.SLOTS_MAX + 1])
def test_a_board_has_a_sane_number_of_slots(slots: int) -> None:
    with pytest.raises(ValueError, match="slots"):
        Board(slots)


def test_recovery_ids_and_slot_states_by_slot() -> None:
    board = Board(3)
    board.set_recovery_id(1, ID.decode())
    assert [board.recovery_id(k) for k in range(3)] == ["", ID.decode(), ""]
    board.set_recovery_id(1, "")
    assert board.recovery_id(1) == ""
    board.slots[0].set(layout.C_STATE, layout.DEAD)
    assert board.free_slot() is board.slots[1]
    assert board.in_state(layout.DEAD) == [board.slots[0]]
    for view in board.slots:
        view.set(layout.C_STATE, layout.LIVE)
    assert board.free_slot() is None


def test_words_texts_and_counters_of_a_slot() -> None:
    view = Board(2).slots[1]
    assert view.incarnations == []
    view.set_text(layout.C_INCARNATION, "A" * 26)
    assert view.incarnations == ["A" * 26]
    view.set_text(layout.C_NEXT_INCARNATION, "B" * 26)
    assert view.incarnations == ["A" * 26, "B" * 26]
    view.set_text(layout.C_NEXT_INCARNATION, "A" * 26)
    assert view.incarnations == ["A" * 26]
    view.set_text(layout.C_NEXT_INCARNATION, "")
    assert view.text(layout.C_NEXT_INCARNATION) == ""
    view.add("fetches")
    view.add("fetches", 4)
    view.put("completed", 7)
    assert {name: n for name, n in view.counters().items() if n} == {"fetches": 5, "completed": 7}


@pytest.mark.parametrize("offset", [-8, 4, layout.SLOT_BYTES, 1 << 40])
def test_a_slot_must_lie_in_the_board(rig: Rig, offset: int) -> None:
    with pytest.raises(ValueError, match="too small"):
        rig.backend.Slot(rig.board.memory, offset)


# --- rows ---


def test_a_row_is_what_was_fetched(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 100, 5, 7)
    assert rig.view.rows() == [Row(row, ID, 100, 5, 100, 7, bytes(5))]
    assert rig.view.row(row) == rig.view.rows()[0]
    assert rig.slot.free_rows() == (layout.ROWS - 1, layout.BLOCKS)


@pytest.mark.parametrize(("n", "blocks"), [(1, 0), (8, 0), (9, 1), (1000, 1)])
def test_states_are_inline_up_to_eight_jobs(rig: Rig, n: int, blocks: int) -> None:
    row = rig.slot.open_row(ID, 0, n, 0)
    assert rig.slot.free_rows() == (layout.ROWS - 1, layout.BLOCKS - blocks)
    for index in range(n):
        rig.slot.set_state(row, index, 1 + index % 4)
    expected = bytes(1 + index % 4 for index in range(n))
    assert rig.slot.states(row) == expected
    assert rig.view.row(row).states == expected


@pytest.mark.parametrize(
    ("name", "base", "n"), [(ID[:25], 0, 1), (ID, 0, 0), (ID, 0, 1001), (ID, -1, 1), (ID, 1000, 1)]
)
def test_what_is_no_lease_gets_no_row(rig: Rig, name: bytes, base: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a lease"):
        rig.slot.open_row(name, base, n, 0)
    assert rig.slot.free_rows() == (layout.ROWS, layout.BLOCKS)


def test_a_narrowed_row_keeps_its_states_from_the_base_that_was_fetched(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 10, 20, 3)
    rig.slot.set_state(row, 17, layout.JOB_DONE)
    rig.slot.narrow_row(row, 15, 6)
    found = rig.view.row(row)
    assert (found.base, found.n, found.first, found.run) == (15, 6, 10, 3)
    assert len(found.states) == 11  # from what was fetched to the end of what is left
    assert found.state(17) == layout.JOB_DONE
    rig.slot.narrow_row(row, 16, 1)
    rig.slot.set_state(row, 16, layout.JOB_STARTED)
    assert rig.view.row(row).state(16) == layout.JOB_STARTED
    assert rig.slot.states(row) == bytes([0] * 6 + [1])


@pytest.mark.parametrize(("base", "n"), [(9, 3), (10, 21), (29, 2), (15, 0), (15, -1)])
def test_a_row_only_narrows(rig: Rig, base: int, n: int) -> None:
    row = rig.slot.open_row(ID, 10, 20, 3)
    before = bytes(rig.view._bytes)
    with pytest.raises(ValueError, match="not a part"):
        rig.slot.narrow_row(row, base, n)
    assert bytes(rig.view._bytes) == before


def test_a_free_row_cannot_be_narrowed_or_closed_again(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 0, 2, 0)
    rig.slot.close_row(row)
    with pytest.raises(ValueError, match="not a part"):
        rig.slot.narrow_row(row, 0, 1)
    with pytest.raises(ValueError, match="free already"):
        rig.slot.close_row(row)
    with pytest.raises(IndexError):
        rig.slot.set_state(row, 0, layout.JOB_DONE)
    assert rig.slot.states(row) == b""
    # two leases never share a row
    assert len({rig.slot.open_row(ID, 0, 1, 0) for _ in range(10)}) == 10


@pytest.mark.parametrize("row", [-1, layout.ROWS])
def test_there_is_no_such_row(rig: Rig, row: int) -> None:
    for call in (rig.slot.close_row, rig.slot.states):
        with pytest.raises(IndexError):
            call(row)
    with pytest.raises(IndexError):
        rig.slot.set_state(row, 0, 1)
    with pytest.raises(IndexError):
        rig.slot.record(row, 0, layout.OUT_DONE)
    assert rig.records() == []


@pytest.mark.parametrize("n", [3, 30])
def test_a_row_used_again_shows_nothing_of_its_last_lease(rig: Rig, n: int) -> None:
    row = rig.slot.open_row(ID, 0, n, 9)
    for index in range(n):
        rig.slot.set_state(row, index, layout.JOB_DONE)
    rig.slot.narrow_row(row, 1, 1)
    rig.slot.close_row(row)
    assert rig.view.rows() == []
    assert rig.slot.free_rows() == (layout.ROWS, layout.BLOCKS)
    again = rig.slot.open_row(frame_id(2), 5, n, 1)
    assert again == row
    assert rig.view.rows() == [Row(row, frame_id(2), 5, n, 5, 1, bytes(n))]


def test_rows_run_out(rig: Rig) -> None:
    leave_rows(rig, 0)
    with pytest.raises(IndexError, match="no free row"):
        rig.slot.open_row(ID, 0, 1, 0)
    assert len(rig.view.rows()) == layout.ROWS
    rig.slot.close_row(77)
    assert rig.slot.open_row(ID, 0, 1, 0) == 77


def test_state_blocks_run_out(rig: Rig) -> None:
    rows = [rig.slot.open_row(ID, 0, 9, 0) for _ in range(layout.BLOCKS)]
    with pytest.raises(IndexError, match="no free row"):
        rig.slot.open_row(ID, 0, 9, 0)
    assert rig.slot.free_rows() == (layout.ROWS - layout.BLOCKS, 0)  # the refused one took nothing
    rig.slot.open_row(ID, 0, 8, 0)
    rig.slot.close_row(rows[3])
    assert rig.slot.open_row(ID, 0, 1000, 0) == rows[3]


@pytest.mark.parametrize("index", [9, 30, -1, 1 << 20])
def test_a_state_outside_of_the_row_is_refused(rig: Rig, index: int) -> None:
    row = rig.slot.open_row(ID, 10, 20, 0)
    before = bytes(rig.view._bytes)
    with pytest.raises(IndexError):
        rig.slot.set_state(row, index, layout.JOB_DONE)
    with pytest.raises(IndexError):
        rig.slot.record(row, index, layout.OUT_DONE)
    assert bytes(rig.view._bytes) == before


# --- which row a lease belongs to ---


def row_of(number: int, base: int, n: int, *, run: int = 0, name: bytes = ID) -> Row:
    return Row(number, name, base, n, base, run, bytes(n))


def test_a_lease_meets_the_row_that_contains_it() -> None:
    row = row_of(1, 100, 50)
    for base, n in ((100, 50), (100, 1), (149, 1), (120, 30)):
        assert find_row([row], ID, base, n, 0) is row
    for base, n in ((99, 2), (149, 2), (99, 1), (150, 1), (0, 1000)):
        assert find_row([row], ID, base, n, 0) is None
    assert find_row([], ID, 0, 1, 0) is None


def test_only_of_the_same_frame_and_run() -> None:
    rows = [row_of(1, 0, 10, run=1), row_of(2, 0, 10, name=frame_id(2)), row_of(3, 0, 10, run=2)]
    assert find_row(rows, ID, 0, 10, 2) is rows[2]
    assert find_row(rows, ID, 0, 10, 1) is rows[0]
    assert find_row(rows, ID, 0, 10, 0) is None
    assert find_row(rows, frame_id(2), 0, 10, 0) is rows[1]
    assert find_row(rows, frame_id(3), 0, 10, 0) is None


def test_an_exact_match_wins_then_the_smallest_range() -> None:
    whole, half, exact = row_of(1, 0, 100), row_of(2, 0, 50), row_of(3, 10, 5)
    for rows in ([whole, half, exact], [exact, half, whole], [half, whole, exact]):
        assert find_row(rows, ID, 10, 5, 0) is exact
        assert find_row(rows, ID, 20, 5, 0) is half
        assert find_row(rows, ID, 10, 6, 0) is half
        assert find_row(rows, ID, 45, 10, 0) is whole


# --- records ---


def test_a_record_tells_everything(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 500, 3, 0)
    rig.slot.record(
        row, 501, layout.OUT_RETRY, delay_ms=(1 << 32) - 1, started_ms=1 << 40, finished_ms=(1 << 40) + 1,
        error=b'{"reason":"x"}', result=b"[1]",
    )  # fmt: skip
    expected = Record(501, layout.OUT_RETRY, (1 << 32) - 1, 1 << 40, (1 << 40) + 1, b'{"reason":"x"}', b"[1]")
    assert list(rig.view.records(0)) == [(row, expected)]
    (found,) = rig.view.rows()
    assert found.records == {501: expected}
    assert found.states == bytes([0, layout.JOB_RECORDED, 0])
    assert rig.view.rows(records=False)[0].records == {}


@pytest.mark.parametrize("size", range(17))
def test_records_of_every_length_follow_each_other(rig: Rig, size: int) -> None:
    row = rig.slot.open_row(ID, 0, 3, 0)
    room = rig.slot.room()
    for index in range(3):
        rig.slot.record(row, index, layout.OUT_DONE, error=b"e" * size, result=b"r" * index)
    assert [(r.index, r.error, r.result) for _, r in rig.view.records(0)] == [
        (index, b"e" * size, b"r" * index) for index in range(3)
    ]
    assert (room - rig.slot.room()) % 8 == 0


def test_a_record_without_its_length_does_not_exist(rig: Rig) -> None:
    """What a kill leaves: all bytes but the length, which is stored last."""
    row = rig.slot.open_row(ID, 0, 4, 0)
    for index in range(3):
        rig.slot.record(row, index, layout.OUT_DONE, result=b"%d" % index)
    half = half_of(rig.view, 0)
    (length,) = struct.unpack_from("<I", half, 0)
    half[2 * length : 2 * length + 4] = bytes(4)
    assert [r.index for _, r in rig.view.records(0)] == [0, 1]
    (found,) = rig.view.rows()
    assert sorted(found.records) == [0, 1]


def test_a_record_hides_what_lies_behind_it_from_an_earlier_life(rig: Rig) -> None:
    """The half is full of old records; the reader must not run on into them."""
    row = rig.slot.open_row(ID, 0, 8, 0)
    for index in range(8):
        rig.slot.record(row, index, layout.OUT_RETRY, error=b"old")
    rig.slot.reset_halves()
    assert rig.records() == []
    rig.slot.record(row, 3, layout.OUT_DONE)
    assert [(index, status) for _, index, status, _, _ in rig.records()] == [(3, layout.OUT_DONE)]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 1), (0, 39), (0, layout.HALF_BYTES + 1), (0, (1 << 32) - 1),  # length
        (32, 1 << 20), (32, (1 << 32) - 1), (36, (1 << 32) - 1), (36, 30),  # of error and result
    ],
)  # fmt: skip
def test_the_reader_stops_at_what_is_no_record(rig: Rig, at: int, value: int) -> None:
    """A user's code may write anywhere in its process, the board included."""
    row = rig.slot.open_row(ID, 0, 4, 0)
    for index in range(3):
        rig.slot.record(row, index, layout.OUT_DONE, error=b"12345", result=b"6789")
    start = layout.O_HALVES
    (length,) = struct.unpack_from("<I", rig.view._bytes, start)
    struct.pack_into("<I", rig.view._bytes, start + length + at, value)
    found = rig.backend.records_of(rig.view._bytes, start)
    assert found == [(row, 0, layout.OUT_DONE, 0, 0, 0, b"12345", b"6789")]


def test_a_half_must_lie_in_the_slot(rig: Rig) -> None:
    last = layout.SLOT_BYTES - layout.HALF_BYTES
    assert rig.backend.records_of(rig.view._bytes, last) == []
    for start in (-8, 4, last + 8, 1 << 40):
        with pytest.raises(ValueError, match="too small"):
            rig.backend.records_of(rig.view._bytes, start)


def test_records_of_a_row_that_is_free_belong_to_nobody(rig: Rig) -> None:
    first, second = rig.slot.open_row(ID, 0, 2, 0), rig.slot.open_row(frame_id(2), 0, 2, 0)
    rig.slot.record(first, 0, layout.OUT_DONE, result=b"1")
    rig.slot.record(second, 1, layout.OUT_DONE, result=b"2")
    rig.slot.close_row(first)
    (found,) = rig.view.rows()
    assert found.number == second
    assert [record.result for record in found.records.values()] == [b"2"]


def test_a_full_half_refuses_and_stays_whole(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 0, 1000, 0)
    index = 0
    while rig.slot.room() >= 8_192 + layout.RECORD_HEADER_BYTES:
        rig.slot.record(row, index, layout.OUT_DONE, result=b"x" * 8_192)
        index += 1
    left = rig.slot.room()
    with pytest.raises(MemoryError, match="full"):
        rig.slot.record(row, index, layout.OUT_DONE, result=b"x" * left)
    assert rig.slot.states(row)[index] == layout.JOB_LEASED
    assert rig.slot.room() == left
    assert len(list(rig.view.records(0))) == index
    # to the last byte
    rig.slot.record(row, index, layout.OUT_DONE, result=b"y" * (left - layout.RECORD_HEADER_BYTES))
    last = list(rig.view.records(0))[-1][1]
    assert last.result == b"y" * (left - layout.RECORD_HEADER_BYTES)
    with pytest.raises(MemoryError):
        rig.slot.record(row, index + 1, layout.OUT_DONE)
    assert len(list(rig.view.records(0))) == index + 1


# --- halves ---


def test_a_settle_leaves_its_records_and_moves_the_others(rig: Rig) -> None:
    rows = [rig.slot.open_row(frame_id(k), 0, 20, 0) for k in range(4)]
    told = [(rows[k % 4], k, b"x" * k) for k in range(16)]
    for row, index, result in told:
        rig.slot.record(row, index, layout.OUT_DONE, result=result)
    assert rig.slot.begin_settle([rows[1], rows[2]]) == 0
    assert rig.word(layout.C_HALF) == 1
    assert [(row, r.index, r.result) for row, r in rig.view.records(1)] == [
        (row, index, result) for row, index, result in told if row in (rows[0], rows[3])
    ]
    # until the reply is read, nothing is lost
    assert [(row, r.index, r.result) for row, r in rig.view.records(0)] == told
    assert {row.number: len(row.records) for row in rig.view.rows()} == dict.fromkeys(rows, 4)
    rig.slot.record(rows[0], 19, layout.OUT_DONE)
    rig.slot.end_settle(0)
    assert list(rig.view.records(0)) == []
    assert [index for _, index, *_ in rig.records()] == [0, 3, 4, 7, 8, 11, 12, 15, 19]
    # and back
    assert rig.slot.begin_settle([rows[0]]) == 1
    assert rig.word(layout.C_HALF) == 0
    assert [r.index for _, r in rig.view.records(0)] == [3, 7, 11, 15]


def test_two_settles_at_once_are_refused(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 0, 4, 0)
    rig.slot.record(row, 0, layout.OUT_DONE)
    rig.slot.begin_settle([row])
    rig.slot.record(row, 1, layout.OUT_DONE)
    before = bytes(rig.view._bytes)
    with pytest.raises(RuntimeError, match="two settles"):
        rig.slot.begin_settle([row])
    assert bytes(rig.view._bytes) == before
    rig.slot.end_settle(0)
    assert rig.slot.begin_settle([row]) == 1


def test_the_half_in_use_is_never_reset_by_an_answer(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 0, 4, 0)
    rig.slot.record(row, 0, layout.OUT_DONE)
    rig.slot.end_settle(0)
    rig.slot.end_settle(1)
    assert [index for _, index, *_ in rig.records()] == [0]


def test_marks_of_one_settle_do_not_stay_for_the_next(rig: Rig) -> None:
    rows = [rig.slot.open_row(frame_id(k), 0, 2, 0) for k in range(2)]
    rig.slot.record(rows[0], 0, layout.OUT_DONE)
    rig.slot.end_settle(rig.slot.begin_settle([rows[0]]))
    rig.slot.record(rows[0], 1, layout.OUT_DONE)
    rig.slot.record(rows[1], 0, layout.OUT_DONE)
    rig.slot.begin_settle([rows[1]])
    assert [(row, r.index) for row, r in rig.view.records(0)] == [(rows[0], 1)]


def test_a_full_half_moves_whole(rig: Rig) -> None:
    row, other = rig.slot.open_row(ID, 0, 1000, 0), rig.slot.open_row(frame_id(2), 0, 1, 0)
    for index in range(63):
        rig.slot.record(row, index, layout.OUT_DONE, result=b"%08d" % index * 1_020)
    left = rig.slot.room()
    rig.slot.record(row, 63, layout.OUT_DONE, result=b"z" * (left - layout.RECORD_HEADER_BYTES))
    before = list(rig.view.records(0))
    assert len(before) == 64
    rig.slot.begin_settle([other])
    assert list(rig.view.records(1)) == before


def test_where_a_job_stands_in_both_halves_the_later_is_the_truth(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 0, 2, 0)
    for settles in range(2):
        rig.slot.record(row, 0, layout.OUT_RETRY, error=b"old")
        old = rig.slot.begin_settle([row])
        rig.slot.record(row, 0, layout.OUT_DONE, result=b"new")
        assert rig.view.rows()[0].records[0].result == b"new", settles
        rig.slot.end_settle(old)
        if not settles:
            rig.slot.end_settle(rig.slot.begin_settle([row]))  # now the halves have changed roles
            rig.slot.end_settle(rig.slot.begin_settle([row]))
            rig.slot.record(row, 0, layout.OUT_RETRY)
            rig.slot.end_settle(rig.slot.begin_settle([row]))


def test_reset_halves_forgets_all(rig: Rig) -> None:
    row = rig.slot.open_row(ID, 0, 4, 0)
    rig.slot.record(row, 0, layout.OUT_DONE)
    rig.slot.begin_settle([row])
    rig.slot.record(row, 1, layout.OUT_DONE)
    rig.slot.reset_halves()
    assert rig.records() == []
    assert rig.slot.room() == layout.HALF_BYTES - 8
    rig.slot.record(row, 2, layout.OUT_DONE)
    rig.slot.begin_settle([])  # the other one is idle again
    assert [index for _, index, *_ in rig.records()] == [2, 2]


# --- a new life ---


def test_wipe_leaves_nothing_of_the_last_life(rig: Rig) -> None:
    rig.task(lambda: None)
    rig.runner()
    row = rig.slot.open_row(ID, 0, 100, 0)
    rig.slot.record(row, 5, layout.OUT_DONE, result=b"1")
    rig.slot.begin_settle([])
    rig.slot.record(row, 6, layout.OUT_DONE, result=b"2")
    rig.view.set_text(layout.C_INCARNATION, "A" * 26)
    rig.view.add("fetches")
    assert (len(list(rig.view.tasks())), len(rig.view.rows()), len(rig.records())) == (1, 1, 3)
    rig.view.wipe()
    assert (list(rig.view.tasks()), rig.view.rows(), rig.records()) == ([], [], [])
    assert bytes(rig.view._bytes[: layout.O_BLOCKS]) == bytes(layout.O_BLOCKS)
    slot = rig.backend.Slot(rig.board.memory, layout.slot_offset(0))
    row = slot.open_row(frame_id(2), 0, 100, 0)
    assert rig.view.rows() == [Row(row, frame_id(2), 0, 100, 0, 0, bytes(100))]


def test_slots_do_not_touch_each_other(rig: Rig) -> None:
    board = Board(3)
    slot = rig.backend.Slot(board.memory, layout.slot_offset(1))
    others = [bytes(board.slots[0]._bytes), bytes(board.slots[2]._bytes), bytes(board.memory[:4096])]
    for _ in range(layout.BLOCKS):
        row = slot.open_row(ID, 0, 1000, 0)
        for index in (0, 999):
            slot.set_state(row, index, layout.JOB_RETURNED)
    for index in range(63):
        slot.record(row, index, layout.OUT_DONE, result=b"\xff" * 8_180)
    slot.begin_settle([])
    board.slots[1].wipe()
    after = [bytes(board.slots[0]._bytes), bytes(board.slots[2]._bytes), bytes(board.memory[:4096])]
    assert after == others


# --- task blocks ---


def test_task_blocks_have_names_and_numbers(rig: Rig) -> None:
    rig.task(lambda: None, "FIRST")
    rig.task(lambda: None, "x" * 64)
    rig.runner()
    assert [name for name, _ in rig.view.tasks()] == ["FIRST", "x" * 64]
    assert [rig.view.task_name(k) for k in range(3)] == ["FIRST", "x" * 64, ""]


@pytest.mark.parametrize(
    "wrong",
    [{"number": -1}, {"number": 512}, {"positional": ("a",) * 256}, {"name": "x" * 65}, {"name": ""}],
)
def test_an_entry_that_does_not_fit_is_refused(rig: Rig, wrong: dict[str, Any]) -> None:
    fields = {
        "name": "A", "number": 0, "func": print, "decode": print, "positional": (), "keyword_only": (),
        "mode": 0, "is_async": False,
    }  # fmt: skip
    with pytest.raises(ValueError):
        rig.backend.Entry(**(fields | wrong))


def test_times_are_counted_in_bins_of_powers_of_two(rig: Rig) -> None:
    entry = rig.task(lambda: None)
    entry.bind(rig.slot)
    for us, k in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1024, 10), (1 << 40, 23)):
        before = rig.bins("A")
        entry.timed(1, us * 1000)
        after = rig.bins("A")
        assert after == before | {k: before.get(k, 0) + 1}
    entry.timed(32, 32 * 5_000)
    assert rig.bins("A")[2] == 33
    words = rig.task_words("A")
    assert words[layout.T_COMPLETED // 8] == words[layout.T_TIMED // 8] == 40 == entry.seen
    assert words[layout.T_MEAN_NS // 8] == int(entry.mean_ns)
    entry.waited(10, 3_000)
    entry.waited(2, 0)
    assert rig.bins("A", layout.T_WAIT_BINS) == {11: 10, 0: 2}
    assert words[layout.T_WAIT_SUM_US // 8] == 30_000


def test_the_mean_follows_what_is_measured(rig: Rig) -> None:
    entry = rig.task(lambda: None)
    entry.bind(rig.slot)
    assert entry.mean_ns == -1.0
    entry.timed(4, 4_000)
    assert entry.mean_ns == 1_000
    entry.timed(1, 9_000)
    assert entry.mean_ns == 2_000  # one job weighs an eighth
    entry.timed(32, 32 * 6_000)
    assert entry.mean_ns == 3_000  # a run weighs a quarter


def test_counters_of_a_task(rig: Rig) -> None:
    entry = rig.task(lambda: None)
    for account in (entry.timed, entry.waited):
        with pytest.raises(RuntimeError, match="bind"):
            account(1, 1)
    with pytest.raises(ValueError):
        entry.count(layout.T_FAILED)
    entry.bind(rig.slot)
    for word in (layout.T_FAILED, layout.T_FAILED, layout.T_RETRIED, layout.T_DEAD):
        entry.count(word)
    words = rig.task_words("A")
    assert [words[at // 8] for at in (layout.T_FAILED, layout.T_RETRIED, layout.T_DEAD)] == [2, 1, 1]
    for word in (0, 63, 68, 512, -8):
        with pytest.raises(ValueError):
            entry.count(word)
    other = hotpath.Rig(rig.backend)
    entry.bind(other.slot)  # a rebound entry counts from zero, on the other board
    entry.count(layout.T_FAILED)
    assert other.task_words("A")[layout.T_FAILED // 8] == 1
    assert words[layout.T_FAILED // 8] == 2
