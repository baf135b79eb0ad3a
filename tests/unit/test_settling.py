"""What becomes of a lease: from its frame and its row of the board to the arguments of `settle`, and to
Redis."""

import contextlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_clock import FakeClock
from tests.support.housework import Scene, frame_id, short
from tests.support.redis_server import RedisServer
from tqe import codec, formats
from tqe.board import layout
from tqe.board.board import Record, Row
from tqe.job import bucket_of
from tqe.store import settling
from tqe.store.keys import Keys
from tqe.store.settling import CrashPolicy, Item, SettleBatch, claim, recover, retry_rule

ID = frame_id(1)
NOW_MS = 1_700_000_009_000
L, S, D, X, R = (
    layout.JOB_LEASED, layout.JOB_STARTED, layout.JOB_DONE, layout.JOB_RECORDED, layout.JOB_RETURNED,
)  # fmt: skip
STATUSES = range(layout.OUT_DONE, layout.OUT_RETURNED + 1)
ERROR = b'{"reason":"failed","message":"no"}'
CRASH = CrashPolicy(reason="crash:SIGKILL", now_ms=NOW_MS, retries=retry_rule(2, 100, 1_000))


def make(n: int = 4, *, number: int = 1, **fields: Any) -> bytes:
    """A tracked frame in which each job tells its index, of two types in turn."""
    jobs = [(b"AB"[k % 2 : k % 2 + 1], b'{"k":%d}' % k, b"", False) for k in range(n)]
    made: bytes = codec.pack(
        jobs, **{"frame_id": frame_id(number), "lane": "high", "tracked": True, "enqueued_us": 5, **fields}
    )
    return made


def record(index: int, status: int, **told: Any) -> Record:
    fields = {"delay_ms": 0, "started_ms": 0, "finished_ms": 0, "error": b"", "result": b"", **told}
    return Record(index, status, **fields)


def row_of(frame: bytes, states: list[int], records: Sequence[Record] = (), *, number: int = 0) -> Row:
    header = codec.parse(frame)
    return Row(
        number, header.frame_id, header.base, header.n, header.base, header.run, bytes(states),
        {one.index: one for one in records},
    )  # fmt: skip


def settle(
    frame: bytes,
    states: list[int],
    records: Sequence[Record] = (),
    *,
    base: int = -1,
    n: int = 0,
    **options: Any,
) -> Item:
    header = codec.parse(frame)
    row = row_of(frame, states, records)
    base, n = (header.base, header.n) if base < 0 else (base, n)
    return claim(frame, header, row, base, n, **options)


def parts(item: Item) -> list[str]:
    """Parts in short: `kind argument number.base.n counters`, without an argument that is JSON or random."""
    return [
        " ".join(filter(None, [
            part.kind.decode(), "" if part.kind in (b"d", b"c") else part.argument.decode(),
            short(part.frame),
        ]))
        for part in item.parts
    ]  # fmt: skip


def fields(item: Item) -> dict[int, Any]:
    found = {index: json.loads(body) for index, body in item.fields}
    assert len(found) == len(item.fields)
    return found


# --- one lease, by status ---


def test_done_jobs_are_ranges_and_need_no_words() -> None:
    item = settle(make(4), [D, D, D, D], started_ms=7, finished_ms=8)
    assert (item.ranges, item.parts, item.fields) == ([(0, 4, "C")], [], [])
    assert (item.lease, item.frame_id, item.tracked) == (ID + b".000.0004.00000", ID, True)
    assert (item.started_ms, item.finished_ms, item.kept) == (7, 8, [])


def test_done_after_other_tries_is_told() -> None:
    item = settle(make(2, attempts=2, crashes=1, run=3), [D, D])
    assert item.ranges == [(0, 2, "C")]
    assert fields(item) == {k: {"attempts": 3, "crashes": 1} for k in range(2)}


def test_a_result_is_told_as_it_is() -> None:
    done = record(
        1, layout.OUT_DONE, started_ms=5, finished_ms=9, result=b'{"a":[1.50,12345678901234567890]}'
    )
    item = settle(make(3), [D, X, D], [done])
    assert (item.ranges, item.parts) == ([(0, 3, "C")], [])
    ((index, body),) = item.fields
    assert index == 1
    assert body == b'{"attempts":1,"started_at":5,"finished_at":9,"result":{"a":[1.50,12345678901234567890]}}'


def test_cancelled_and_expired_jobs_are_ranges_of_their_own() -> None:
    records = [
        record(0, layout.OUT_CANCELLED, error=ERROR), record(1, layout.OUT_EXPIRED, error=ERROR),
        record(2, layout.OUT_EXPIRED), record(3, layout.OUT_DONE),
    ]  # fmt: skip
    item = settle(make(5), [X, X, X, X, D], records)
    assert item.ranges == [(0, 1, "X"), (1, 2, "E"), (3, 2, "C")]
    assert item.parts == []
    assert fields(item)[0] == {"attempts": 1, "error": json.loads(ERROR)}
    assert set(fields(item)) == {0, 1, 2, 3}


