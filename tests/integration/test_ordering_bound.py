"""The bound of the order on real Redis: whatever is predicted and whoever dies, nobody is overtaken by a job
that entered its lane more than T later."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.predictors import Told
from tests.support.redis_server import RedisServer
from tqe import codec
from tqe.board.board import Board
from tqe.job import IDS
from tqe.store import housekeeping, model, settling, working
from tqe.store.call import Call, SyncDoor
from tqe.store.keys import Keys
from tqe.worker.admission import Admission
from tqe.worker.ordering import Ordering

LANE = "normal"
LEASE_MS = 600_000
TTL = {"result_ttl_s": 60, "dlq_max": 100}


@dataclass
class Task:
    mean_ns: float = 1e9
    seen: int = 1_000_000
    is_async: bool = False


@dataclass
class Hand:
    """A worker without a process: it fetches, decides, settles and runs when the test says so."""

    world: Lane
    ordering: Ordering
    incarnation: str = ""
    window: list[tuple[bytes, list[bytes]]] = field(default_factory=list)  # decided, and not told yet
    kept: list[bytes] = field(default_factory=list)
    merge_us: int | None = None  # by how much the list's head may be preferred, if not by T
    heeds_left: bool = True
    windows: Sequence[int] = (1, 10, 200)
    sorted_maxima: Sequence[int] = (working.SORTED_MAX,)

    def begin(self) -> None:
        self.incarnation = IDS.frame_id().decode()
        self.world.run(working.takeover(self.world.keys, "", self.incarnation, LEASE_MS))

    def fetch(self) -> None:
        bound = self.ordering.bounds.get(LANE, 0)
        rule = working.LaneRule(LANE, bound if self.merge_us is None or not bound else self.merge_us)
        calls = working.Fetcher(self.world.keys, self.incarnation, [rule], LEASE_MS)
        call = calls.call(
            jobs_max=self.world.random.choice([1, 4]),
            bytes_max=1 << 20,
            frames_max=1_000,
            window_jobs=self.world.random.choice(self.windows),
            sorted_max=self.world.random.choice(self.sorted_maxima),
        )
        fetched = working.read_fetch(self.world.run(call))
        waiting = self.world.waiting()
        left = dict.fromkeys((LANE,) if fetched.left else (), next(iter(fetched.left.values()), 0))
        if not self.heeds_left:
            left = dict.fromkeys(left, 1 << 53)
        plan = self.ordering.arrange(fetched.frames, left, held_ns=0.0, idle=True, free_slots=1)
        own = [entry for _, frames in plan.returned for frame in frames for entry in entries(frame)]
        self.world.starts(plan.kept, waiting + own)
        self.window, self.kept = plan.returned, plan.kept

    def tell(self) -> None:
        """Give back what is not to run."""
        batch = settling.SettleBatch()
        for name, frames in self.window:
            batch.add(settling.returned(name, frames))
        self.world.settle(batch, self.incarnation)
        self.window = []

    def end(self) -> None:
        """The kept jobs end: completed, or failed and to be tried again."""
        batch = settling.SettleBatch()
        for frame in self.kept:
            header = codec.parse(frame)
            item = settling.Item(header.lease, header.frame_id, False)
            for index in range(header.base, header.base + header.n):
                if self.world.random.random() < 0.1:
                    again = codec.single(frame, index, run=header.run + 1, boost_us=0, flags=0)
                    item.parts.append(settling.Part(settling.RETRY, b"1", again, LANE))
                else:
                    item.ranges.append((index, 1, "C"))
            batch.add(item)
        self.world.settle(batch, self.incarnation)
        self.kept = []

    def lose(self) -> None:
        """What is held behind the first job is taken back, as the steward does behind a long one."""
        batch = settling.SettleBatch()
        for frame in self.kept[1:]:
            batch.add(settling.returned(frame[4:45], [frame]))
        if self.kept[1:]:
            self.world.settle(batch, self.incarnation)
        self.world.taken_back += len(self.kept[1:])
        del self.kept[1:]

    def crash(self) -> None:
        """It dies; the steward takes over what it held and gives it back."""
        recovery = IDS.frame_id().decode()
        taken = working.read_takeover(
            self.world.run(working.takeover(self.world.keys, self.incarnation, recovery, LEASE_MS))
        )
        batch = settling.recover(taken.leases, [], settling.CrashPolicy("crash:SIGKILL"))
        self.world.settle(batch, recovery)
        self.window, self.kept = [], []
        self.begin()


def entries(frame: bytes) -> list[int]:
    """Time of entry of each job in a frame, µs."""
    return [int(frame[111:127])] * int(frame[35:39])


class Lane:
    """One lane, what enters it, and the count of who overtook whom."""

    def __init__(self, door: SyncDoor, seed: int) -> None:
        self.door = door
        self.keys = Keys()
        self.random = random.Random(seed)
        self.overtakes = self.started = self.longest_us = self.taken_back = 0

    def run(self, call: Call) -> Any:
        return self.door.run(call)

    def settle(self, batch: settling.SettleBatch, incarnation: str) -> None:
        for made in batch.calls(self.keys, incarnation, **TTL):
            assert set(self.run(made.call)[1]) <= {ord("1")}

    def enter(self, jobs: int) -> None:
        """Frames enter at Redis' time, as `enqueue` stamps it."""
        seconds, micros = self.door.client.time()
        at = seconds * 1_000_000 + micros
        while jobs > 0:
            n = min(jobs, self.random.choice([1, 1, 1, 5, 300]))
            kinds = [
                (b"JOB", json.dumps({"ms": self.random.expovariate(1 / 20)}).encode(), b"", False)
                for _ in range(n)
            ]
            frame = codec.pack(kinds, frame_id=IDS.frame_id(), lane=LANE, tracked=False, enqueued_us=at)
            self.door.client.rpush(self.keys.queue(LANE), frame)
            self.door.client.hincrby(self.keys.depth, LANE, n)
            jobs -= n

    def promote(self) -> None:
        self.run(housekeeping.promote(self.keys, [LANE]))

    def waiting(self) -> list[int]:
        """When each job that waits in the lane has entered it."""
        client = self.door.client
        frames = client.lrange(self.keys.queue(LANE), 0, -1) + client.zrange(self.keys.sorted(LANE), 0, -1)
        return [at for frame in frames for at in entries(frame)]

    def starts(self, kept: list[bytes], waiting: list[int]) -> None:
        """These are leased to run while those wait."""
        for frame in kept:
            (entered, *_) = entries(frame)
            for other in waiting:
                if other < entered:
                    self.overtakes += 1
                    self.longest_us = max(self.longest_us, entered - other)
            self.started += 1


