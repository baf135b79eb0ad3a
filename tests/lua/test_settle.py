"""settle: ends or changes exactly the leases that are still held."""

import contextlib
from typing import Any

import pytest

from tests.lua import frames
from tests.lua.world import OPEN_TTL_S, RESULT_TTL_S, World, done, part
from tests.support.waiting import wait_until
from tqe.errors import ScriptError
from tqe.store.call import Call

A, B, C = (frames.make(frames.frame_id(n)) for n in range(3))
BIG_ID = frames.frame_id(9)
BIG = frames.make(BIG_ID, n=10)
VALUE = "Q,10,0,0,0,high,EMAIL*10"


def cut(base: int, n: int, **fields: Any) -> bytes:
    """A part of BIG."""
    return frames.make(BIG_ID, base=base, n=n, total=10, **fields)


# -- whole frames


def test_completed_frames_leave(world: World) -> None:
    leases = world.lease(A, B, C)
    world.snapshots(A, B, C)
    now_ms, marks = world.settled(done(*leases[:2], bucket=1))
    assert marks == "11"
    state = world.state()
    state.pop("incarnations")
    assert state == {
        "processing:W1": {frames.lease(C): C},
        "stats": {b"completed": b"2"},
        "job:1700000000A": {
            frames.id_of(A): b"C,1,0,5,6,high,EMAIL*1",
            frames.id_of(B): b"C,1,0,5,6,high,EMAIL*1",
            frames.id_of(C): b"Q,1,0,0,0,high,EMAIL*1",
            b"open": b"1",
        },
    }
    assert world.client.ttl(world.bucket) > RESULT_TTL_S, "one of it is open"
    now_ms, marks = world.settled(done(leases[2], bucket=1))
    assert marks == "1"
    assert world.open_jobs() == 0
    assert world.client.ttl(world.bucket) == RESULT_TTL_S, "retention starts when the last job ends"
    assert world.state()["closed"] == {world.bucket: now_ms}


def test_untracked_frames_of_any_size(world: World) -> None:
    leases = world.lease(A, BIG, B)
    assert world.settle(done(*leases), buckets=()) == "111"
    assert set(world.state()) == {"incarnations", "stats"}
    assert world.stats() == {"completed": 12}


def test_a_second_settle_of_the_same_lease_is_fenced(world: World) -> None:
    leases = world.lease(A, B)
    world.snapshots(A, B)
    assert world.settle(done(leases[0], bucket=1)) == "1"
    before = world.state()
    assert world.settle(done(*leases, leases[0], bucket=1)) == "010"
    assert world.stats() == {"completed": 2, "fenced": 2}
    assert world.open_jobs() == int(before["job:1700000000A"][b"open"]) - 1


@pytest.mark.parametrize(
    "old", [frames.make(frames.frame_id(0), run=1), frames.make(frames.frame_id(0), n=2)]
)
def test_another_run_or_size_is_another_lease(world: World, old: bytes) -> None:
    """A repeat of a settle that was applied must not touch the next attempt of the same frame."""
    world.lease(A)
    assert world.settle(done(frames.lease(old))) == "0"
    assert world.settle(part(frames.lease(old), ranges=[(0, int(old[35:39]), "C")])) == "0"
    assert world.state()["processing:W1"] == {frames.lease(A): A}


def test_the_late_settle_of_a_former_run(world: World) -> None:
    """Failed, back in the lane, leased again by the same worker; then the first settle comes again."""
    (lease,) = world.lease(A)
    again = frames.make(frames.frame_id(0), run=1, attempts=1)
    retry = part(lease, parts=[("t", 0, again)])
    assert world.settle(retry) == "1"
    world.promote("high")
    (got,) = world.fetched()
    before = world.frames()
    assert world.settle(retry) == "0"
    assert world.frames() == before
    assert list(world.state()["processing:W1"]) == [frames.lease(got)]


def test_a_part_is_no_whole_frame(world: World) -> None:
    (lease,) = world.lease(cut(3, 2))
    assert world.settle(done(lease)) == "b"
    assert world.settle(done(lease, bucket=1, value="C,10,0,0,0,high,EMAIL*10")) == "b"
    assert world.state()["processing:W1"] == {lease: cut(3, 2)}