def test_a_retry_leaves_alone_and_charged() -> None:
    failed = record(1, layout.OUT_RETRY, delay_ms=1_234, started_ms=3, finished_ms=4, error=ERROR)
    item = settle(make(3, attempts=1, crashes=2, unknowns=3, run=7), [D, X, D], [failed])
    assert item.ranges == [(0, 1, "C"), (2, 1, "C")]
    assert parts(item) == ["t 1234 1.1.1 run=8 attempts=2 crashes=2 unknowns=3"]
    assert fields(item)[1] == {
        "attempts": 2, "crashes": 2, "started_at": 3, "finished_at": 4, "error": json.loads(ERROR),
    }  # fmt: skip


def test_an_unknown_type_is_not_charged() -> None:
    item = settle(make(2, attempts=1), [X, D], [record(0, layout.OUT_UNKNOWN, delay_ms=30_000, error=ERROR)])
    assert parts(item) == ["u 30000 1.0.1 run=1 attempts=1 unknowns=1"]
    assert fields(item)[0] == {"attempts": 1, "error": json.loads(ERROR)}


def test_a_dead_job_is_buried_with_its_story() -> None:
    dead = record(1, layout.OUT_DEAD, finished_ms=99, error=ERROR)
    item = settle(make(2, attempts=3, crashes=1), [D, X], [dead])
    assert parts(item) == ["d 1.1.1 run=1 attempts=4 crashes=1"]
    assert json.loads(item.parts[0].argument) == {
        "type": "B", "lane": "high", "reason": "failed", "error": json.loads(ERROR), "attempts": 4,
        "crashes": 1, "died_at": 99,
    }  # fmt: skip
    assert fields(item)[1]["attempts"] == 4


def test_a_job_that_was_returned_though_started_is_not_charged() -> None:
    item = settle(make(2, attempts=1), [X, L], [record(0, layout.OUT_RETURNED)])
    assert parts(item) == ["r 1.0.1 run=1 attempts=1", "k 1.1.1 attempts=1"]
    assert item.fields == []


def test_what_is_not_ended_is_kept_by_who_works() -> None:
    item = settle(make(6), [D, L, L, S, R, R])
    assert item.ranges == [(0, 1, "C")]
    assert parts(item) == ["k 1.1.3", "r 1.4.2"]
    assert item.kept == [(1, 3)]
    assert settle(make(3), [L, S, L]).kept == [(0, 3)]


def test_several_pieces_are_kept() -> None:
    item = settle(make(5), [S, D, S, D, S])
    assert parts(item) == ["k 1.0.1", "k 1.2.1", "k 1.4.1"]
    assert item.kept == [(0, 1), (2, 1), (4, 1)]


def test_what_is_given_back_keeps_its_counters_and_is_cut_as_asked() -> None:
    frame = make(12, attempts=2, run=5)
    pieces = [(4, 3), (7, 3), (10, 2)]
    item = settle(frame, [D] * 4 + [R] * 8, pieces=pieces)
    assert parts(item) == [f"r 1.{base}.{n} run=5 attempts=2" for base, n in pieces]
    # pieces that do not fit what is left are cut, and what no piece names stays together
    item = settle(frame, [D] * 4 + [R] * 4 + [D] + [R] * 3, pieces=pieces)
    assert parts(item) == [f"r 1.{base}.{n} run=5 attempts=2" for base, n in [(4, 3), (7, 1), (9, 3)]]


def test_a_lost_record_means_the_job_runs_again() -> None:
    """It cannot be; but a job must not be lost over it."""
    assert parts(settle(make(2), [X, D])) == ["k 1.0.1"]
    assert parts(settle(make(2), [X, D], crash=CRASH)) == ["r 1.0.1"]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("crash", [None, CRASH])
def test_a_record_counts_only_with_its_state(status: int, crash: CrashPolicy | None) -> None:
    """A kill between a record and its state; or the record of a lease that had this row before."""
    stray = [record(k, status, error=ERROR, result=b"1") for k in range(4)]
    clean = settle(make(4), [D, S, R, L], crash=crash)
    item = settle(make(4), [D, S, R, L], stray, crash=crash)
    assert (item.ranges, parts(item), item.fields) == (clean.ranges, parts(clean), clean.fields)


def test_an_untracked_lease_has_no_words() -> None:
    records = [record(k, status, error=ERROR, result=b"1") for k, status in enumerate(STATUSES)]
    item = settle(make(7, tracked=False, attempts=1), [X] * 7, records)
    assert (item.tracked, item.fields) == (False, [])
    assert item.ranges == [(0, 1, "C"), (3, 1, "X"), (4, 1, "E")]
    assert [part.kind for part in item.parts] == [b"t", b"d", b"u", b"r"]


def test_indexes_are_those_of_the_frame_as_submitted() -> None:
    (part,) = codec.cut(make(20), [(10, 6)])
    records = [record(11, layout.OUT_DONE, result=b"1"), record(13, layout.OUT_RETRY, error=ERROR)]
    item = settle(part, [D, X, D, X, R, L], records)
    assert item.lease == ID + b".010.0006.00000"
    assert item.ranges == [(10, 3, "C")]
    assert parts(item) == ["t 0 1.13.1 run=1 attempts=1", "r 1.14.1", "k 1.15.1"]
    assert set(fields(item)) == {11, 13}
    assert codec.walk(item.parts[0].frame) == [(13, b"B", b'{"k":13}', b"", False)]


