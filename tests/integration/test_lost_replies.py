"""Every script's command lost, its reply lost, and applied late, after the sender has taken itself over.

In the end the books must be right. Nothing here is an excuse for a second execution: a worker that lost a
reply asks Redis what became of it. The client's own scripts stand in test_client.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chaos.proxy import HANG, RESET, Command, Match, Proxy, Rule, runs
from tests.support.fake_clock import FakeClock
from tests.support.predictors import Told, set_order
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker import Rig, WorkerProcess
from tqe import Reject, Retry, codec, current_job
from tqe.board import layout
from tqe.errors import RedisUnavailable
from tqe.job import IDS
from tqe.steward.context import Context
from tqe.steward.delayed import Delayed, Unparker
from tqe.steward.reaper import Reaper
from tqe.steward.recovery import Recovery
from tqe.steward.renewal import Renewal
from tqe.store.call import SyncDoor, connect
from tqe.store.scripts import SCRIPTS

MODES = ("request", "reply", "late")
each_mode = pytest.mark.parametrize("mode", MODES)


def seldom(*cases: Any) -> list[Any]:
    """Cases that only the campaign runs."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.campaign)
        for case in cases
    ]


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """Stands before the shared server."""
    path = redis_server.folder / "proxy.sock"
    path.unlink(missing_ok=True)
    with contextlib.closing(redis_server.client()) as client:
        for (
            script
        ) in SCRIPTS.values():  # or the first call of each would be answered NOSCRIPT, and sent twice
            client.script_load(script.text)
    with Proxy(redis_server.socket, path) as made:
        yield made
    path.unlink(missing_ok=True)
    assert made.errors == []


def fault(proxy: Proxy, mode: str, match: Match, *, nth: int = 1, then: str = RESET) -> Rule:
    if mode == "request":
        return proxy.drop_request(match, nth=nth, then=then)
    if mode == "reply":
        return proxy.drop_reply(match, nth=nth, then=then)
    return proxy.late(match, nth=nth, then=then)


def let_it_come(rule: Rule) -> None:
    """A command that was held back is applied now."""
    if rule.action == "late":
        rule.release()
        assert rule.applied.wait(10), "the held command was never applied"


# ------------------------------------------------------------------ what a settle says


def settle_kinds(command: Command) -> set[str]:
    """What a call of settle does: C for whole frames done, else ends of ranges as =C, =X, =E, and kinds of
    parts."""
    args = command.args
    kinds: set[str] = set()
    at = 7 + int(args[0])
    while at < len(args):
        if args[at] == b"C":
            kinds.add("C")
            at += 4 + int(args[at + 3])
            continue
        ranges = int(args[at + 5])
        at += 6
        kinds |= {"=" + args[at + 3 * k + 2].decode() for k in range(ranges)}
        at += 3 * ranges
        at += 1 + 2 * int(args[at])
        parts = int(args[at])
        kinds |= {args[at + 1 + 3 * k].decode() for k in range(parts)}
        at += 1 + 3 * parts
    return kinds


def settles(*kinds: str) -> Match:
    """Calls of settle that do all of this."""
    is_settle = runs(SCRIPTS["settle"].sha)
    return lambda command: is_settle(command) and settle_kinds(command) >= set(kinds)


# ------------------------------------------------------------------ the worker's scripts


def tasks(rig: Rig) -> None:
    """One task for each way to end."""

    def began(n: int) -> None:
        rig.journal("began", n)

    @rig.app.task("QUICK")
    def quick(n: int) -> None:
        began(n)

    @rig.app.task("VALUE")
    def value(n: int) -> int:
        began(n)
        return n

    @rig.app.task("FLAKY")
    def flaky(n: int) -> int:
        began(n)
        if current_job().attempt == 1:
            raise Retry(delay=0)
        return n

    @rig.app.task("DOOMED")
    def doomed(n: int) -> None:
        began(n)
        raise Reject("as asked")

    @rig.app.task("LONG")
    def long(n: int) -> int:
        began(n)
        time.sleep(0.006)
        return n

    @rig.app.task("ASYNC")
    async def asynchronous(n: int) -> int:
        began(n)
        await asyncio.sleep(0.001 if n % 3 else 0.25)
        return n


class Expected:
    """What a load must come to: executions by job, and how many jobs end in which state."""

    def __init__(self, ran: dict[int, int] | None, states: dict[str, int]) -> None:
        self.ran = ran
        self.states = states