def test_a_value_of_another_size_is_refused(world: World) -> None:
    leases = world.lease(A, BIG)
    assert world.settle(done(*leases, bucket=1)) == "1b"
    assert world.settle(done(*leases, bucket=1, value="Q,1,0,0,0,high,EMAIL*1")) == "bb"


def test_names_that_are_none(world: World) -> None:
    (lease,) = world.lease(A)
    assert world.settle(done(b"", b"junk", lease, lease[:-1], b"\xff" * 41)) == "bb10b"
    assert world.settle(part(b"junk", ranges=[(0, 1, "C")])) == "b"


def test_many_leases_in_one_call(world: World) -> None:
    data = [frames.make(frames.frame_id(n)) for n in range(2_500)]
    leases = world.lease(*data)
    world.snapshots(*data)
    assert world.settle(done(*leases, bucket=1)) == "1" * 2_500
    assert world.open_jobs() == 0


def results(
    *pairs: tuple[bytes, str], bucket: int = 1, value: str = "C,1,0,5,6,high,EMAIL*1"
) -> tuple[Any, ...]:
    """An 'R' group."""
    return ("R", bucket, value, len(pairs), *(item for pair in pairs for item in pair))


def test_frames_of_one_with_a_result(world: World) -> None:
    leases = world.lease(A, B, C)
    world.snapshots(A, B, C)
    marks = world.settle(
        results((leases[0], '{"result":1}'), (frames.lease(BIG), "{}"), (leases[1], '{"result":2}'))
    )
    assert marks == "1b1"
    state = world.state()
    assert state["processing:W1"] == {frames.lease(C): C}
    assert state["job:1700000000A"] == {
        frames.id_of(A): b"C,1,0,5,6,high,EMAIL*1",
        frames.id_of(A) + b".0": b'{"result":1}',
        frames.id_of(B): b"C,1,0,5,6,high,EMAIL*1",
        frames.id_of(B) + b".0": b'{"result":2}',
        frames.id_of(C): b"Q,1,0,0,0,high,EMAIL*1",
        b"open": b"1",
    }
    assert world.stats() == {"completed": 2}
    assert world.settle(results((leases[0], "{}"), (leases[2], "{}"))) == "01"


def test_results_of_larger_frames_are_no_group(world: World) -> None:
    (lease,) = world.lease(BIG)
    assert world.settle(results((lease, "{}"), value="C,10,0,5,6,high,EMAIL*10")) == "b"
    assert world.state()["processing:W1"] == {lease: BIG}


# -- one lease in parts


def test_every_kind_of_part_at_once(world: World) -> None:
    (lease,) = world.lease(BIG)
    world.snapshots(BIG, value=VALUE)
    kept, back = cut(2, 1), cut(3, 2, enqueued_us=2_000_000, boost_us=500_000)
    failed, crashed, unknown, dead = cut(5, 1, run=1), cut(6, 1, run=1), cut(7, 1), cut(8, 1, run=1)
    now_ms, marks = world.settled(
        part(
            lease,
            bucket=1,
            started=40,
            finished=50,
            ranges=[(0, 1, "C"), (1, 1, "X"), (9, 1, "E")],
            fields=[(f"{BIG_ID}.0", '{"result":1}'), (f"{BIG_ID}.8", '{"error":{}}')],
            parts=[
                ("k", "", kept),
                ("r", "", back),
                ("t", 1_000, failed),
                ("c", 2_000, crashed),
                ("u", 30_000, unknown),
                ("d", '{"reason":"failed"}', dead),
            ],
        )
    )
    assert marks == "1"
    state = world.state()
    state.pop("incarnations")
    assert state == {
        "processing:W1": {frames.lease(kept): kept},
        "sorted:high": {back: 1_500_000},
        "wake:high": [b"w"],
        "delayed": {failed: now_ms + 1_000, crashed: now_ms + 2_000, unknown: now_ms + 30_000},
        "dlq": {f"{BIG_ID}.8".encode(): dead},
        "dlq_meta": {f"{BIG_ID}.8".encode(): b'{"reason":"failed"}'},
        "dlq_index": {f"{BIG_ID}.8".encode(): now_ms},
        "depth": {b"high:sorted": b"2", b"delayed": b"3"},
        "stats": {
            b"completed": b"1",
            b"cancelled": b"1",
            b"expired": b"1",
            b"failed": b"2",
            b"retried": b"3",
            b"dead": b"1",
        },
        "job:1700000000A": {
            BIG_ID.encode(): b"CXQQQRRRDE,10,0,40,50,high,EMAIL*10",
            f"{BIG_ID}.0".encode(): b'{"result":1}',
            f"{BIG_ID}.8".encode(): b'{"error":{}}',
            b"open": b"6",
        },
    }


