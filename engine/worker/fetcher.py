"""Decides when a worker fetches and how much, and turns fetched frames into leases, giving back what it will
not run soon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from tqe import clock, formats
from tqe.board.board import SlotView
from tqe.codec import hot
from tqe.errors import FrameError
from tqe.settings import Settings
from tqe.store import working
from tqe.store.call import Call
from tqe.store.keys import Keys
from tqe.worker.admission import Admission, laid_out
from tqe.worker.hold import Hold
from tqe.worker.ordering import Ordering, Predictor
from tqe.worker.runner import JobRunner
from tqe.worker.settler import Settler
from tqe.worker.shares import Shares
from tqe.worker.suspects import Suspects

log = logging.getLogger("tqe.worker")

JOBS_FIRST: Final = 64  # budget of the first fetch
GROWTH: Final = 4
JOBS_MAX: Final = 16_384
WINDOW_JOBS: Final = 1_000  # unscored jobs of an ordered lane that are looked at together
# Three batches are in flight at a time: one that is being settled, one that runs, one that is being fetched.
FRAMES_MAX: Final = min(formats.FETCH_FRAMES_MAX, formats.IN_FLIGHT_FRAMES_MAX // 3)
TINY_JOBS: Final = 64  # so many jobs at hand take longer to run than the next call takes to build


class Fetcher:
    """One worker's fetcher. At most one fetch is unanswered."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        slot: hot.Slot,
        view: SlotView,
        hold: Hold,
        runner: JobRunner,
        settler: Settler,
        suspects: Suspects,
        predictor: Predictor | None = None,
        shares: Shares | None = None,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._slot = slot
        self._view = view
        self._hold = hold
        self._runner = runner
        self._settler = settler
        self._suspects = suspects
        self._lanes = [working.LaneRule(lane) for lane in settings.lanes]
        self._rank = {lane: rank for rank, lane in enumerate(settings.lanes)}
        self._shares = shares
        self._order: tuple[int, ...] = ()  # of ranks, in which `_calls` ask
        self._admission = Admission(
            runner.entries, quantum_ns=settings.quantum_us * 1000, slots=settings.concurrency
        )
        self.ordering = Ordering(
            predictor,
            view,
            runner.entries,
            self._admission,
            quantum_ns=settings.quantum_us * 1000,
            fields=runner.capture.fields,
        )
        runner.capture.ordering = self.ordering
        self._incarnation = ""
        self._calls: working.Fetcher | None = None
        self._bounds: Mapping[str, int] = {}  # that `_calls` have
        self._mismatches = 0
        self._jobs_budget = JOBS_FIRST
        self._asked = (0, 0)  # jobs and frames
        self._unanswered: asyncio.Future[Any] | None = None
        self.sent_at = 0  # ns
        self.empty = False  # the last fetch brought nothing: wait for a token
        self.flows = False  # it brought many jobs, and more of them wait
        self.trouble = False  # Redis holds other leases for us than we know of

    def begin(self, incarnation: str) -> None:
        """Speak for a new incarnation; an unanswered fetch of the old one is void."""
        self._incarnation = incarnation
        self._calls = None
        self._unanswered = None
        self._mismatches = 0
        self.empty = False
        self.flows = False
        self.trouble = False

    def wants(self) -> bool:
        """Whether to fetch now: less than a quantum is at hand, something could start, and Redis may have
        something."""
        hold = self._hold
        return (
            self._unanswered is None
            and not self.empty
            and hold.held_ns < self._settings.quantum_us * 1000
            and self._runner.free_slots > 0
            and not self._runner.resting
            and not self._suspects.hinder
            and len(hold) <= formats.IN_FLIGHT_FRAMES_MAX - FRAMES_MAX
            and hold.bytes < formats.IN_FLIGHT_BYTES_MAX // 2
            and self._slot.free_rows()[1] > 16
        )

    def call(self) -> Call:
        """The next fetch, with budgets from the measured time of jobs."""
        ordering = self.ordering
        ordering.look()
        calls = self._calls
        if calls is None or ordering.bounds is not self._bounds or self._order != self._order_now():
            calls = self.reorder()
        jobs = self._suspects.jobs_max(self._jobs_budget)
        # Of an ordered lane more is looked at than will be kept.
        frames = max(jobs, WINDOW_JOBS) if ordering.on else min(jobs, FRAMES_MAX)
        free_rows, _ = self._slot.free_rows()
        room = min(formats.FETCH_FRAMES_MAX, formats.IN_FLIGHT_FRAMES_MAX - len(self._hold), free_rows - 1)
        frames = max(1, min(frames, room))
        self._asked = (jobs, frames)
        return calls.call(
            jobs_max=jobs,
            bytes_max=formats.FETCH_BYTES_MAX,
            frames_max=frames,
            window_jobs=WINDOW_JOBS,
        )

    def _order_now(self) -> tuple[int, ...]:
        if self._shares is None:
            return tuple(range(len(self._rank)))
        return tuple(rank for rank in self._shares.order if rank < len(self._rank))

    def reorder(self) -> working.Fetcher:
        """From the next fetch on the lanes have the bounds of now."""
        if not self._incarnation:
            raise RuntimeError("begin() first")
        self._bounds = bounds = self.ordering.bounds
        self._order = self._order_now()
        names = [self._settings.lanes[rank] for rank in self._order]
        self._lanes = [working.LaneRule(name, bounds.get(name, 0)) for name in names]
        calls = working.Fetcher(self._keys, self._incarnation, self._lanes, self._settings.lease_ms)
        self._calls = calls
        return calls

    def sent(self, future: asyncio.Future[Any], at_ns: int) -> None:
        """The fetch is on its way."""
        self._unanswered = future
        self.sent_at = at_ns

    @property
    def answered(self) -> bool:
        return self._unanswered is not None and self._unanswered.done()

    @property
    def unanswered(self) -> asyncio.Future[Any] | None:
        return self._unanswered

    def finish(self) -> int:
        """Read the reply and take in what it brought. Returns when it was sent, or raises what the call
        raised."""
        future, self._unanswered = self._unanswered, None
        if future is None:
            raise RuntimeError("no fetch is under way")
        fetched = working.read_fetch(future.result())
        now_ns = clock.boottime_ns()
        self._runner.native.redis_offset_ms = fetched.now_us // 1000 - now_ns // 1_000_000
        self.empty = not fetched.frames
        self.flows = False
        self._view.add("fetches")
        self._view.add("fetch_us", max(0, now_ns - self.sent_at) // 1000)
        self._hold.expected += len(fetched.frames)
        self._audit(fetched.hlen)
        if self.ordering.on and self.ordering.concerns(fetched.frames):
            leases = self._take_in_order(fetched)
        else:
            leases = self.take_in(fetched.frames, cancels=fetched.cancels, now_us=fetched.now_us)
        if self._shares is not None:
            left = {self._order[at] for at in fetched.left}  # what went back whole is there too
            self._shares.fetched(self._order, left.union(lease.rank for lease in leases), self._hold.ranks())
        self._runner.capture.pick(leases, now_ns)
        return self.sent_at

    def _take_in_order(self, fetched: working.Fetched) -> list[hot.Lease]:
        """What an ordered lane brought: the shortest run here, the others go back with their scores."""
        hold = self._hold
        plan = self.ordering.arrange(
            fetched.frames,
            {self._lanes[at].name: key for at, key in fetched.left.items()},
            held_ns=hold.held_ns,
            idle=hold.idle,
            free_slots=self._runner.free_slots,
        )
        for name, frames in plan.returned:
            self._settler.give_back(name, frames)
        self.ordering.tally.taken(plan.kept, plan.predicted_ns, self.ordering.bounds, fetched.now_us)
        cancels = {fetched.frames[at]: indexes for at, indexes in fetched.cancels.items()}
        leases = self.take_in(
            plan.kept,
            cancels={at: cancels[frame] for at, frame in enumerate(plan.kept) if frame in cancels},
            now_us=fetched.now_us,
            predicted_ns=plan.predicted_ns,
        )
        if plan.carried:  # more of these were asked for than fit
            self._jobs_budget = max(1, len(plan.kept))
        return leases

    def take_in(
        self,
        frames: list[bytes],
        *,
        cancels: dict[int, set[int]] | None = None,
        now_us: int = 0,
        predicted_ns: dict[bytes, float] | None = None,
    ) -> list[hot.Lease]:
        """Make leases of frames that Redis says are ours; what will not run soon is marked to go back.

        Those of which the time was predicted are kept: that was decided by it.
        """
        suspects: list[hot.Lease] = []
        leases, jobs, odd = hot.admit(frames, self._slot, self._rank, len(self._rank), suspects)
        self._view.add("fetched", jobs)
        for frame, error in odd:
            self._refuse(frame, error)
        wanted = {frames[at]: indexes for at, indexes in (cancels or {}).items()}
        if suspects:
            self._suspects.take_in(suspects, wanted)
            self._waited(suspects, now_us)
        held_before_ns = self._hold.held_ns
        types = None if cancels or predicted_ns else hot.types_of(leases)
        if types is not None and len(types) > 1:
            leases = self._sync_first(leases, types)
        per_job_ns = None if types is None else self._admission.quick(types, jobs, self._hold.held_ns)
        if per_job_ns is not None:
            self._hold.add_all(leases, per_job_ns)
            self._waited(leases, now_us)
            self._plan(jobs, jobs, self._hold.held_ns - held_before_ns)
            return leases
        for lease in leases:
            lease.cancels = wanted.get(lease.frame)
            ns = predicted_ns.get(lease.frame) if predicted_ns else None
            if ns is None:
                self._keep(lease)
            else:
                lease.predicted_ns = ns
            self._hold.add(lease)
        self._waited(leases, now_us)
        kept = sum(lease.stop - lease.next for lease in leases)
        self._plan(jobs, kept, self._hold.held_ns - held_before_ns)
        return leases

    def _sync_first(self, leases: list[hot.Lease], types: set[bytes]) -> list[hot.Lease]:
        """A worker without coroutines begins with its synchronous jobs: once it has coroutines, those would
        have to go back, or to the helper thread."""
        entries = self._runner.entries
        apart = {key for key in types if key in entries and entries[key].is_async}
        if self._runner.active or not apart or apart == types:
            return leases
        return sorted(leases, key=lambda lease: lease.next_type() in apart)

    def _plan(self, jobs: int, kept: int, predicted_ns: float) -> None:
        """How many jobs to ask for next time.

        What this fetch brought is the best guess of what waits behind it. A worker that asked for thousands
        because some type is short, and then met long ones, would carry each of them back and forth. So after
        a give-back it asks for what it kept, and grows from there, but not beyond a quantum of such jobs.
        """
        if not jobs:
            return
        self.flows = jobs == kept >= TINY_JOBS and 2 * jobs >= min(self._asked)
        budget = kept if kept < jobs else max(self._jobs_budget, jobs) * GROWTH
        if predicted_ns > 0:
            budget = min(budget, int(self._settings.quantum_us * 1000 / predicted_ns * kept))
        self._jobs_budget = max(1, min(budget, JOBS_MAX))

    def _refuse(self, frame: bytes, error: FrameError | None) -> None:
        if error is None:
            self._settler.give_back(frame[4:45], [frame])
        else:
            log.error("a frame in Redis is damaged (%s): it goes to quarantine, %d bytes", error, len(frame))
            self._settler.quarantine(frame[4:45], frame)

    def _waited(self, leases: list[hot.Lease], now_us: int) -> None:
        """Account how long these waited in their lane."""
        if now_us:
            hot.waited(leases, self._runner.entries, now_us)

    def _keep(self, lease: hot.Lease) -> None:
        hold = self._hold
        ahead = lease.types_ahead()
        kept = self._admission.keep(
            ahead, held_ns=hold.held_ns, free_slots=self._runner.free_slots, must=hold.idle
        )
        lease.predicted_ns = kept.predicted_ns
        if kept.jobs == lease.n:
            return
        base = lease.base + kept.jobs
        lease.give_back(base)
        lease.pieces = laid_out(base, kept.pieces)
        hold.cut.append(lease)
        self._view.add("returned", lease.n - kept.jobs)

    def _audit(self, hlen: int) -> None:
        """Compare what Redis holds for us with what we know: on one ordered connection the number is known at
        each reply.

        A late command of a dead connection, or a failover that undid a settle, leaves a lease in our hash
        that nobody would ever run: it is ours, and we are alive, so no lease ends. Twice in a row is no
        accident: the worker takes itself over.
        """
        if hlen == self._hold.expected:
            self._mismatches = 0
            return
        self._mismatches += 1
        if self._mismatches >= 2:
            log.warning(
                "Redis holds %d leases for this worker, not %d: taking over", hlen, self._hold.expected
            )
            self.trouble = True