def test_a_claim_is_a_part_of_what_was_fetched() -> None:
    frame = make(10)
    states = [D, D, D, L, L, R, R, D, D, D]
    item = settle(frame, states, base=2, n=5)
    assert item.lease == ID + b".002.0005.00000"
    assert (item.ranges, parts(item)) == ([(2, 1, "C")], ["k 1.3.2", "r 1.5.2"])


# --- every lease is tiled ---


def fate(state: int, status: int | None, *, crash: bool, current: bool) -> str:
    """The contract, spelled out for one job: what becomes of it, and how its counters change."""
    if state == D:
        return "C"
    if state == X and status is not None:
        return ["", "C", "t+a", "d+a", "X", "E", "u+u", "r+run"][status]
    if state == R:
        return "r"
    if not crash:
        return "k"
    if state == S:
        return "c+c" if current else "r+run"
    return "r"


CHANGES = {
    "t+a": (1, 0, 0, 1), "d+a": (1, 0, 0, 1), "u+u": (0, 0, 1, 1), "r+run": (0, 0, 0, 1), "c+c": (0, 1, 0, 1),
}  # fmt: skip


def fates(item: Item, header: codec.Header) -> dict[int, str]:
    """Index -> what the item says of it; fails if two say it."""
    found: dict[int, str] = {}
    for base, n, state in item.ranges:
        for index in range(base, base + n):
            assert index not in found
            found[index] = state
    for part in item.parts:
        told = codec.parse(part.frame)  # sound, all of it
        assert (told.frame_id, told.lane, part.lane, told.total) == (
            header.frame_id,
            "high",
            "high",
            header.total,
        )
        assert (told.enqueued_us, told.options) == (header.enqueued_us, header.options)
        change = (
            told.attempts - header.attempts, told.crashes - header.crashes, told.unknowns - header.unknowns,
            told.run - header.run,
        )  # fmt: skip
        names = [
            name
            for name, expected in CHANGES.items()
            if name[:1] == part.kind.decode() and expected == change
        ]
        name = names[0] if names else part.kind.decode()
        assert names or change == (0, 0, 0, 0)
        assert not names or told.n == 1
        for index in range(told.base, told.base + told.n):
            assert index not in found
            found[index] = name
            assert codec.job_at(part.frame, index)[1] == b'{"k":%d}' % index
    return found


JOBS = st.lists(
    st.tuples(st.sampled_from([L, S, D, D, X, X, R]), st.sampled_from([None, *STATUSES])),
    min_size=1,
    max_size=40,
)


@given(st.data(), JOBS, st.booleans(), st.integers(0, 3), st.integers(0, 5))
def test_ranges_and_parts_tile_the_lease(
    data: st.DataObject, jobs: list[tuple[int, int | None]], crashed: bool, attempts: int, before: int
) -> None:
    n = len(jobs)
    (frame,) = codec.cut(make(n + before + 3, attempts=attempts, run=9), [(before, n)])
    header = codec.parse(frame)
    base = data.draw(st.integers(before, before + n - 1))
    size = data.draw(st.integers(1, before + n - base))
    current = data.draw(st.integers(before, before + n - 1))
    records = [
        record(before + k, status, error=ERROR, result=b"1")
        for k, (_, status) in enumerate(jobs)
        if status is not None
    ]
    cuts = sorted(data.draw(st.sets(st.integers(base, base + size), max_size=5)) | {base, base + size})
    pieces = [(start, end - start) for start, end in itertools.pairwise(cuts)]
    crash = CrashPolicy("crash:x", current=(0, current), now_ms=5) if crashed else None
    item = settle(frame, [state for state, _ in jobs], records, base=base, n=size, crash=crash, pieces=pieces)
    expected = {
        index: fate(*jobs[index - before], crash=crashed, current=index == current)
        for index in range(base, base + size)
    }
    assert fates(item, header) == expected
    # neighbours of one fate are together, but for those that leave alone and for pieces
    told = [(start, count) for start, count, _ in item.ranges]
    assert told == sorted(told)
    for (start, count, state), (after, _, other) in itertools.pairwise(item.ranges):
        assert start + count < after or state != other
    # words are only of jobs that have something to say, and each has them once
    assert set(fields(item)) == {
        index
        for index, what in expected.items()
        if what in ("t+a", "d+a", "X", "E", "u+u", "c+c")
        or (what == "C" and (attempts or jobs[index - before][0] == X))
    }
    assert all(start >= base and start + count <= base + size for start, count, _ in item.ranges)


# --- for a dead worker ---


def crashed(states: list[int], policy: CrashPolicy, **header: Any) -> Item:
    return settle(make(len(states), **header), states, crash=policy)


def with_current(index: int, **changes: Any) -> CrashPolicy:
    told: dict[str, Any] = {"reason": "crash:SIGKILL", "now_ms": NOW_MS, "current": (0, index)}
    return CrashPolicy(**(told | changes))