@pytest.fixture
def door(redis_server: RedisServer) -> Iterator[SyncDoor]:
    with contextlib.closing(redis_server.client()) as client:
        yield SyncDoor(client)


def wild(seed: int) -> Callable[[float], Any]:
    """Predictions that have nothing to do with the job, some of them none at all."""
    dice = random.Random(seed)
    return lambda _: dice.choice([0.0, 0.001, 0.02, 1.0, 1e9, float("nan"), -1.0, float("inf"), None])


T_US = 300_000
OTHERS = [
    model.Order("v2", "01", T_US // 3, 20_000.0, {LANE: "bounded"}),
    model.Order("v2", "01", T_US // 3, 20_000.0, {LANE: "fifo"}),
    model.Order("v3", "02", T_US, 60_000.0, {LANE: "bounded"}),
    model.Order("v3", "02", T_US, 60_000.0, {LANE: "shadow"}),
]
FIRST = model.Order("v1", "00", T_US, 20_000.0, {LANE: "bounded"})


def play(
    door: SyncDoor,
    change: Callable[[float], Any],
    seed: int,
    until: Callable[[Lane], bool],
    *,
    others: Sequence[model.Order] = (),
    **broken: Any,
) -> Lane:
    """Random jobs, frames, crashes and retries, workers that fetch while others have not told what they give
    back, and leases that are taken back. With `others` each worker changes to another order now and then, at
    a moment of its own."""
    lane = Lane(door, seed)
    board = Board(4)
    hands = []
    for slot in board.slots:
        tasks = {b"JOB": Task()}
        ordering = Ordering(Told(change), slot, tasks, Admission(tasks, quantum_ns=5_000_000), 5_000_000)
        ordering.follow(FIRST)
        hands.append(Hand(lane, ordering, **broken))
        hands[-1].begin()
    lane.enter(600)
    while not until(lane):
        hand, dice = lane.random.choice(hands), lane.random.random()
        if dice < 0.01:
            hand.crash()
        elif others and dice < 0.03:
            hand.ordering.follow(lane.random.choice(others))
        elif hand.window:
            hand.tell()
        elif len(hand.kept) > 1 and dice < 0.2:
            hand.lose()
        elif hand.kept:
            hand.end()
        else:
            hand.fetch()
        if lane.random.random() < 0.1:
            lane.promote()
        if lane.random.random() < 0.3:
            lane.enter(lane.random.choice([1, 3, 10]) if len(lane.waiting()) < 600 else 0)
    return lane


@pytest.mark.parametrize(
    ("change", "seed"),
    [(float, 1), (lambda s: 4e-4 / (s + 1e-3), 2), (wild(3), 3)],
    ids=["exact", "inverted", "wild"],
)
def test_nobody_is_overtaken_by_a_job_that_entered_more_than_T_later(
    door: SyncDoor, change: Callable[[float], Any], seed: int
) -> None:
    lane = play(door, change, seed, lambda lane: lane.overtakes >= 35_000)
    assert lane.longest_us <= T_US


def test_the_bound_is_the_greatest_T_while_orders_change(door: SyncDoor) -> None:
    """Another version, another T, another mode, in the midst of it, and not everywhere at once."""
    lane = play(door, float, 4, lambda lane: lane.overtakes >= 10_000, others=OTHERS)
    assert lane.longest_us <= T_US and lane.taken_back > 0


# --- what makes it so, taken away


def violated(lane: Lane) -> bool:
    assert lane.overtakes < 200_000, "nobody was overtaken by more than T"
    return lane.longest_us > T_US


def test_teeth_a_boost_above_T_is_seen(door: SyncDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    boost = Ordering._boost
    monkeypatch.setattr(Ordering, "_boost", lambda *told: 20 * boost(*told))
    assert play(door, float, 5, violated).longest_us > T_US


def test_teeth_a_list_before_the_scored_is_seen(door: SyncDoor) -> None:
    """The head counts as if it could be worth any score, and nobody asks what is left: new jobs run before
    all that were given back."""
    assert play(door, float, 6, violated, merge_us=T_US * 1000, heeds_left=False).longest_us > T_US


@pytest.mark.parametrize(
    "broken",
    [{"merge_us": T_US * 1000}, {"merge_us": 1}, {"heeds_left": False}],
    ids=["list-first", "naive-merge", "left-ignored"],
)
def test_either_the_merge_or_what_is_left_is_enough_for_the_bound(
    door: SyncDoor, broken: dict[str, Any]
) -> None:
    """Each alone holds it: the merge looks first at what may be the oldest, and a score above the lowest key
    left goes back. What each of them loses is the gain, which the replays of the mechanism show."""
    assert play(door, float, 7, lambda lane: lane.overtakes >= 1_000, **broken).longest_us <= T_US


def test_the_bound_holds_whatever_number_of_scored_jobs_workers_stop_at(door: SyncDoor) -> None:
    lane = play(door, float, 8, lambda lane: lane.overtakes >= 4_000, sorted_maxima=(20, 100, 20_000))
    assert lane.longest_us <= T_US


class Bulk(Lane):
    """Too many wait for the tests to look at them all at each step."""

    def waiting(self) -> list[int]:
        return []


def test_a_bulk_is_not_scored_to_its_end_before_its_first_job_starts(door: SyncDoor) -> None:
    lane = Bulk(door, 9)
    seconds, micros = door.client.time()
    at = seconds * 1_000_000 + micros
    for start in range(0, 200_000, 1_000):
        kinds = [
            (b"JOB", b'{"ms":%d}' % lane.random.randint(1, 9_999), b"", False)
            for _ in range(start, start + 1_000)
        ]
        frame = codec.pack(kinds, frame_id=IDS.frame_id(), lane=LANE, tracked=False, enqueued_us=at)
        door.client.rpush(lane.keys.queue(LANE), frame)
    door.client.hset(lane.keys.depth, LANE, 200_000)
    tasks = {b"JOB": Task()}
    view = Board(1).slots[0]
    ordering = Ordering(Told(), view, tasks, Admission(tasks, quantum_ns=5_000_000), 5_000_000)
    ordering.follow(model.Order("v1", "00", 60_000_000, 2e6, {LANE: "bounded"}))
    hand = Hand(lane, ordering, windows=(1_000,), sorted_maxima=(working.SORTED_MAX,))
    hand.begin()
    for started in range(3):
        while not hand.kept:
            hand.fetch()
            hand.tell()
            looked_at = view.counters()["scored"]
            assert looked_at <= working.SORTED_MAX + 2_000, f"{started} jobs have started"
        (frame,) = hand.kept
        ms = json.loads(next(iter(codec.walk(frame)))[2])["ms"]
        assert ms < 50, "the shortest of those that were looked at"
        hand.end()
    assert door.client.zcard(lane.keys.sorted(LANE)) <= working.SORTED_MAX + 2_000
    assert door.client.llen(lane.keys.queue(LANE)) > 170