def test_a_cut_frame_ends_part_by_part(world: World) -> None:
    first, second = cut(0, 4), cut(4, 6)
    leases = world.lease(first, second)
    world.snapshots(BIG, value=VALUE)
    assert world.settle(part(leases[1], bucket=1, started=7, finished=9, ranges=[(4, 6, "C")])) == "1"
    assert world.snapshot(BIG) == "QQQQCCCCCC,10,0,7,9,high,EMAIL*10"
    assert world.open_jobs() == 4
    assert world.settle(part(leases[0], bucket=1, started=6, finished=8, ranges=[(0, 4, "C")])) == "1"
    assert world.snapshot(BIG) == "C,10,0,7,9,high,EMAIL*10", "times are the latest of the parts"
    assert world.open_jobs() == 0
    assert world.client.ttl(world.bucket) == RESULT_TTL_S


def test_two_parts_of_one_frame_in_one_call(world: World) -> None:
    first, second = cut(0, 4), cut(4, 6)
    leases = world.lease(first, second)
    world.snapshots(BIG, value=VALUE)
    marks = world.settle(
        part(leases[0], bucket=1, ranges=[(0, 4, "C")]), part(leases[1], bucket=1, ranges=[(4, 6, "X")])
    )
    assert marks == "11"
    assert world.snapshot(BIG) == "CCCCXXXXXX,10,0,0,0,high,EMAIL*10"


def test_a_retry_of_a_frame_of_one_keeps_its_due_time(world: World) -> None:
    (lease,) = world.lease(A)
    world.snapshots(A)
    again = frames.make(frames.frame_id(0), run=1, attempts=1)
    now_ms, _ = world.settled(part(lease, bucket=1, started=5, parts=[("t", 20 * 86_400_000, again)]))
    due = now_ms + 20 * 86_400_000
    assert world.snapshot(A) == f"R,1,{due},5,0,high,EMAIL*1"
    assert world.state()["delayed"] == {again: due}
    assert world.open_jobs() == 1
    # The record must outlive the wait.
    assert world.client.ttl(world.bucket) >= 20 * 86_400 + OPEN_TTL_S - 1


def test_what_was_retrying_is_queued_when_it_comes_back(world: World) -> None:
    (lease,) = world.lease(cut(2, 4, run=1))
    world.snapshots(BIG, value="QQQRRDQQQR,10,0,0,0,high,EMAIL*10")
    world.settle(part(lease, bucket=1, parts=[("r", "", cut(2, 2, run=1)), ("k", "", cut(4, 2, run=1))]))
    assert world.snapshot(BIG) == "QQQQQDQQQR,10,0,0,0,high,EMAIL*10"


def test_a_kept_lease_with_the_same_name_stays(world: World) -> None:
    """A flag in the header may change without a cut."""
    (lease,) = world.lease(A)
    flagged = A[:2] + b"I" + A[3:]
    assert world.settle(part(lease, parts=[("k", "", flagged)])) == "1"
    assert world.state()["processing:W1"] == {lease: flagged}
    assert world.stats() == {}


def test_a_damaged_frame_goes_to_quarantine_with_its_bytes(world: World) -> None:
    bad = BIG[:200] + b"?" + BIG[201:]
    (lease,) = world.lease(bad)
    world.snapshots(BIG, value=VALUE)
    assert world.settle(part(lease, bucket=1, parts=[("q", "", b"what the worker read")])) == "1"
    state = world.state()
    assert state["quarantine"] == [bad]
    assert "processing:W1" not in state
    assert world.snapshot(BIG) == "B,10,0,0,0,high,EMAIL*10"
    assert world.stats() == {"quarantined": 10}
    assert world.open_jobs() == 0