def test_only_the_job_on_the_board_is_charged() -> None:
    item = crashed([D, S, S, L, R], with_current(2))
    assert item.ranges == [(0, 1, "C")]
    assert parts(item) == ["r 1.1.1 run=1", "c 1.2.1 run=1 crashes=1 suspect", "r 1.3.2"]
    assert 500 <= int(item.parts[1].argument) <= 1_000
    told = fields(item)
    assert set(told) == {2}
    assert (told[2]["attempts"], told[2]["crashes"]) == (0, 1)
    assert told[2]["error"]["reason"] == "crash:SIGKILL"
    assert "finished_at" not in told[2]


@pytest.mark.parametrize("state", [L, D, R])
def test_a_job_on_the_board_that_has_ended_or_not_begun_is_not_charged(state: int) -> None:
    item = crashed([state], with_current(0))
    assert "crashes" not in " ".join(parts(item))


@pytest.mark.parametrize(
    "policy",
    [
        with_current(0, blame=False), CrashPolicy("x", blame=False), with_current(0, current=(5, 0)),
        with_current(0, current=(0, 1)),
        with_current(0, blame=False, hard_limit=True),
    ],
)  # fmt: skip
def test_nobody_is_charged(policy: CrashPolicy) -> None:
    item = crashed([S], policy, crashes=2)
    assert parts(item) == ["r 1.0.1 run=1 crashes=2"]
    assert item.fields == []


def test_with_no_step_marked_all_that_had_started_return_as_suspects() -> None:
    item = crashed([D, S, L, S], CrashPolicy("crash:SIGKILL"))
    assert parts(item) == ["r 1.1.1 run=1 suspect", "r 1.2.1", "r 1.3.1 run=1 suspect"]


@pytest.mark.parametrize(("crashes", "most"), [(2, 3), (0, 1), (9, 3), (998, 3), (999, 1_000)])
def test_the_last_crash_is_death(crashes: int, most: int) -> None:
    item = crashed([S, L], with_current(0, crashes_max=most), crashes=crashes, attempts=1)
    (dead, rest) = item.parts
    header = codec.parse(dead.frame)
    assert (dead.kind, header.crashes, header.attempts, header.run) == (b"d", min(crashes + 1, 999), 1, 1)
    meta = json.loads(dead.argument)
    assert (meta["reason"], meta["attempts"], meta["crashes"], meta["died_at"]) == (
        "crash:SIGKILL", 1, crashes + 1, NOW_MS,
    )  # fmt: skip
    assert fields(item)[0]["finished_at"] == NOW_MS
    assert rest.kind == b"r"


@pytest.mark.parametrize(
    ("own", "of_frame", "rule", "attempts", "dead"),
    [
        (b"", b"", 2, 1, False), (b"", b"", 2, 2, True), (b"", b"", 0, 0, True),
        (b'{"max_retries":5}', b"", 0, 4, False), (b'{"max_retries":5}', b"", 9, 5, True),
        (b"", b'{"max_retries":1}', 9, 1, True), (b'{"max_retries":3}', b'{"max_retries":1}', 0, 1, False),
        (b'{"timeout_ms":5}', b'{"max_retries":1}', 0, 0, False), (b'{"max_retries":"x"}', b"", 1, 0, False),
        (b"no json", b"[]", 1, 0, False), (b"no json", b"[]", 1, 1, True),
    ],
)  # fmt: skip
def test_a_kill_for_the_time_limit_is_a_failed_attempt(
    own: bytes, of_frame: bytes, rule: int, attempts: int, dead: bool
) -> None:
    frame = codec.pack(
        [(b"A", b"{}", b"", False), (b"A", b"{}", own, False)], frame_id=ID, lane="high", tracked=True,
        options=of_frame, attempts=attempts, crashes=1,
    )  # fmt: skip
    policy = with_current(1, reason="hard_limit", hard_limit=True, retries=retry_rule(rule, 1_000, 4_000))
    item = settle(frame, [D, S], crash=policy)
    (part,) = item.parts
    header = codec.parse(part.frame)
    assert (header.attempts, header.crashes, header.run) == (attempts + 1, 1, 1)
    assert part.kind == (b"d" if dead else b"t")
    if dead:
        assert json.loads(part.argument)["reason"] == "hard_limit"
    else:
        whole = min(4_000, 1_000 * 2**attempts)
        assert whole // 2 <= int(part.argument) <= whole
    assert fields(item)[1]["error"]["reason"] == "hard_limit"
    assert fields(item)[1]["attempts"] == attempts + 1


def test_a_retry_rule_that_is_too_large_for_the_board_is_the_largest() -> None:
    for rule, expected in (
        ((0, 0, 0), (0, 0, 0)), ((3, 2_000, 3_600_000), (3, 2_000, 3_600_000)),
        ((1_000_000, 86_400_000, 365 * 86_400_000), (4_095, 0xFFFFFF, 0xFFFFFFF)),
    ):  # fmt: skip
        packed = retry_rule(*rule)
        assert packed < 1 << 64
        assert (packed & 0xFFF, packed >> 12 & 0xFFFFFF, packed >> 36) == expected


def items_of(batch: SettleBatch) -> list[Item]:
    return [item for item, _ in batch._items]


