"""The order of a worker's life: register, fetch, run, settle, and, at the end, give back and leave."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import uvloop

from tqe import clock
from tqe.board import layout
from tqe.board.board import Board, SlotView
from tqe.codec import hot
from tqe.registry import Registry
from tqe.settings import Settings
from tqe.store import working
from tqe.store.keys import Keys
from tqe.worker.fetcher import Fetcher
from tqe.worker.fields import Marks
from tqe.worker.hold import Hold
from tqe.worker.link import LOST, Link, Stopped
from tqe.worker.ordering import Predictor
from tqe.worker.peers import Peers
from tqe.worker.reporting import Hook
from tqe.worker.runner import JobRunner, Tracing
from tqe.worker.settler import PARTIAL_AFTER_NS, Settler
from tqe.worker.shares import Shares
from tqe.worker.suspects import Suspects

log = logging.getLogger("tqe.worker")

TICK_S: Final = 0.1  # how often an idle worker looks at its board
RSS_EVERY_NS: Final = 1_000_000_000
EXIT_OK: Final = 0


def run_worker(
    registry: Registry,
    settings: Settings,
    board: Board,
    view: SlotView,
    redis_url: str,
    *,
    install_limit_signal: Callable[[Callable[[], None]], None],
    on_start: Callable[[], Any] | None = None,
    on_stop: Callable[[], Any] | None = None,
    predictor: Predictor | None = None,
    on_error: Sequence[Hook] = (),
    tracing: Tracing | None = None,
) -> int:
    """Be a worker until the board says stop. Returns the exit code.

    `install_limit_signal(handler)` makes the supervisor's signal call `handler` on the main thread; handlers
    belong to the supervisor's code. `on_start`, `on_stop` and `on_error` are the app's hooks. `predictor`
    says how long jobs will take; without one every lane is FIFO.
    """
    registry.freeze()
    gc.enable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return _drive(
            runner.get_loop(),
            _main(
                lambda: Worker(registry, settings, board, view, redis_url, predictor, on_error, tracing),
                install_limit_signal,
                on_start,
                on_stop,
            ),
        )


def _drive(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, int]) -> int:
    """Run `main` to its end, whatever the tasks of jobs do to the loop.

    SystemExit and KeyboardInterrupt leave the loop from any task, and any task may stop it. The job that
    began such a task meets the exception where it awaits it; its neighbours must not end with it.
    """
    task = loop.create_task(main)
    while True:
        try:
            return loop.run_until_complete(task)
        except (SystemExit, KeyboardInterrupt, RuntimeError) as e:
            if task.done() or loop.is_closed():
                raise
            log.warning("a task of a job ended the event loop (%s); it goes on", type(e).__name__)


async def _main(
    make: Callable[[], Worker],
    install_limit_signal: Callable[[Callable[[], None]], None],
    on_start: Callable[[], Any] | None,
    on_stop: Callable[[], Any] | None,
) -> int:
    worker = make()
    install_limit_signal(worker.runner.interrupt)
    if on_start is not None:
        on_start()
    try:
        await worker.run()
    finally:
        worker.runner.close()
        if on_stop is not None:
            on_stop()
    return EXIT_OK


class Worker:
    """One worker: composes link, fetcher, runner and settler, and decides what is next."""

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        board: Board,
        view: SlotView,
        redis_url: str,
        predictor: Predictor | None = None,
        on_error: Sequence[Hook] = (),
        tracing: Tracing | None = None,
    ) -> None:
        keys = Keys(settings.namespace)
        self._settings = settings
        self._board = board
        self._view = view
        self._hold = Hold(len(settings.lanes) + 1)
        self._slot = hot.Slot(board.memory, layout.slot_offset(view.number))
        self._changed = asyncio.Event()
        peers = Peers(board, view)
        # Jobs of lanes that are not served here (taken over from other settings) get what a weight of 1 gets.
        shares = Shares((*settings.lane_weights, 1)) if settings.lane_weights else None
        self.runner = JobRunner(
            registry,
            settings,
            self._slot,
            view,
            self._hold,
            changed=self._changed.set,
            on_error=on_error,
            tracing=tracing,
            peers=peers,
            shares=shares,
            marks=Marks(board, view),
        )
        self._settler = Settler(settings, keys, self._slot, view, self._hold)
        self._suspects = Suspects(view, peers, self._hold, self.runner, self._settler)
        self._fetcher = Fetcher(
            settings,
            keys,
            self._slot,
            view,
            self._hold,
            self.runner,
            self._settler,
            self._suspects,
            predictor,
            shares,
        )
        self._link = Link(settings, keys, view, redis_url)
        self._token: asyncio.Future[Any] | None = None
        self._quantum_ns = settings.quantum_us * 1000
        self._slice_ns = settings.quantum_us * 500
        self._draining = False
        self._rss_at_ns = 0
        self._told_ns = 0
        self._were_beside = False
        self._predicts = predictor is not None
        self._model_seen = -1  # number of the last change of `p model` that was read

    async def run(self) -> None:
        """Register, work, drain, leave."""
        ticker = asyncio.get_running_loop().create_task(self._tick())
        ticker.add_done_callback(self._wake)
        try:
            await self._take_over()
            await self._learn_means()
            self._view.set(layout.C_READY, 1)
            while not self._finished():
                await self._turn()
                if ticker.done():
                    ticker.result()  # without it nobody looks at the board or at overdue replies
            self._link.add_traces(self.runner.capture.take(0, force=True))
            await self._link.leave()
        except Stopped:
            log.warning(
                "stopped while Redis could not be reached; what was leased comes back when the lease ends"
            )
        finally:
            ticker.cancel()
            self._link.close()

    # -- one turn

    async def _turn(self) -> None:
        self._view.set(layout.C_BEAT, clock.boottime_ns())
        # Before anything is looked at: whatever changes from here on ends the wait at the end of the turn.
        self._changed.clear()
        self._take_token()
        if self._fetcher.trouble:
            # Before a reply is read: a settle may be refused since the steward has split its lease, and what
            # is left of that is ours. Forgotten here, it would come as news, and run again.
            await self._take_over()
        if self._predicts and self._board.get(layout.H_MODEL) != self._model_seen:
            await self._learn_order()
        try:
            self._read()
            await self._give_back()
        except LOST as e:
            await self._lost(e)
            return
        # After the replies: what they refuse is no longer ours, and nothing of it may start.
        if self._settler.trouble or self._fetcher.trouble:
            await self._take_over()
        self._suspects.look()
        self.runner.charge_beside()
        if self._fetcher.flows and not self._draining:
            try:
                await self._fetch_ahead()
            except LOST as e:
                await self._lost(e)
                return
        code = self._run()
        if code == hot.RUN_STOP or self._view.get(layout.C_TAKEN):
            self._obey()
            if self._fetcher.trouble:
                return  # to take over before anything is told: what is held may be others' by now
        elif code == hot.RUN_LEASE_END:
            self.runner.native.until_ns = self._link.seen_until_ns()
            if clock.boottime_ns() >= self.runner.native.until_ns:
                await self._lost(None)
                return
        try:
            await self._exchange(force=code == hot.RUN_FULL or self.runner.full)
        except LOST as e:
            await self._lost(e)
            return
        if self._hold.idle or code in (hot.RUN_ENDED, hot.RUN_BLOCKED):
            await self._wait()
        else:
            await asyncio.sleep(0)

    def _read(self) -> None:
        """Read the replies that are there, in the order in which they were asked for: each audit counts on
        those before it."""
        settle = self._settler.unanswered
        if (
            settle is not None
            and settle.done
            and (not self._fetcher.answered or settle.sent_at <= self._fetcher.sent_at)
        ):
            self._settler.finish()
        if self._fetcher.answered:
            self._link.extended(self._fetcher.finish())
            self.runner.native.until_ns = self._link.seen_until_ns()
        settle = self._settler.unanswered
        if settle is not None and settle.done:
            self._settler.finish()

    async def _give_back(self) -> None:
        """What goes back is for others: it must not wait for a long job here."""
        settler = self._settler
        if (
            settler.urgent
            and not (settler.trouble or self._fetcher.trouble)
            and (settler.returning or self._hold.held_ns >= self._quantum_ns)
        ):
            await self._exchange(force=False)
            await asyncio.sleep(0)  # only the loop writes to the socket

    async def _fetch_ahead(self) -> None:
        """Where many tiny jobs wait, ask for the next ones before these run: Redis is busy with them
        meanwhile, and neither waits for the other."""
        if self._fetcher.wants():
            await self._exchange(force=False, wait=False)
            await asyncio.sleep(0)  # only the loop writes to the socket

    def _run(self) -> int:
        if self._view.get(layout.C_STOP):
            self._obey()
            if self._fetcher.trouble:
                return int(hot.RUN_STOP)
        self.runner.cancel_marked()
        if self._hold.idle:
            self._view.set(layout.C_PHASE, layout.PHASE_BUSY if self.runner.active else layout.PHASE_IDLE)
            return hot.RUN_ENDED
        self._view.set(layout.C_PHASE, layout.PHASE_BUSY)
        begun = clock.boottime_ns()
        code = self.runner.run_slice(self._slice_ns)
        spent = clock.boottime_ns() - begun
        self._view.add("busy_ns", spent)
        self._view.put("completed", self.runner.jobs_ended - self._view.counters()["failed"])
        self._hold.spent(self._hold.spot(), spent)
        return code

    async def _exchange(self, *, force: bool, wait: bool = True) -> None:
        """Send what there is to tell, and a fetch with it, in one write. Without `wait`, nothing is told
        before the last settle was answered."""
        fetch = not self._draining and self._fetcher.wants()
        now_ns = clock.boottime_ns()
        tell = (wait or self._settler.unanswered is None) and self._to_tell(now_ns, fetch=fetch, force=force)
        if not fetch and not tell:
            return
        calls = []
        if tell:
            if self._settler.unanswered is not None:
                # One settle at a time: its outcomes occupy the other half. Its reply is nearly always here by
                # now.
                await self._answer()
            due = self._settler.due(now_ns, partial=force or self._draining, beside=self._beside_lately())
            calls = self._settler.begin(due, self._link.incarnation)
            if calls:
                self.runner.full = False
                self.runner.release_outcomes()
        settles = len(calls)
        if fetch:
            calls.append(self._fetcher.call())
        if not calls:
            return
        futures = self._link.send(calls)
        for future in futures:
            future.add_done_callback(self._wake)
        if settles:
            self._settler.sent(futures[:settles], now_ns)
        if fetch:
            self._fetcher.sent(futures[-1], now_ns)

    def _to_tell(self, now_ns: int, *, fetch: bool, force: bool) -> bool:
        """Whether to settle now: with each fetch, when nothing is left to run, when others wait for it, or
        after 50 ms."""
        hold = self._hold
        if self._settler.urgent or force or self._draining:
            return True
        # Idle for a moment only, where more is on its way: then the settle goes out with the next fetch.
        idle = hold.idle and not (self._fetcher.flows and self._fetcher.unanswered is not None)
        if hold.ended and (fetch or idle or now_ns - self._told_ns > PARTIAL_AFTER_NS):
            self._told_ns = now_ns
            return True
        return bool(self.runner.active) and now_ns - self._told_ns > PARTIAL_AFTER_NS

    def _beside_lately(self) -> bool:
        """Whether a held lease may have jobs that ran beside others."""
        self._were_beside, before = bool(self.runner.active), self._were_beside
        return before or self._were_beside

    async def _answer(self) -> None:
        pending = self._settler.unanswered
        while pending is not None and not pending.done:
            self._changed.clear()
            await self._changed.wait()
            self._view.set(layout.C_BEAT, clock.boottime_ns())
        self._changed.set()  # what else has changed meanwhile was not looked at in this turn
        self._read()

    async def _wait(self) -> None:
        """Nothing can run now: wait for a reply, a token, the end of a coroutine, or the next look at the
        board."""
        if self._fetcher.empty and not self._draining:
            await self._await_token()
        await self._changed.wait()

    def _take_token(self) -> None:
        """A token, or a second without one: look again. A failure too: the next fetch tells what is wrong."""
        if self._token is not None and self._token.done():
            token, self._token = self._token, None
            token.cancelled() or token.exception()
            self._fetcher.empty = False
            self._view.add("wakes")

    async def _await_token(self) -> None:
        if self._token is not None:
            return  # if it has come meanwhile, then it has ended the wait
        try:
            self._token = await self._link.token()
        except LOST:
            self._fetcher.empty = False
            await asyncio.sleep(TICK_S)
            return
        self._token.add_done_callback(self._wake)

    def _wake(self, _: asyncio.Future[Any]) -> None:
        self._changed.set()

    async def _tick(self) -> None:
        """Ten times a second: overdue replies, the board, loop lag."""
        loop = asyncio.get_running_loop()
        while True:
            expected = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            lag_us = int(max(0.0, loop.time() - expected) * 1e6)
            self._view.set(layout.C_COUNTERS + layout.WORD * layout.COUNTERS.index("loop_lag_us"), lag_us)
            self._link.check()
            self._link.add_traces(self.runner.capture.take(clock.boottime_ns()))
            self._recycle()
            self._changed.set()

    # -- being told to stop

    def _obey(self) -> None:
        if self._view.get(layout.C_TAKEN):
            self._view.set(layout.C_TAKEN, 0)
            self._fetcher.trouble = True
        word = self._view.get(layout.C_STOP)
        if word == layout.STOP_RESYNC:
            self._view.set(layout.C_STOP, layout.STOP_NONE)
            self._fetcher.trouble = True
            return
        if word in (layout.STOP_DRAIN, layout.STOP_NOW):
            self._draining = True
            self._view.set(layout.C_PHASE, layout.PHASE_DRAIN)
            self._hold.give_back_all()  # each time: a fetch that was under way may have brought more
            self._suspects.give_back()
            if word == layout.STOP_NOW:
                self.runner.beside.return_all()

    def _finished(self) -> bool:
        return (
            self._draining
            and not len(self._hold)
            and not self._settler.urgent
            and self._fetcher.unanswered is None
        )

    def _recycle(self) -> None:
        settings = self._settings
        if self._view.get(layout.C_RECYCLE):
            return
        if settings.recycle_jobs and self.runner.jobs_ended >= settings.recycle_jobs:
            self._view.set(layout.C_RECYCLE, layout.RECYCLE_JOBS)
        elif settings.recycle_rss_mb and clock.boottime_ns() > self._rss_at_ns:
            self._rss_at_ns = clock.boottime_ns() + RSS_EVERY_NS
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
            if pages * 4096 >= settings.recycle_rss_mb * 1024 * 1024:
                self._view.set(layout.C_RECYCLE, layout.RECYCLE_MEMORY)

    # -- becoming a new incarnation

    async def _lost(self, error: Exception | None) -> None:
        log.warning(
            "taking over: %s", error if error is not None else "the lease ended before it was renewed"
        )
        await self._take_over()

    async def _take_over(self) -> None:
        """Begin a new incarnation, and make what we hold equal to what Redis holds for it.

        Whatever we sent and have no answer to is decided now: a lease that is still in the hash was not
        settled, one that is gone was, or belongs to somebody else. What has ended is settled again under its
        exact lease name, so that the latter is refused there and counted.
        """
        self._view.set(layout.C_PHASE, layout.PHASE_RESYNC)
        self.runner.hold_outcomes()
        while True:
            self._settler.forget()
            self._suspects.forget()
            taken = await self._link.take_over()
            self._token = None
            self._fetcher.begin(self._link.incarnation)
            self._settler.trouble = False
            self._hold.expected = len(taken.leases)
            self.runner.native.until_ns = self._link.seen_until_ns()
            self.runner.native.redis_offset_ms = taken.now_us // 1000 - clock.boottime_ns() // 1_000_000
            unknown = self._reconcile(taken)
            due = [lease for lease in self._hold if lease.to_settle()]
            try:
                calls = self._settler.begin(due, self._link.incarnation, switch=False)
                if calls:
                    futures = self._link.send(calls)
                    for future in futures:
                        future.add_done_callback(self._wake)
                    self._settler.sent(futures, clock.boottime_ns())
                    await self._answer()
            except LOST as e:
                log.warning("taking over again: %s", e)
                continue
            break
        for lease in list(self._hold):
            if lease.lost:
                self._settler.drop(lease)
        self._settler.trouble = False
        self._slot.reset_halves()
        self.runner.full = False
        self.runner.release_outcomes()
        # Coroutines may have ended meanwhile.
        self._hold.ended[:] = [lease for lease in self._hold if lease.ended()]
        frames = [frame for _, frame in unknown]
        self._fetcher.take_in(frames, cancels=await self._link.cancels(frames))

    def _reconcile(self, taken: working.Taken) -> list[tuple[bytes, bytes]]:
        """Match the leases of the hash with ours by containment; returns those that we never knew."""
        held: dict[int, list[tuple[int, int]]] = {}
        unknown = []
        for name, frame in taken.leases:
            lease = self._owner(name)
            if lease is None:
                unknown.append((name, frame))
            else:
                held.setdefault(lease.row, []).append((int(name[27:30]), int(name[31:35])))
        for lease in list(self._hold):
            claims = held.get(lease.row)
            if claims is not None:
                lease.claims = claims
                if lease.next < lease.stop and not _covers(claims, lease.next, lease.stop):
                    # Somebody took a part of what is ahead: what is left of it goes back too.
                    lease.give_back(lease.next)
                    self._hold.unready(lease)
            elif lease.running or self._has_ended(lease):
                # Gone from our hash: settling it under its name is refused there, and counted as fenced.
                self._hold.unready(lease)
                lease.lost = True
                lease.skip_rest()
            else:
                self._settler.drop(lease)
        return unknown

    def _has_ended(self, lease: hot.Lease) -> bool:
        """Whether something of a lease has ended here: what was only to go back needs no telling."""
        ended = (layout.JOB_DONE, layout.JOB_RECORDED)
        return lease.to_settle() and any(state in ended for state in self._view.row(lease.row).states)

    def _owner(self, name: bytes) -> hot.Lease | None:
        base, n, run = int(name[27:30]), int(name[31:35]), int(name[36:41])
        best = None
        for lease in self._hold:
            if lease.frame_id != name[:26] or lease.run != run:
                continue
            # By what it claims, not by what was fetched: a part that it gave back may be ours again, as
            # another lease.
            if _covers(lease.claims, base, base + n) and (best is None or lease.n < best.n):
                best = lease
        return best

    async def _learn_order(self) -> None:
        """Read how the lanes are ordered, and load the version in use if it is another one."""
        number = self._board.get(layout.H_MODEL)
        order = await self._link.order()
        if order is not None:  # else again at the next turn
            self._model_seen = number
            self._fetcher.ordering.follow(
                order
            )  # from the next fetch on: one under way is read as it was asked

    async def _learn_means(self) -> None:
        for name, mean_us in (await self._link.means()).items():
            entry = self.runner.entries.get(name.encode())
            if entry is not None and mean_us > 0 and entry.mean_ns < 0:
                entry.mean_ns = mean_us * 1000
                entry.seen = 1_000  # known from others: no need to begin with one job


def _covers(claims: list[tuple[int, int]], start: int, stop: int) -> bool:
    return any(base <= start and stop <= base + n for base, n in claims)