def test_returned_frames_go_to_their_own_lanes(world: World) -> None:
    low = frames.make(frames.frame_id(5), lane="low", enqueued_us=7)
    high = frames.make(frames.frame_id(6), enqueued_us=8, boost_us=20)
    leases = world.lease(low, high)
    world.settle(
        part(leases[0], parts=[("r", "", low)]),
        part(leases[1], parts=[("r", "", high)]),
        lanes=("high", "low"),
    )
    state = world.state()
    assert (state["sorted:low"], state["sorted:high"]) == ({low: 7}, {high: -12})
    assert world.depth() == {"high:sorted": 1, "low:sorted": 1}
    assert (world.tokens("high"), world.tokens("low")) == (1, 1)


def test_recovery_counts_what_it_moves(world: World) -> None:
    (lease,) = world.lease(BIG)
    world.settle(
        part(lease, ranges=[(0, 3, "C")], parts=[("k", "", cut(3, 2)), ("r", "", cut(5, 5))]), recovered=1
    )
    assert world.stats() == {"completed": 3, "recovered": 8}


BAD: dict[str, dict[str, Any]] = {
    "a hole": {"ranges": [(0, 4, "C"), (5, 5, "C")]},
    "nothing": {},
    "too short": {"ranges": [(0, 9, "C")]},
    "too long": {"ranges": [(0, 11, "C")]},
    "an overlap": {"ranges": [(0, 6, "C"), (5, 5, "C")]},
    "twice": {"ranges": [(0, 10, "C"), (0, 10, "C")]},
    "beyond": {"ranges": [(0, 10, "C"), (10, 1, "C")]},
    "empty piece": {"ranges": [(0, 10, "C"), (3, 0, "C")]},
    "a state that no range has": {"ranges": [(0, 10, "D")]},
    "no numbers": {"ranges": [("x", 10, "C")]},
    "a foreign part": {"parts": [("r", "", frames.make(frames.frame_id(8), n=10))]},
    "a part that is no frame": {"ranges": [(0, 9, "C")], "parts": [("r", "", b"junk")]},
    "a part that does not fit": {"ranges": [(0, 8, "C")], "parts": [("r", "", cut(9, 1))]},
    "a kind that does not exist": {"ranges": [(0, 9, "C")], "parts": [("z", "", cut(9, 1))]},
    "a lane that is missing": {"parts": [("r", "", frames.make(BIG_ID, n=10, lane="nowhere"))]},
    "ten dead in one": {"parts": [("d", "{}", BIG)]},
    "a delay that is none": {"parts": [("t", "soon", BIG)]},
    "a negative delay": {"parts": [("c", -1, BIG)]},
    "quarantine beside others": {"ranges": [(0, 1, "C")], "parts": [("q", "", BIG)]},
}


@pytest.mark.parametrize("what", BAD.values(), ids=BAD)
def test_pieces_that_do_not_tile_the_lease_are_refused(world: World, what: dict[str, Any]) -> None:
    lease, other = world.lease(BIG, A)
    world.snapshots(BIG, value=VALUE)
    before = world.state()
    assert world.settle(part(lease, bucket=1, **what)) == "b"
    assert world.state() == before
    # The others of the call are not held up by it.
    assert world.settle(part(lease, bucket=1, **what), done(other)) == "b1"


GARBLED = [
    ("X",),
    ("C", 1, "v"),
    ("C", 1, "v", 2, frames.lease(A)),
    ("C", 9, "v", 1, frames.lease(A)),
    ("C", "x", "v", 1, frames.lease(A)),
    ("P", frames.lease(A), 1, 0, 0, 1),
    ("P", frames.lease(A), 1, 0, 0, 0, 0, 5, "k"),
    ("P", frames.lease(A), 9, 0, 0, 1, 0, 1, "C", 0, 0),
    ("P", frames.lease(A), 1, "", 0, 1, 0, 1, "C", 0, 0),
]


@pytest.mark.parametrize("group", GARBLED, ids=str)
def test_groups_that_cannot_be_read_are_refused_whole(world: World, group: tuple[Any, ...]) -> None:
    (lease,) = world.lease(A)
    before = world.state()
    call = world.settle_call(done(lease), group)
    with pytest.raises(ScriptError) as caught:
        world.door.run(call)
    assert caught.value.code == "BAD"
    assert world.state() == before