def test_what_the_worker_never_saw_goes_back_as_it_is() -> None:
    frame = make(5, run=3)
    for rows in ([], [row_of(make(5, number=2, run=3), [D] * 5)], [row_of(make(5, run=2), [D] * 5)]):
        (item,) = items_of(recover([(frame[4:45], frame)], rows, with_current(0)))
        assert (item.ranges, parts(item), item.fields) == ([], ["r 1.0.5 run=3"], [])
        assert item.parts[0].frame == frame


def test_a_cut_whose_reply_nobody_read_is_found_by_containment() -> None:
    whole = make(10)
    row = row_of(whole, [D, D, D, R, R, S, D, D, L, L])
    leases = [(part[4:45], part) for part in codec.cut(whole, [(0, 3), (5, 3), (8, 2)])]
    items = items_of(recover(leases, [row], with_current(5)))
    assert [item.lease for item in items] == [name for name, _ in leases]
    assert [item.ranges for item in items] == [[(0, 3, "C")], [(6, 2, "C")], []]
    assert [parts(item) for item in items] == [[], ["c 1.5.1 run=1 crashes=1 suspect"], ["r 1.8.2"]]


def test_damaged_frames_go_to_quarantine() -> None:
    frame = make(3)
    damaged = [frame[:-1] + b"!", b"no frame at all", b"", b"F2" + frame[2:]]
    leases = [(frame[4:45], one) for one in damaged] + [(make(3, number=2)[4:45], frame)]
    items = items_of(recover(leases, [row_of(frame, [D] * 3)], CRASH))
    assert [[(part.kind, part.frame) for part in item.parts] for item in items] == [
        [(b"q", one)] for _, one in leases
    ]
    assert [item.lease for item in items] == [name for name, _ in leases]
    assert [item.ranges for item in items] == [[]] * 5


def test_a_lease_that_ended_without_a_word_counts_a_reap() -> None:
    frame = make(4, reaps=1, crashes=2)
    (item,) = items_of(recover([(frame[4:45], frame)], [], CrashPolicy("reaped", reaped=True, now_ms=NOW_MS)))
    assert parts(item) == ["r 1.0.4 crashes=2 reaps=2 suspect"]


REAPED = CrashPolicy("reaped", reaped=True, now_ms=NOW_MS)


def reaped(frame: bytes) -> list[str]:
    (item,) = items_of(recover([(frame[4:45], frame)], [], REAPED))
    return parts(item)


def test_the_first_lease_that_ends_without_a_word_is_forgiven() -> None:
    assert reaped(make(2)) == ["r 1.0.2 reaps=1"]
    assert reaped(make(2, reaps=1)) == ["r 1.0.2 reaps=2 suspect"]
    assert reaped(make(2, reaps=999, flags=codec.SUSPECT)) == ["r 1.0.2 reaps=999 suspect"]


def test_a_suspect_that_had_begun_is_charged_when_its_lease_ends_without_a_word() -> None:
    flags = codec.SUSPECT | codec.STARTED
    assert reaped(make(1, reaps=2, flags=flags)) == ["c 1.0.1 run=1 crashes=1 reaps=3 suspect"]
    assert reaped(make(1, reaps=2, flags=codec.SUSPECT)) == ["r 1.0.1 reaps=3 suspect"]
    frame = make(1, reaps=2, crashes=2, flags=flags)
    (item,) = items_of(recover([(frame[4:45], frame)], [], REAPED))
    assert parts(item) == ["d 1.0.1 run=1 crashes=3 reaps=2 suspect"]
    assert json.loads(item.parts[0].argument)["reason"] == "reaped"


@pytest.mark.parametrize(
    ("state", "policy", "told"),
    [
        (
            S,
            CrashPolicy("x"),
            "c 1.0.1 run=1 crashes=2 suspect",
        ),  # a coroutine that waited: nothing ran beside it
        (S, with_current(0), "c 1.0.1 run=1 crashes=2 suspect"),
        (S, CrashPolicy("drain", blame=False), "r 1.0.1 run=1 crashes=1 suspect"),
        (L, CrashPolicy("x"), "r 1.0.1 crashes=1 suspect"),  # marked, and not started: the board knows better
        (R, CrashPolicy("x"), "r 1.0.1 crashes=1 suspect"),
    ],
)
def test_the_board_says_whether_a_marked_suspect_had_started(
    state: int, policy: CrashPolicy, told: str
) -> None:
    frame = make(1, crashes=1, flags=codec.SUSPECT | codec.STARTED)
    assert parts(settle(frame, [state], crash=policy)) == [told]


def test_a_mark_does_not_leave_with_the_job() -> None:
    frame = make(1, flags=codec.SUSPECT | codec.STARTED)
    item = settle(frame, [X], [record(0, layout.OUT_RETRY, delay_ms=5, error=ERROR)])
    assert parts(item) == ["t 5 1.0.1 run=1 attempts=1 suspect"]
    assert parts(settling.returned(frame[4:45], [frame])) == ["r 1.0.1 suspect"]
    header = codec.parse(frame)
    assert parts(settling.postponed(frame, header, 0, 7)) == ["c 1.0.1 suspect"]
    assert parts(settling.marked(frame, header, 0)) == ["k 1.0.1 suspect started"]