def load(rig: Rig, kind: str, many: int = 40) -> Expected:
    """Submit what makes a worker send a settle of this kind."""
    once = dict.fromkeys(range(many), 1)
    payloads = [{"n": n} for n in range(many)]
    if kind == "done":
        for payload in payloads:  # frames of one, which are never cut
            rig.submit("QUICK", payload)
    elif kind == "result":
        rig.frame("VALUE", payloads)
    elif kind == "retry":
        rig.frame("FLAKY", payloads[: many // 2])
        return Expected(dict.fromkeys(range(many // 2), 2), {"completed": many // 2})
    elif kind == "dead":
        rig.frame("DOOMED", payloads)
        return Expected(once, {"dead": many})
    elif kind == "returned":
        rig.frame("LONG", payloads)
    elif kind == "kept":
        rig.frame("ASYNC", payloads)
    elif kind == "cancelled":
        handles = rig.frame("VALUE", payloads)
        for handle in handles[::2]:
            assert handle.cancel() == "requested"
        return Expected(dict.fromkeys(range(1, many, 2), 1), {"completed": many // 2, "cancelled": many // 2})
    elif kind == "expired":
        rig.frame("VALUE", payloads, expires=0.01)
        end = time.monotonic() + 0.02
        wait_until(lambda: time.monotonic() > end)
        return Expected({}, {"expired": many})
    elif kind == "unknown":
        rig.frame("UNHEARD", payloads)
        return Expected({}, {"retrying": many})
    else:
        raise AssertionError(kind)
    return Expected(once, {"completed": many})


KINDS: dict[str, Match] = {
    "done": settles("C"),
    "result": settles("=C"),
    "retry": settles("t"),
    "dead": settles("d"),
    "returned": settles("r"),
    "kept": settles("k", "=C"),
    "cancelled": settles("=X"),
    "expired": settles("=E"),
    "unknown": settles("u"),
}


def taken_over_from(worker: WorkerProcess, rule: Rule) -> None:
    """Wait until the sender of the faulty command lives under another name."""
    assert rule.command is not None
    names = b" ".join(rule.command.keys).decode()
    wait_until(lambda: worker.incarnation and worker.incarnation not in names, 10, "it takes itself over")


def check(rig: Rig, expected: Expected, *workers: WorkerProcess, ghosts: bool = False) -> None:
    """Wait for the end of it, drain, and look into the books.

    `ghosts`: late takeovers may have registered names without leases, which stay until their lease ends.
    """

    def over() -> bool:
        stats = rig.stats()
        ended = sum(stats.get(name, 0) for name in ("completed", "dead", "cancelled", "expired"))
        return ended + (rig.redis.zcard(rig.keys.delayed) if "retrying" in expected.states else 0) >= len(
            rig.ids
        )

    wait_until(over, 15, f"{len(rig.ids)} jobs end; {rig.stats()}, held: {rig.leases()}")
    for worker in workers:
        assert worker.drain() == 0, worker.told()
    rig.redis.delete(rig.keys.cancel)  # the steward sweeps it
    books = rig.books()
    assert books.problems(incarnations=len(rig.incarnations()) if ghosts else 0) == []
    assert books.states() == expected.states
    if expected.ran is not None:
        assert rig.journal.count("began") == Counter(expected.ran)


SETTLES = [*((kind, 1) for kind in KINDS), ("returned", 2)]
SELDOM = [(kind, nth) for kind in KINDS for nth in (2, 3, 4) if (kind, nth) not in SETTLES]


@each_mode
@pytest.mark.parametrize(("kind", "nth"), [*SETTLES, *seldom(*SELDOM)])
def test_settle(rig: Rig, proxy: Proxy, kind: str, nth: int, mode: str) -> None:
    tasks(rig)
    expected = load(rig, kind)
    rule = fault(proxy, mode, KINDS[kind], nth=nth)
    rig.steward()
    worker = rig.worker(url=proxy.url)
    if nth == 1:
        assert rule.fired.wait(10)
    elif not rule.fired.wait(0.5):
        proxy.clear()  # this load needs one such settle only
    if rule.fired.is_set():
        taken_over_from(worker, rule)
        let_it_come(rule)
    check(rig, expected, worker)


@each_mode
@pytest.mark.parametrize("nth", [1, 2, *seldom(3, 4, 5, 6, 7, 8)])
def test_fetch(rig: Rig, proxy: Proxy, nth: int, mode: str) -> None:
    tasks(rig)
    rig.frame("LONG", [{"n": n} for n in range(40)])
    rig.frame("VALUE", [{"n": n} for n in range(40, 400)])
    expected = Expected(dict.fromkeys(range(400), 1), {"completed": 400})
    rule = fault(proxy, mode, runs(SCRIPTS["fetch"].sha), nth=nth)
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(10)
    taken_over_from(worker, rule)
    let_it_come(rule)
    check(rig, expected, worker)
    assert worker.counter("takeovers") == 2


@pytest.mark.campaign
@each_mode
def test_two_workers_lose_settles_and_fetches_again_and_again(rig: Rig, proxy: Proxy, mode: str) -> None:
    """Of each script that a worker calls, one in seven, until the work is done."""
    tasks(rig)
    rig.frame("LONG", [{"n": n} for n in range(80)])
    rig.frame("ASYNC", [{"n": n} for n in range(80, 160)])
    rig.frame("FLAKY", [{"n": n} for n in range(160, 180)])
    rig.frame("QUICK", [{"n": n} for n in range(180, 1_000)])
    rules: list[Rule] = []

    def again() -> None:
        for script in ("fetch", "settle", "takeover"):
            rules.append(fault(proxy, mode, runs(SCRIPTS[script].sha), nth=7))

    again()
    rig.steward()
    workers = [rig.worker(url=proxy.url, ready=False) for _ in range(2)]
    until = time.monotonic() + 15
    while (
        sum(rig.stats().get(name, 0) for name in ("completed", "dead")) < 1_000 and time.monotonic() < until
    ):
        if rules[-3].fired.is_set() or rules[-2].fired.is_set():
            proxy.clear()
            for rule in rules[-3:]:
                if rule.fired.is_set():
                    rule.release()
            again()
        time.sleep(0.005)
    proxy.clear()
    for rule in rules:
        rule.release()
    ran = dict.fromkeys(range(1_000), 1) | dict.fromkeys(range(160, 180), 2)
    check(rig, Expected(ran, {"completed": 1_000}), *workers)
    assert sum(rule.fired.is_set() for rule in rules) > 3


@each_mode
def test_the_first_takeover(rig: Rig, proxy: Proxy, mode: str) -> None:
    tasks(rig)
    expected = load(rig, "result")
    rule = fault(proxy, mode, runs(SCRIPTS["takeover"].sha))
    worker = rig.worker(url=proxy.url)  # it repeats the same pair of names until it is answered
    let_it_come(rule)
    assert len(rig.incarnations()) == 1
    check(rig, expected, worker)


@each_mode
@pytest.mark.parametrize("kind", ["kept", *seldom("result", "retry", "returned")])
def test_a_takeover_with_leases_in_hand(rig: Rig, proxy: Proxy, kind: str, mode: str) -> None:
    tasks(rig)
    expected = load(rig, kind)
    rule = fault(proxy, mode, runs(SCRIPTS["takeover"].sha), nth=2)
    rig.steward()
    worker = rig.worker(url=proxy.url)
    first = worker.incarnation
    wait_until(lambda: rig.journal.notes("began"), 5)
    worker.say(layout.STOP_RESYNC)
    assert rule.fired.wait(10)
    wait_until(lambda: worker.incarnation != first, 5)
    let_it_come(rule)
    assert rig.incarnations() == [worker.incarnation]
    check(rig, expected, worker)


def test_a_takeover_that_comes_when_its_name_is_history(rig_of: Callable[..., Rig], proxy: Proxy) -> None:
    """Applied after the worker has moved on twice: a name without leases is registered, which ends with its
    lease."""
    rig = rig_of(lease_ms=1_000)
    tasks(rig)
    expected = load(rig, "kept")
    rule = fault(proxy, "late", runs(SCRIPTS["takeover"].sha), nth=2)
    rig.steward()
    worker = rig.worker(url=proxy.url)
    first = worker.incarnation
    wait_until(lambda: rig.journal.notes("began"), 5)
    worker.say(layout.STOP_RESYNC)
    assert rule.fired.wait(10)
    wait_until(lambda: worker.incarnation != first, 5)
    second = worker.incarnation
    worker.say(layout.STOP_RESYNC)
    wait_until(lambda: worker.incarnation != second, 5)
    let_it_come(rule)
    assert set(rig.incarnations()) == {second, worker.incarnation}
    assert second not in rig.leases()
    wait_until(lambda: rig.incarnations() == [worker.incarnation], 10, "the ghost is reaped")
    check(rig, expected, worker)


@each_mode
def test_leave(rig: Rig, proxy: Proxy, mode: str) -> None:
    tasks(rig)
    expected = load(rig, "result")
    rule = fault(proxy, mode, runs(SCRIPTS["leave"].sha))
    worker = rig.worker(url=proxy.url)
    rig.wait_ended()
    assert worker.drain() == 0
    assert rule.fired.is_set()
    assert len(rig.incarnations()) == (0 if mode == "reply" else 1) and rig.leases() == {}
    worker.bury()
    rig.steward()
    wait_until(lambda: worker.view.get(layout.C_STATE) == layout.RECOVERED, 5)
    let_it_come(rule)
    check(rig, expected)


@pytest.mark.parametrize("mode", ["reply", "late"])
@pytest.mark.parametrize("kind", ["result", "retry", "returned", "kept"])
def test_a_worker_that_dies_before_it_knows(rig: Rig, proxy: Proxy, kind: str, mode: str) -> None:
    """Its settle is on the wire, or was applied and never answered, when it is killed: the steward reads the
    board."""
    tasks(rig)
    expected = load(rig, kind)
    rule = fault(proxy, mode, KINDS[kind], then=HANG)
    worker = rig.worker(url=proxy.url)
    assert rule.fired.wait(10)
    # It goes on with what it holds until it has to wait for the answer.
    wait_until(lambda: not worker.view.get(layout.C_IN_USER) and not worker.view.get(layout.C_ASYNC), 5)
    worker.kill()
    if mode == "late":
        worker.bury()
        duty(rig).run_once()
        let_it_come(rule)
    else:
        worker.bury()
    rig.steward()
    second = rig.worker()
    check(rig, expected, second)


# ------------------------------------------------------------------ the steward's scripts


def context(rig: Rig, url: str | None = None, **more: Any) -> Context:
    door = SyncDoor(connect(url or rig.server.url))
    return Context(rig.settings, rig.board, door, rig.keys, "here", **more)


def duty(rig: Rig) -> Recovery:
    return Recovery(context(rig))


def until_done(run: Callable[[], Any], tries: int = 5) -> int:
    """Repeat as the steward's loop does; how often it failed."""
    for failed in range(tries):
        try:
            run()
        except RedisUnavailable:
            continue
        return failed
    raise AssertionError(f"still failing after {tries} tries")


@each_mode
@pytest.mark.parametrize("script", ["takeover", "settle", "leave"])
@pytest.mark.parametrize("kind", ["kept", *seldom("retry", "done", "result", "dead", "returned")])
def test_recovery(rig: Rig, proxy: Proxy, kind: str, script: str, mode: str) -> None:
    """A worker that was killed at work; the job that ran, and no other, runs again."""
    tasks(rig)
    # Whatever ran beside others comes back as a suspect, and those run one at a time.
    expected = load(rig, kind, 12 if kind == "kept" else 40)
    worker = rig.worker()
    wait_until(lambda: len(rig.journal.notes("began")) > 3, 5)
    worker.kill()
    ran_before = rig.journal.count("began")
    at_risk = _running(rig, worker)
    worker.bury()
    rule = fault(proxy, mode, runs(SCRIPTS[script].sha))
    recovery = Recovery(context(rig, proxy.url))
    held = bool(rig.leases())
    failed = until_done(recovery.run_once)
    if held or script != "settle":
        assert failed == 1 and rule.fired.is_set()
        let_it_come(rule)
    assert worker.view.get(layout.C_STATE) == layout.RECOVERED
    assert rig.board.recovery_id(worker.view.number) == ""
    # A takeover that comes when all is over registers a name without leases, which ends with its lease.
    ghosts = 1 if (script, mode) == ("takeover", "late") else 0
    assert len(rig.incarnations()) == ghosts and rig.leases() == {}
    assert rig.books().problems(incarnations=ghosts) == []
    rig.steward()
    second = rig.worker()
    wait_until(lambda: sum(rig.stats().get(n, 0) for n in ("completed", "dead")) >= len(rig.ids), 15)
    assert second.drain() == 0
    again = rig.journal.count("began") - Counter(expected.ran)
    assert sum(again.values()) <= at_risk and again.keys() <= ran_before.keys(), (again, at_risk)
    books = rig.books()
    assert books.problems(incarnations=ghosts) == [] and books.states() == expected.states


def _running(rig: Rig, worker: WorkerProcess) -> int:
    """Jobs that had started and not returned."""
    return sum(row.states.count(layout.JOB_STARTED) for row in worker.view.rows())


@each_mode
def test_renew(rig: Rig, proxy: Proxy, mode: str) -> None:
    tasks(rig)
    worker = rig.worker()
    rule = fault(proxy, mode, runs(SCRIPTS["renew"].sha))
    renewal = Renewal(context(rig, proxy.url))
    assert until_done(renewal.run_once) == 1
    assert renewal.run_once().renewed == (worker.incarnation,)
    assert worker.drain() == 0
    let_it_come(rule)
    assert rig.incarnations() == []  # it never revives
    assert rig.books().problems() == []


@each_mode
def test_promote(rig: Rig, proxy: Proxy, mode: str) -> None:
    tasks(rig)
    rig.frame("QUICK", [{"n": n} for n in range(30)], delay=0.02)
    rig.frame("VALUE", [{"n": n} for n in range(30, 40)], delay=0.02, priority="high")
    end = time.monotonic() + 0.03
    wait_until(lambda: time.monotonic() > end)
    rule = fault(proxy, mode, runs(SCRIPTS["promote"].sha))
    delayed = Delayed(context(rig, proxy.url))
    assert until_done(delayed.run_once) == 1
    let_it_come(rule)
    assert rig.books().problems() == [] and rig.redis.zcard(rig.keys.delayed) == 0
    worker = rig.worker()
    check(rig, Expected(dict.fromkeys(range(40), 1), {"completed": 40}), worker)


@each_mode
def test_unpark(rig: Rig, proxy: Proxy, mode: str) -> None:
    tasks(rig)
    rig.frame("QUICK", [{"n": n} for n in range(30)])
    rig.frame("VALUE", [{"n": n} for n in range(30, 40)], priority="high")
    for lane in ("normal", "high"):  # as if an older version had met them
        for frame in rig.redis.lrange(rig.keys.queue(lane), 0, -1):
            rig.redis.rpush(rig.keys.parked, frame)
        rig.redis.delete(rig.keys.queue(lane), rig.keys.wake(lane))
    rig.redis.delete(rig.keys.depth)
    rule = fault(proxy, mode, runs(SCRIPTS["unpark"].sha))
    unparker = Unparker(context(rig, proxy.url))
    assert until_done(unparker.run_once) == 1
    let_it_come(rule)
    assert rig.books().problems() == []
    worker = rig.worker()
    check(rig, Expected(dict.fromkeys(range(40), 1), {"completed": 40}), worker)


@each_mode
@pytest.mark.parametrize("script", ["takeover", "settle", "leave"])
def test_reap(rig: Rig, proxy: Proxy, fake_clock: FakeClock, script: str, mode: str) -> None:
    """A reaper that lost a reply may leave the leases under a name of its own: that one ends too, and is
    reaped."""
    tasks(rig)
    rig.frame("QUICK", [{"n": n} for n in range(30)])
    ghost = IDS.frame_id().decode()
    (frame,) = rig.redis.lrange(rig.keys.queue("normal"), 0, -1)
    rig.redis.delete(rig.keys.queue("normal"), rig.keys.wake("normal"), rig.keys.depth)
    rig.redis.hset(rig.keys.processing(ghost), frame[4:45], frame)
    rig.redis.zadd(rig.keys.incarnations, {ghost: 1})
    rule = fault(proxy, mode, runs(SCRIPTS[script].sha))
    reaper = Reaper(context(rig, proxy.url, clock=fake_clock))
    failed = 0
    for _ in range(60):
        fake_clock.advance(ms=1_000)
        try:
            reaper.run_once()
        except RedisUnavailable:
            failed += 1
            if mode == "late":
                let_it_come(rule)
            # Time passes for Redis as well: whatever is registered has ended.
            for name in rig.incarnations():
                rig.redis.zadd(rig.keys.incarnations, {name: 1})
        if not rig.incarnations() and not rig.leases():
            break
    assert failed == 1
    books = rig.books()
    assert books.problems() == [] and books.states() == {"queued": 30}
    (back,) = rig.redis.zrange(rig.keys.sorted("normal"), 0, -1)
    assert codec.parse(back).reaps == 1
    worker = rig.worker()
    check(rig, Expected(dict.fromkeys(range(30), 1), {"completed": 30}), worker)


def test_fetched_and_settled_in_silence(rig_of: Callable[..., Rig], proxy: Proxy) -> None:
    """No reset comes: the worker waits for its deadline, then asks what became of its settle."""
    rig = rig_of(lease_ms=3_000)
    tasks(rig)
    expected = load(rig, "returned")
    rules = [fault(proxy, mode, settles("r"), nth=1, then=HANG) for mode in ("reply",)]
    worker = rig.worker(url=proxy.url)
    assert rules[0].fired.wait(10)
    with contextlib.suppress(AssertionError):
        taken_over_from(worker, rules[0])
    check(rig, expected, worker)


# ------------------------------------------------------------------ all of it together


@pytest.mark.parametrize("seed", [1, *seldom(*range(2, 42))])
def test_a_storm(rig: Rig, proxy: Proxy, seed: int) -> None:
    """Three workers, faults in any script at any moment, resyncs, flushes: nothing lost or repeated."""
    dice = random.Random(seed)
    tasks(rig)
    quick = range(300, 1_500)
    rig.frame("LONG", [{"n": n} for n in range(100)])
    rig.frame("ASYNC", [{"n": n} for n in range(100, 200)], priority="high")
    rig.frame("FLAKY", [{"n": n} for n in range(200, 230)])
    rig.frame("DOOMED", [{"n": n} for n in range(230, 300)])
    rig.frame("VALUE", [{"n": n} for n in quick[:600]])
    for n in quick[600:900]:
        rig.submit("QUICK", {"n": n})
    rig.frame("QUICK", [{"n": n} for n in quick[900:]], priority="low")
    rig.steward()
    workers = [rig.worker(url=proxy.url) for _ in range(3)]
    rules: list[Rule] = []
    until = time.monotonic() + 20
    while (
        sum(rig.stats().get(name, 0) for name in ("completed", "dead")) < 1_500 and time.monotonic() < until
    ):
        act = dice.random()
        if act < 0.6:
            script = dice.choice(("fetch", "settle", "settle", "takeover"))
            rules.append(fault(proxy, dice.choice(MODES), runs(SCRIPTS[script].sha), nth=dice.randint(1, 3)))
        elif act < 0.7:
            dice.choice(workers).say(layout.STOP_RESYNC)
        elif act < 0.75:
            proxy.reset_all()
        elif act < 0.8:
            rig.redis.script_flush()
        elif rules:
            dice.choice(rules).release()
        time.sleep(dice.random() * 0.03)
    proxy.clear()
    for rule in rules:
        rule.release()
    ran = dict.fromkeys(range(1_500), 1) | dict.fromkeys(range(200, 230), 2)
    check(rig, Expected(ran, {"completed": 1_430, "dead": 70}), *workers, ghosts=True)
    assert all(worker.code == 0 for worker in workers)


@pytest.mark.parametrize("seed", [1, *seldom(*range(2, 22))])
def test_a_storm_with_kills(rig_of: Callable[..., Rig], proxy: Proxy, seed: int) -> None:
    """The same, and kill -9 of a worker now and then: of each, at most the one job that ran runs again."""
    dice = random.Random(seed)
    rig = rig_of(crashes_max=100)
    tasks(rig)
    rig.frame("LONG", [{"n": n} for n in range(100)])
    rig.frame("FLAKY", [{"n": n} for n in range(100, 130)])
    rig.frame("VALUE", [{"n": n} for n in range(130, 600)])
    for n in range(600, 800):
        rig.submit("QUICK", {"n": n})
    rig.steward()
    workers = [rig.worker(url=proxy.url, ready=False) for _ in range(2)]
    rules: list[Rule] = []
    kills = 0
    until = time.monotonic() + 20
    while sum(rig.stats().get(name, 0) for name in ("completed", "dead")) < 800 and time.monotonic() < until:
        act = dice.random()
        if act < 0.5:
            script = dice.choice(("fetch", "settle", "settle", "takeover"))
            rules.append(fault(proxy, dice.choice(MODES), runs(SCRIPTS[script].sha), nth=dice.randint(1, 3)))
        elif act < 0.65 and kills < 5:
            victim = workers.pop(dice.randrange(len(workers)))
            victim.kill()
            victim.bury()
            kills += 1
            wait_until(lambda victim=victim: victim.view.get(layout.C_STATE) == layout.RECOVERED, 10)
            victim.view.set(layout.C_STATE, layout.FREE)
            workers.append(rig.worker(url=proxy.url, ready=False))
        elif rules:
            dice.choice(rules).release()
        time.sleep(dice.random() * 0.03)
    proxy.clear()
    for rule in rules:
        rule.release()
    wait_until(lambda: sum(rig.stats().get(name, 0) for name in ("completed", "dead")) >= 800, 20)
    ran = Counter(dict.fromkeys(range(800), 1) | dict.fromkeys(range(100, 130), 2))
    again = rig.journal.count("began") - ran
    assert sum(again.values()) <= kills, (again, kills)
    check(rig, Expected(ran + again, {"completed": 800}), *workers, ghosts=True)


@pytest.mark.parametrize("seed", seldom(*range(1, 11)))
def test_a_storm_of_frozen_workers(rig_of: Callable[..., Rig], proxy: Proxy, seed: int) -> None:
    """SIGSTOP beyond the lease: others get the jobs, and who wakes up changes nothing. What had begun, or was
    not settled yet, may run twice; each job still ends once."""
    dice = random.Random(seed)
    rig = rig_of(lease_ms=1_000)
    tasks(rig)
    rig.frame("LONG", [{"n": n} for n in range(400)])
    rig.frame("ASYNC", [{"n": n} for n in range(400, 500)])
    rig.frame("FLAKY", [{"n": n} for n in range(500, 530)])
    rig.frame("VALUE", [{"n": n} for n in range(530, 1_000)])
    rig.steward()
    workers = [rig.worker(url=proxy.url) for _ in range(3)]
    frozen: dict[int, float] = {}
    until = time.monotonic() + 25
    while (
        sum(rig.stats().get(name, 0) for name in ("completed", "dead")) < 1_000 and time.monotonic() < until
    ):
        for pid, since in list(frozen.items()):
            if time.monotonic() - since > 2.5:
                os.kill(pid, signal.SIGCONT)
                del frozen[pid]
        free = [worker for worker in workers if worker.pid not in frozen]
        if len(free) > 1 and dice.random() < 0.5:
            victim = dice.choice(free)
            os.kill(victim.pid, signal.SIGSTOP)
            frozen[victim.pid] = time.monotonic()
        if dice.random() < 0.3:
            fault(proxy, dice.choice(MODES), runs(SCRIPTS[dice.choice(("fetch", "settle"))].sha))
        time.sleep(dice.random() * 0.3)
    proxy.clear()
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: sum(rig.stats().get(name, 0) for name in ("completed", "dead")) >= 1_000, 20)
    check(rig, Expected(None, {"completed": 1_000}), *workers, ghosts=True)
    assert rig.journal.count("began").keys() == set(range(1_000))


# ------------------------------------------------------------------ behind a long job


def test_what_was_split_before_a_late_settle_is_not_run_again(rig: Rig, proxy: Proxy) -> None:
    """A worker gives back what stands behind a job that turns out long, and Redis hears of it only after the
    steward has taken the same back: the settle is refused, and what it had run is still its own to tell."""

    @rig.app.task("JOB")
    def job(n: int, ms: float) -> int:
        rig.journal("began", n)
        if ms < 0:
            wait_until(lambda: (rig.folder / "go").exists(), 20, "the long one may end")
        else:
            time.sleep(ms / 1000)
        return n

    rig.predictor = Told()
    first = rig.worker(url=proxy.url)
    rig.frame("JOB", [{"n": -1, "ms": 10}])  # from now on it keeps one at a time
    rig.wait_ended()
    late = proxy.delay(settles("k", "r"), 1.5)
    handles = rig.frame("JOB", [{"n": n, "ms": -1 if n == 0 else 1} for n in range(10)])
    assert late.fired.wait(10)
    wait_until(lambda: rig.journal.count("began")[0], 10, "the long one runs")
    second = rig.worker()
    rig.steward()
    wait_until(lambda: len(rig.journal.count("began")) == 11, 10, "the others run beside it")
    assert late.applied.wait(10)
    set_order(rig, {"normal": "fifo"})  # read before all else, and so the replies that have come
    (rig.folder / "go").touch()
    rig.wait_ended()
    assert [handle.result(timeout=5) for handle in handles] == list(range(10))
    assert first.drain() == second.drain() == 0
    assert rig.books().problems() == []
    assert rig.journal.count("began") == Counter(range(-1, 10)), "each once"