def test_keys_that_are_missing_are_refused(world: World) -> None:
    (lease,) = world.lease(A)
    call = world.settle_call(done(lease))
    with pytest.raises(ScriptError):
        world.door.run(Call("settle", call.keys[:-1], call.args))


def test_an_expired_record_stays_expired(world: World) -> None:
    """A field written into it again would have no time to live, or a life without the rest."""
    (lease,) = world.lease(BIG)
    marks = world.settle(part(lease, bucket=1, ranges=[(0, 10, "C")], fields=[(f"{BIG_ID}.0", "{}")]))
    assert marks == "1"
    assert set(world.state()) == {"incarnations", "stats"}


def test_a_whole_frame_whose_record_has_expired(world: World) -> None:
    (lease,) = world.lease(A)
    assert world.settle(done(lease, bucket=1)) == "1"
    world.state()  # checks that the bucket has a time to live
    assert world.client.ttl(world.bucket) == RESULT_TTL_S


def test_a_record_without_time_to_live_gets_one(world: World) -> None:
    leases = world.lease(A, B)
    world.snapshots(A, B)
    world.client.persist(world.bucket)
    world.settle(done(leases[0], bucket=1))
    assert world.client.ttl(world.bucket) == OPEN_TTL_S


def test_a_damaged_record_does_not_hold_up_its_job(world: World) -> None:
    leases = world.lease(BIG, A)
    world.snapshots(BIG, A, value="nonsense")
    marks = world.settle(
        part(leases[0], bucket=1, ranges=[(0, 10, "C")]), part(leases[1], bucket=1, ranges=[(0, 1, "C")])
    )
    assert marks == "11"


# -- the dead-letter queue's limit


def test_the_oldest_dead_are_dropped_beyond_the_limit(world: World) -> None:
    data = [frames.make(frames.frame_id(n)) for n in range(5)]
    for number, frame in enumerate(data):
        (lease,) = world.lease(frame)
        assert world.settle(part(lease, parts=[("d", "{}", frame)]), dlq_max=3) == "1"
        world.client.zadd(world.keys.dlq_index, {frames.id_of(frame) + b".0": number})
    names = {frames.id_of(frame) + b".0" for frame in data[2:]}
    state = world.state()
    assert set(state["dlq"]) == set(state["dlq_meta"]) == set(state["dlq_index"]) == names
    assert world.stats() == {"failed": 5, "dead": 5, "dlq_dropped": 2}


# -- those who wait


def test_who_waits_is_told_once_for_each_frame(world: World) -> None:
    leases = world.lease(A, B, cut(0, 5), cut(5, 5))
    world.snapshots(A, B, value="Q,1,0,0,0,high,EMAIL*1")
    world.snapshots(BIG, value=VALUE)
    world.client.zadd(world.keys.waiting, {frames.id_of(A): 1, BIG_ID: 1})
    with contextlib.closing(world.client.pubsub()) as listener:
        listener.psubscribe(world.keys.done("*"))
        wait_until(lambda: listener.get_message(timeout=1))
        world.settle(
            done(*leases[:2], bucket=1),
            part(leases[2], bucket=1, ranges=[(0, 5, "C")]),
            part(leases[3], bucket=1, ranges=[(5, 5, "C")]),
        )
        heard = [wait_until(lambda: listener.get_message(timeout=1)) for _ in range(2)]
        assert [message["channel"] for message in heard] == [
            world.keys.done(frames.id_of(A)),
            world.keys.done(BIG_ID),
        ]
        assert listener.get_message(timeout=0.01) is None


def test_a_retry_wakes_nobody(world: World) -> None:
    (lease,) = world.lease(A)
    world.snapshots(A)
    world.client.zadd(world.keys.waiting, {frames.id_of(A): 1})
    with contextlib.closing(world.client.pubsub()) as listener:
        listener.psubscribe(world.keys.done("*"))
        wait_until(lambda: listener.get_message(timeout=1))
        world.settle(part(lease, bucket=1, parts=[("t", 5, frames.make(frames.frame_id(0), run=1))]))
        assert listener.get_message(timeout=0.01) is None