def test_backoff_grows_to_its_cap_and_is_half_random() -> None:
    for attempt, whole in ((1, 100), (2, 200), (5, 1_600), (6, 2_000), (60, 2_000), (10_000, 2_000)):
        delays = {settling.backoff_ms(attempt, 100, 2_000) for _ in range(200)}
        assert whole // 2 <= min(delays) <= max(delays) <= whole
        assert len(delays) > 20
    assert settling.backoff_ms(3, 0, 0) == 0


# --- calls ---

KEYS = Keys()


def leases_in(call: settling.SettleCall) -> list[bytes]:
    """Names of the leases in the arguments, in the order in which the script answers."""
    args = list(call.call.args)
    lanes = int(args[0])
    found: list[Any] = []
    at = 7 + lanes
    buckets = int(args[1])
    while at < len(args):
        bucket = int(args[at + 2] if args[at] == "P" else args[at + 1])
        assert 0 <= bucket <= buckets
        if args[at] == "C":
            count = int(args[at + 3])
            found += args[at + 4 : at + 4 + count]
            at += 4 + count
            continue
        if args[at] == "R":
            count = int(args[at + 3])
            found += args[at + 4 : at + 4 + 2 * count : 2]
            at += 4 + 2 * count
            continue
        assert args[at] == "P"
        found.append(args[at + 1])
        at += 5
        for width in (3, 2, 3):
            at += 1 + width * int(args[at])
    assert at == len(args)
    assert len(call.call.keys) == 11 + 2 * lanes + buckets
    assert all(isinstance(name, bytes) for name in found)
    return found


def calls_of(batch: SettleBatch) -> list[settling.SettleCall]:
    calls = batch.calls(KEYS, "me", result_ttl_s=3_600, dlq_max=10)
    for call in calls:
        assert leases_in(call) == call.leases
        assert len(call.tickets) == len(call.leases) <= settling.LEASES_MAX
        assert call.call.script == "settle"
    return calls


def names(count: int, start: int = 0) -> list[bytes]:
    return [frame_id(start + k) + b".000.0001.00000" for k in range(count)]


def test_an_empty_batch_makes_no_call() -> None:
    assert not SettleBatch()
    assert calls_of(SettleBatch()) == []


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        ([5], [5]), ([1_000], [1_000]), ([1_001], [1_000, 1]), ([2_500], [1_000, 1_000, 500]),
        ([600, 400], [1_000]), ([600, 401], [600, 401]), ([1, 1_000], [1, 1_000]),
        ([300] * 10, [900] * 3 + [300]),
    ],
)  # fmt: skip
def test_a_call_has_a_thousand_leases_at_most(groups: list[int], sizes: list[int]) -> None:
    batch = SettleBatch()
    told: list[bytes] = []
    for number, count in enumerate(groups):
        made = names(count, len(told))
        batch.add_done((number, "A"), b"C,1,0,5,6,high,A*1", made, [name.decode() for name in made])
        told += made
    assert batch
    assert batch.leases == sum(groups)
    calls = calls_of(batch)
    assert [len(call.leases) for call in calls] == sizes
    assert [name for call in calls for name in call.leases] == told
    assert [ticket for call in calls for ticket in call.tickets] == [name.decode() for name in told]


def test_untracked_leases_have_no_bucket() -> None:
    batch = SettleBatch()
    batch.add_done(None, b"", names(3), [1, 2, 3])
    (call,) = calls_of(batch)
    assert call.call.args[1] == 0
    assert call.call.args[7:11] == ("C", 0, b"", 3)


def test_items_follow_groups_and_share_buckets() -> None:
    batch = SettleBatch()
    bucket = bucket_of(ID)
    batch.add_done(bucket, b"C,1,0,5,6,high,A*1", names(2, 50), ["x", "y"])
    batch.add(settle(make(2), [D, L]), "z")
    batch.add(settle(make(2, number=2, lane="low"), [D, R]), "w")
    (call,) = calls_of(batch)
    assert call.tickets == ["x", "y", "z", "w"]
    assert call.call.args[:2] == (2, 1)
    assert call.call.args[7:9] == ("high", "low")
    assert call.call.keys[11:] == (
        KEYS.sorted("high"), KEYS.wake("high"), KEYS.sorted("low"), KEYS.wake("low"), KEYS.bucket(*bucket),
    )  # fmt: skip


def test_a_call_has_so_many_parts_at_most() -> None:
    batch = SettleBatch()
    items = [settle(make(10, number=k), [D, R] * 5) for k in range(60)]  # five parts each
    for item in items:
        batch.add(item, item.lease)
    calls = calls_of(batch)
    assert [len(call.leases) for call in calls] == [25, 25, 10]
    assert [ticket for call in calls for ticket in call.tickets] == [item.lease for item in items]


def test_one_lease_with_more_parts_goes_alone() -> None:
    batch = SettleBatch()
    failed = [record(k, layout.OUT_RETRY, error=ERROR) for k in range(1_000)]
    small = settle(make(2, number=7), [D, R])
    large = settle(make(1_000, number=8), [X] * 1_000, failed)
    for item in (small, large, small):
        batch.add(item)
    assert [len(call.leases) for call in calls_of(batch)] == [1, 1, 1]


def test_a_call_has_so_many_bytes_at_most() -> None:
    batch = SettleBatch()
    result = b'"' + b"x" * 600_000 + b'"'
    for number in range(8):
        batch.add(settle(make(2, number=number), [X, D], [record(0, layout.OUT_DONE, result=result)]))
    assert [len(call.leases) for call in calls_of(batch)] == [3, 3, 2]
    batch = SettleBatch()
    huge = codec.pack([(b"A", result, b"", False)], frame_id=ID, lane="high", tracked=True)
    for _ in range(4):
        batch.add(settling.quarantined(huge[4:45], huge))
    assert [len(call.leases) for call in calls_of(batch)] == [3, 1]


def test_a_call_has_so_many_lanes_at_most() -> None:
    batch = SettleBatch()
    for number in range(40):
        batch.add(settle(make(1, number=number, lane=f"lane-{number}"), [R]), number)
    calls = calls_of(batch)
    assert [len(call.leases) for call in calls] == [formats.LANES_MAX, formats.LANES_MAX, 8]
    assert [ticket for call in calls for ticket in call.tickets] == list(range(40))


def test_frames_of_one_with_a_result_share_groups() -> None:
    batch = SettleBatch()
    batch.add(settle(make(2), [D, L]), "other")
    fields = [b'{"attempts":1,"result":%d}' % k for k in range(600)]
    leases = names(600)
    batch.add_results(bucket_of(ID), b"C,1,0,5,6,high,A*1", leases, fields, list(range(600)))
    batch.add_done(bucket_of(ID), b"C,1,0,5,6,high,B*1", names(500, 10_000), list(range(1_000, 1_500)))
    assert batch.leases == 1_101
    calls = calls_of(batch)
    assert [ticket for call in calls for ticket in call.tickets] == [
        *range(1_000, 1_500),
        *range(600),
        "other",
    ]
    assert [len(call.leases) for call in calls] == [1_000, 101]
    args = calls[0].call.args
    assert args.count("R") == 2
    at = args.index("R")
    assert args[at : at + 6] == ("R", 1, b"C,1,0,5,6,high,A*1", 250, leases[0], fields[0])


def test_results_count_for_the_bytes_of_a_call() -> None:
    batch = SettleBatch()
    body = b'{"attempts":1,"result":"' + b"x" * 65_000 + b'"}'
    for number in range(50):
        batch.add_results((number, "A"), b"C,1,0,5,6,high,A*1", names(1, number), [body], [number])
    assert [len(call.leases) for call in calls_of(batch)] == [32, 18]


@given(
    st.lists(st.integers(1, 700), max_size=5),
    st.lists(st.integers(1, 40), max_size=40),
    st.randoms(use_true_random=False),
)
def test_however_it_is_cut_each_lease_has_its_ticket(
    groups: list[int], items: list[int], rng: random.Random
) -> None:
    batch = SettleBatch()
    told: list[tuple[bytes, object]] = []
    for number, count in enumerate(groups):
        made = names(count, number * 1_000)
        batch.add_done((number, "A"), b"C,1,0,5,6,high,A*1", made, list(range(count)))
        told += list(zip(made, range(count), strict=True))
    for number, n in enumerate(items):
        item = settle(make(n, number=10_000 + number), [rng.choice([D, R, L]) for _ in range(n)])
        batch.add(item, number)
        told.append((item.lease, number))
    calls = calls_of(batch)
    assert [pair for call in calls for pair in zip(call.leases, call.tickets, strict=True)] == told


# --- and Redis agrees ---


@pytest.fixture
def scene(redis_server: RedisServer, fake_clock: FakeClock) -> Iterator[Scene]:
    with contextlib.closing(Scene(redis_server, fake_clock)) as made:
        yield made


def send(scene: Scene, batch: SettleBatch, incarnation: str, *, recovered: bool = False) -> bytes:
    marks = b""
    for made in batch.calls(scene.keys, incarnation, result_ttl_s=3_600, dlq_max=1_000, recovered=recovered):
        reply = scene.context.door.run(made.call)
        assert len(reply[1]) == len(made.leases)
        marks += reply[1]
    return marks


LETTERS = {
    "C": "C",
    "X": "X",
    "E": "E",
    "t+a": "R",
    "d+a": "D",
    "u+u": "R",
    "c+c": "R",
    "r": "Q",
    "r+run": "Q",
    "k": "Q",
}


def check(
    scene: Scene, incarnation: str, frames: dict[int, bytes], expected: dict[int, dict[int, str]]
) -> None:
    """The whole state against what became of each job."""
    where: dict[str, set[tuple[int, int]]] = {kind: set() for kind in "rktucd"}
    for number, told in expected.items():
        for index, what in told.items():
            if what[0] in where:
                where[what[0]].add((number, index))

    def jobs(found: list[bytes]) -> set[tuple[int, int]]:
        return {
            (int(codec.peek(one).frame_id[11:24]), index) for one in found for index, *_ in codec.walk(one)
        }

    client: Any = scene.client
    keys = scene.keys
    held = client.hgetall(keys.processing(incarnation))
    assert all(name == one[4:45] for name, one in held.items())
    assert jobs(list(held.values())) == where["k"]
    assert jobs(client.zrange(keys.sorted("high"), 0, -1)) == where["r"]
    assert jobs(client.zrange(keys.delayed, 0, -1)) == where["t"] | where["u"] | where["c"]
    assert jobs(client.hvals(keys.dlq)) == where["d"]
    for number, one in frames.items():
        total = codec.peek(one).total
        states = scene.snapshot(number)
        expanded = states * total if len(states) == 1 else states
        told = expected[number]
        assert expanded == "".join(LETTERS[told[index]] if index in told else "Q" for index in range(total))
    stats = scene.stats()
    flat = [what for told in expected.values() for what in told.values()]
    counts = {
        "completed": flat.count("C"), "cancelled": flat.count("X"), "expired": flat.count("E"),
        "failed": flat.count("t+a") + flat.count("d+a"), "dead": flat.count("d+a"),
        "retried": flat.count("t+a") + flat.count("u+u") + flat.count("c+c"),
    }  # fmt: skip
    assert {name: stats.get(name, 0) for name in counts} == counts
    assert "fenced" not in stats
    depth = scene.depth()
    assert depth.get("high:sorted", 0) == len(where["r"])
    assert depth.get("delayed", 0) == len(where["t"] | where["u"] | where["c"])
    bucket = scene.bucket(frames[next(iter(frames))])
    ended = sum(what in ("C", "X", "E", "d+a") for what in flat)
    assert int(client.hget(bucket, "open")) == sum(codec.peek(one).total for one in frames.values()) - ended


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dead", [False, True])
def test_redis_applies_all_of_it(scene: Scene, seed: int, dead: bool) -> None:
    rng = random.Random(seed)
    worker = scene.worker()
    frames: dict[int, bytes] = {}
    expected: dict[int, dict[int, str]] = {}
    leases, rows, batch = [], [], SettleBatch()
    current = (3, 1)  # row 3 is frame 3
    for number in range(1, 31):
        n = rng.choice([1, 2, 3, 9, 40])
        whole = make(n, number=number, attempts=rng.choice([0, 0, 1]))
        frames[number] = whole
        scene.track(whole)
        base, size = (0, n) if n < 3 or rng.random() < 0.6 else (1, n - 2)
        (frame,) = codec.cut(whole, [(base, size)])
        jobs = [(rng.choice([L, S, D, D, D, X, X, R]), rng.choice(STATUSES)) for _ in range(n)]
        if rng.random() < 0.4:
            jobs = [(D, layout.OUT_DONE)] * n
        states = [state for state, _ in jobs]
        records = [
            record(k, status, error=ERROR, result=b"1", delay_ms=50) for k, (_, status) in enumerate(jobs)
        ]
        row = row_of(whole, states, records, number=number)
        rows.append(row)
        leases.append((frame[4:45], frame))
        scene.hold(worker.incarnation, frame)
        expected[number] = {
            index: fate(*jobs[index], crash=dead, current=(number, index) == current)
            for index in range(base, base + size)
        }
        header = codec.parse(frame)
        if n == size and set(states) == {D} and not header.attempts:
            value = f"C,{n},0,5,6,high,{codec.types(whole)}".encode()
            batch.add_done(bucket_of(whole[4:30]), value, [frame[4:45]], [None])
        else:
            batch.add(claim(frame, header, row, base, size, started_ms=5, finished_ms=6))
    if dead:
        batch = recover(leases, rows, CrashPolicy("crash:x", current=current, now_ms=NOW_MS))
    marks = send(scene, batch, worker.incarnation, recovered=dead)
    assert marks == b"1" * 30
    check(scene, worker.incarnation, frames, expected)
    # again: what is not ours any more is refused, and changes nothing
    names = [name for name, _ in leases]
    if not set(names) & set(scene.client.hkeys(scene.keys.processing(worker.incarnation))):
        assert send(scene, batch, worker.incarnation) == b"0" * 30
        stats = scene.stats()
        assert stats.pop("fenced") == sum(len(told) for told in expected.values())
        scene.client.hdel(scene.keys.stats, "fenced")
        check(scene, worker.incarnation, frames, expected)


def test_words_of_jobs_reach_redis(scene: Scene) -> None:
    worker = scene.worker()
    frame = make(3)
    scene.track(frame)
    scene.hold(worker.incarnation, frame)
    records = [
        record(0, layout.OUT_DONE, result=b'{"a":1}', started_ms=5, finished_ms=6),
        record(1, layout.OUT_RETRY, error=ERROR, delay_ms=1_000),
        record(2, layout.OUT_DEAD, error=ERROR, finished_ms=7),
    ]
    batch = SettleBatch()
    batch.add(settle(frame, [X, X, X], records))
    assert send(scene, batch, worker.incarnation) == b"1"
    assert json.loads(scene.told(1, 0)) == {
        "attempts": 1,
        "started_at": 5,
        "finished_at": 6,
        "result": {"a": 1},
    }
    assert json.loads(scene.told(1, 1))["error"] == json.loads(ERROR)
    assert json.loads(scene.told(1, 2))["attempts"] == 1
    assert json.loads(scene.dlq()["1.2"])["type"] == "A"
    assert scene.delayed() == ["1.1.1 run=1 attempts=1"]
