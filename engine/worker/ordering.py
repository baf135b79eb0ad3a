"""Decides which of the fetched jobs run now and which go back with a boost, so that shorter ones go first."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final, NamedTuple, Protocol

from tqe import clock, codec
from tqe.board import layout
from tqe.board.board import SlotView
from tqe.codec import payload
from tqe.errors import TQEError
from tqe.store.model import NO_ORDER, Mode, Order
from tqe.worker.admission import Admission, Measured, even_pieces
from tqe.worker.fields import PAYLOAD_BYTES_MAX, Fields, Value
from tqe.worker.tally import Tally

log = logging.getLogger("tqe.worker")

BATCH_MAX: Final = 256  # jobs that the predictor is asked for at once
# A settle writes each returned job into a sorted set, 6 µs of Redis a job: larger frames are cut first.
CUT_JOBS: Final = 128
# Ordering costs some 20 µs a job, here and in Redis: shorter jobs run sooner than they are ordered.
TINY_NS: Final = 200_000
SPREAD_MIN: Final = 0.5  # coefficient of variation below which the order does not matter
JUDGED_JOBS: Final = 32  # predictions that a judgement of a lane needs
MEMORY_JOBS: Final = 1_000.0
# A lane that is not worth it is FIFO for so long, then looked at again.
LOOK_FIRST_NS: Final = 250_000_000
LOOK_MAX_NS: Final = 2_000_000_000
# The breaker. A predictor has its own; this one holds whatever predictor it is.
BATCH_NS_MAX: Final = 50_000_000
BAD_BATCHES_MAX: Final = 3
BREAK_NS: Final = 60_000_000_000
_lane_of: Final = itemgetter(slice(79, 95))  # of a frame, padded with spaces
_jobs_of: Final = itemgetter(slice(35, 39))  # of a frame, four digits
_NOT_PLAIN: Final = codec.SCORED | codec.OPTIONS
_RANKS: Final = {"fifo": 0, "mean": 1}  # of rungs; the model, or what the version chose, is the highest
REASONS: Final = ("columns", "library", "value", "slow", "error", "load")


class Waiting(NamedTuple):
    """A job that waits, as a predictor sees it. Its payload is JSON, decompressed."""

    type: str
    lane: str
    payload: bytes
    attempt: int  # 0 for the first
    enqueued_us: int  # entry into the lane, Redis' clock
    # What may be known of the payload; None where the task's own function failed: no score then.
    fields: Mapping[str, Value] | None = None
    unread_bytes: int = 0  # of a payload that is too long to be read for this; `payload` is empty then

    @property
    def payload_bytes(self) -> int:
        return len(self.payload) or self.unread_bytes


# A job whose payload nobody has looked at yet: its frame's header, and what `codec.walk` gives.
_Unread = tuple[codec.Header, tuple[int, bytes, bytes, bytes, bool]]


class NotHere(TQEError):
    """This host does not have that version yet; its steward says when it has."""


class Predictor(Protocol):
    """What the engine asks of `tqe.ml`; the composition root hands it in, opened before the fork.

    It may raise anything: no job is lost by it, none is scored.
    """

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """How often it fell back so far, by reason: columns, library, value, slow."""

    def load(self, version: str) -> None:
        """Take this version from the local folder, where the steward has written it and a canary has survived
        it; '' means no model. Raises when it cannot, NotHere when the steward is still at it; what was loaded
        before stays then."""

    def use(self, rung: str) -> None:
        """From now on the model predicts (`model`), the hierarchical mean (`mean`), or nothing (`fifo`)."""

    def score(self, jobs: Sequence[Waiting]) -> Sequence[float | None]:
        """Predicted mean duration of each job (at most 256) in seconds, None where nothing is known."""

    def rungs(self, job: Waiting) -> tuple[float | None, float | None]:
        """What the model and what the hierarchical mean say of one job, whichever is in use."""

    def completed(self, job: Waiting, run_s: float) -> None:
        """A job ran for so long: the history learns of it."""

    def boost_us(self, mode: Mode, predicted_s: float | None, *, scale_s: float, bound_s: float) -> int:
        """By how many µs a job of this predicted duration is preferred: 0 to T. `scale_s` is m, `bound_s`
        T."""


class Plan(NamedTuple):
    """What becomes of fetched frames. `kept` in the order in which they run; `predicted_ns` has those whose
    time was predicted. `returned`: name of a lease → the frames that it becomes. `carried`: frames of one
    that had been scored before and go back all the same."""

    kept: list[bytes]
    predicted_ns: dict[bytes, float]
    returned: list[tuple[bytes, list[bytes]]]
    carried: list[bytes]


class _Job(NamedTuple):
    """A frame of one, or one job of a larger frame, with its score. Sorted as it is: equal scores stay in the
    order of entry, then of the fetch, then of the frame."""

    score_us: int
    enqueued_us: int
    frame_at: int
    job_at: int
    boost_us: int
    predicted_s: float | None
    type: bytes


@dataclass(slots=True)
class _Lane:
    """What this worker knows of a lane: is it worth the trouble?"""

    mode: Mode = "fifo"
    bound_us: int = 0
    jobs: float = 0.0  # behind the moments, at most MEMORY_JOBS
    mean_s: float = 0.0
    square_s: float = 0.0
    look_at_ns: int = 0  # until then FIFO
    pause_ns: int = LOOK_FIRST_NS
    was_alike: bool = False  # when it was looked at last: then a few unlike jobs have to show that it changed

    def saw(self, predictions: Sequence[float | None]) -> None:
        for seconds in predictions:
            if seconds is not None:
                self.jobs = min(self.jobs + 1.0, MEMORY_JOBS)
                self.mean_s += (seconds - self.mean_s) / self.jobs
                self.square_s += (seconds * seconds - self.square_s) / self.jobs

    @property
    def alike(self) -> bool:
        if self.jobs < JUDGED_JOBS and not self.was_alike:
            return False
        variance = self.square_s - self.mean_s**2
        return variance < (SPREAD_MIN * self.mean_s) ** 2

    def leave(self, now_ns: int) -> None:
        """Not worth it now: forget, look again later."""
        self.look_at_ns = now_ns + self.pause_ns
        self.pause_ns = min(2 * self.pause_ns, LOOK_MAX_NS)
        self.was_alike = True
        self.jobs = self.mean_s = self.square_s = 0.0


@dataclass
class Ordering:
    """One worker's ordering. Never raises; without a predictor, or when it fails, every lane is FIFO."""

    predictor: Predictor | None
    view: SlotView
    tasks: Mapping[bytes, Measured]
    admission: Admission
    quantum_ns: int
    time: clock.Clock = clock.SYSTEM
    fields: Mapping[bytes, Fields] = field(default_factory=dict)  # type → how its payloads are read
    # Lane → T in µs, for `fetch`; 0 is FIFO. Another mapping whenever it changes.
    bounds: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._order = NO_ORDER
        self._ordered: frozenset[bytes] = frozenset()  # as it stands in a header
        self._loaded = ""
        self._lanes: dict[str, _Lane] = {}
        self._again_ns = 0  # when a lane that was left is looked at again; 0: never
        self._closed_until_ns = 0
        self._bad_batches = 0
        self._own: Counter[str] = Counter()  # fallbacks that the predictor does not know of
        self.tally = Tally(self.view)

    # -- what the steward says

    def follow(self, order: Order) -> None:
        """Modes, T, m or the version have changed."""
        predictor = self.predictor
        if predictor is not None:
            if order.version != self._loaded and not self._load(predictor, order) and self._loaded:
                # The version before orders on: by its own T and m, and it is to blame for a death. It rises
                # no higher than it stood.
                before = self._order
                rung = min(before.rung, order.rung, key=lambda rung: _RANKS.get(rung, 2))
                order = before._replace(modes=order.modes, rung=rung)
            if order.rung:
                self._use(predictor, order.rung)
        self._order = order
        self._lanes = {lane: _Lane(mode, order.bound_of(lane)) for lane, mode in order.modes.items()}
        self._set_bounds()

    def _load(self, predictor: Predictor, order: Order) -> bool:
        loaded = False
        self._say_scoring(order.sha256)
        try:
            predictor.load(order.version)
        except NotHere:
            pass
        except Exception as e:  # whatever a predictor raises, jobs go on
            self._own["load"] += 1
            log.warning("model %s cannot be used (%s: %s)", order.version, type(e).__name__, e)
        else:
            self._loaded, loaded = order.version, True
            self._closed_until_ns = self._bad_batches = 0
        self._scored(0)
        return loaded

    def _use(self, predictor: Predictor, rung: str) -> None:
        try:
            predictor.use(rung)
        except Exception as e:  # whatever a predictor raises, jobs go on
            self._bad("error", f"{type(e).__name__}: {e}")

    def look(self) -> None:
        """A lane that was left FIFO is looked at again, when it is time."""
        if self._again_ns and self.time.boottime_ns() >= self._again_ns:
            self._set_bounds()

    def _set_bounds(self) -> None:
        now_ns = self.time.boottime_ns()
        usable = (
            self.predictor is not None
            and bool(self._loaded)
            and self._order.rung != "fifo"
            and now_ns >= self._closed_until_ns
        )
        bounds, later = {}, []
        for name, lane in self._lanes.items():
            waits = lane.bound_us > 0 and now_ns < lane.look_at_ns
            bounds[name] = lane.bound_us if usable and not waits else 0
            if waits:
                later.append(lane.look_at_ns)
        if self._closed_until_ns > now_ns:
            later.append(self._closed_until_ns)
        self._again_ns = min(later, default=0)
        if bounds != self.bounds:
            self.bounds = bounds
            self._ordered = frozenset(lane.encode().ljust(16) for lane, bound in bounds.items() if bound > 0)

    @property
    def on(self) -> bool:
        """Whether some lane is ordered now."""
        return bool(self._ordered)

    def concerns(self, frames: Sequence[bytes]) -> bool:
        """Whether some of these come from an ordered lane. Asked for each fetch while any lane is ordered: a
        lane of no-op jobs beside it must stay as fast as it is."""
        return not self._ordered.isdisjoint(map(_lane_of, frames))

    # -- what was fetched

    def arrange(
        self, frames: list[bytes], left: Mapping[str, int], *, held_ns: float, idle: bool, free_slots: int
    ) -> Plan:
        """Of fetched frames those that run now, and those that go back with scores.

        `left` is the lowest key that each lane still has in Redis; a lane that is not in it is empty. `idle`:
        the worker holds nothing, so one job is kept, however long it takes.
        """
        plan = Plan([], {}, [], [])
        by_lane: dict[bytes, list[bytes]] = {}
        for frame in frames:
            lane = _lane_of(frame)
            if lane in self._ordered:
                by_lane.setdefault(lane, []).append(frame)
            else:
                plan.kept.append(frame)
        for lane, own in by_lane.items():
            name = lane.rstrip().decode("ascii")
            if self._short_at_a_glance(own):
                self._lanes[name].leave(self.time.boottime_ns())
                self._set_bounds()
                plan.kept.extend(own)
                continue
            window = _Window(self, name, own, left.get(name))
            if not window.fill() or not self._worth_it(window):
                plan.kept.extend(own)
                continue
            held_ns, kept = window.decide(plan, held_ns, idle, free_slots)
            idle = idle and not kept
        return plan

    def _worth_it(self, window: _Window) -> bool:
        """Score what is not scored yet; False if the frames had better run as they came."""
        lane = self._lanes[window.lane]
        if window.unscored and self._tiny(Counter(kind for _, (_, kind, *_) in window.unscored)):
            lane.leave(self.time.boottime_ns())
        else:
            if not self._score(window, lane):
                return False
            if not lane.alike:
                lane.pause_ns, lane.was_alike = LOOK_FIRST_NS, False
                return True
            lane.leave(self.time.boottime_ns())
        self._set_bounds()
        return False

    def _short_at_a_glance(self, frames: Sequence[bytes]) -> bool:
        """Whether these are unscored frames of one, of types too short to be ordered. The same judgement as
        that of a window, at a tenth of its price: a lane of no-op jobs pays for a look every 2 s. What it
        cannot read at a glance it leaves to the window."""
        if len(frames) < 2:
            return False
        types: Counter[bytes] = Counter()
        for frame in frames:
            if len(frame) <= codec.HEADER_BYTES or _jobs_of(frame) != b"0001" or frame[2] & _NOT_PLAIN:
                return False
            size = frame[codec.HEADER_BYTES]
            types[frame[codec.HEADER_BYTES + 1 : codec.HEADER_BYTES + 1 + size]] += 1
        return self._tiny(types)

    def _tiny(self, jobs: Mapping[bytes, int]) -> bool:
        """Whether so many jobs of these types take so little time that ordering costs more than it gains."""
        total = 0.0
        for kind, number in jobs.items():
            task = self.tasks.get(kind)
            if task is None or task.mean_ns < 0:
                return False
            total += task.mean_ns * number
        return total < TINY_NS * sum(jobs.values())

    def _score(self, window: _Window, lane: _Lane) -> bool:
        jobs = window.unscored
        if window.too_large:
            # A sample, where it takes one: it goes back in pieces, which are scored when they come.
            jobs = jobs[:BATCH_MAX] if lane.jobs < JUDGED_JOBS else []
        predictions: list[float | None] = []
        for start in range(0, len(jobs), BATCH_MAX):
            batch = self._predict(jobs[start : start + BATCH_MAX])
            if batch is None:
                return False
            predictions += batch
        lane.saw(predictions)
        if jobs and not lane.jobs:
            lane.leave(self.time.boottime_ns())  # nothing is known about any of them
            self._set_bounds()
            return False
        scale_us = self._order.scale_of(window.lane)
        try:
            window.scores += [(self._boost(lane, seconds, scale_us), seconds) for seconds in predictions]
        except Exception as e:  # whatever a predictor raises, jobs go on
            self._bad("error", f"{type(e).__name__}: {e}")
            return False
        return True

    def _boost(self, lane: _Lane, predicted_s: float | None, scale_us: float) -> int:
        assert self.predictor is not None
        boost_us = self.predictor.boost_us(
            lane.mode, predicted_s, scale_s=scale_us / 1e6, bound_s=lane.bound_us / 1e6
        )
        return max(0, min(int(boost_us), lane.bound_us))  # whatever it says, nobody waits longer than T

    def _predict(self, jobs: Sequence[_Unread]) -> list[float | None] | None:
        assert self.predictor is not None
        # Before the board names the model and the clock runs for the predictor: a user's function that is
        # slow or deadly is not their fault.
        waiting = self._read(jobs)
        began_ns = self.time.monotonic_ns()
        self._say_scoring(self._order.sha256)
        try:
            found = [
                seconds if seconds is not None and 0.0 <= seconds < math.inf else None
                for seconds in self.predictor.score(waiting)
            ]
            if len(found) != len(jobs):
                raise ValueError(f"{len(found)} predictions for {len(jobs)} jobs")
        except Exception as e:  # whatever a predictor raises, jobs go on
            self._scored(0)
            self._bad("error", f"{type(e).__name__}: {e}")
            return None
        self._scored(len(jobs))
        if self.time.monotonic_ns() - began_ns > BATCH_NS_MAX:
            self._bad("slow", f"{(self.time.monotonic_ns() - began_ns) / 1e6:.0f} ms for {len(jobs)} jobs")
        else:
            self._bad_batches = 0
        return found

    def _read(self, jobs: Sequence[_Unread]) -> list[Waiting]:
        """A batch as a predictor sees it, with fields."""
        found: list[Waiting] = []
        used: dict[bytes, Fields] = {}
        for header, job in jobs:
            waiting = _waiting(header, job)
            read = self.fields.get(job[1])
            if read is not None:
                used[job[1]] = read
            found.append(waiting._replace(fields={} if read is None else read(waiting.payload)))
        for read in used.values():
            if read.end_batch():
                self._own["slow"] += 1
        return found

    def _bad(self, reason: str, told: str) -> None:
        self._own[reason] += 1
        self._put_fallbacks()
        self._bad_batches += 1
        if self._bad_batches >= BAD_BATCHES_MAX:  # after the break it still stands there: one trial
            self._closed_until_ns = self.time.boottime_ns() + BREAK_NS
            log.warning("jobs are not scored for a minute: the predictor fails (%s)", told)
            self._set_bounds()

    def rungs(self, job: Waiting) -> tuple[float | None, float | None]:
        """What each rung says of a job that is about to run; the watch compares it with how long it took.
        Nothing of a job too short to be ordered: the watch has no use for it, and it costs more than the
        job."""
        if self.predictor is None or not self._loaded or self.time.boottime_ns() < self._closed_until_ns:
            return None, None
        if self._tiny({job.type.encode("ascii", "replace"): 1}):
            return None, None
        self._say_scoring(self._order.sha256)
        try:
            model_s, mean_s = self.predictor.rungs(job)
            return None if model_s is None else float(model_s), None if mean_s is None else float(mean_s)
        except Exception as e:  # whatever a predictor raises, jobs go on
            self._bad("error", f"{type(e).__name__}: {e}")
            return None, None
        finally:
            self._scored(0)

    def completed(self, job: Waiting, run_s: float) -> None:
        """Tell the history of a captured run."""
        if self.predictor is None or not self._loaded:
            return
        try:
            self.predictor.completed(job, run_s)
        except Exception as e:
            self._bad("error", f"{type(e).__name__}: {e}")

    def in_use(self, rungs: tuple[float | None, float | None]) -> float | None:
        """Of what `rungs` said that which orders: where the model has no answer, the mean stands in."""
        model_s, mean_s = rungs
        rung = self._order.rung
        return None if rung == "fifo" else mean_s if rung == "mean" or model_s is None else model_s

    @property
    def version(self) -> str:
        """The version that predicts, '' if none does."""
        return self._loaded

    def _say_scoring(self, sha256: str) -> None:
        try:
            word = int(sha256[:8], 16)
        except ValueError:
            word = 0
        self.view.set(layout.C_SCORING, word or 1)

    def _scored(self, jobs: int) -> None:
        self.view.set(layout.C_SCORING, 0)
        if jobs:
            self.view.add("scored", jobs)
        self._put_fallbacks()

    def _put_fallbacks(self) -> None:
        try:
            told = dict(self.predictor.fallbacks) if self.predictor is not None else {}
        except Exception:  # whatever a predictor raises, jobs go on
            told = {}
        for reason in REASONS:
            self.view.put(f"fallback_{reason}", self._own[reason] + told.get(reason, 0))

    def predicted_s(self, lane: str, boost_us: int) -> float | None:
        """The prediction behind a boost: p = -m ln(boost / T). None for a boost that says nothing."""
        return self._order.predicted_s(lane, boost_us)


class _Window:
    """The frames of one lane that one fetch brought."""

    def __init__(self, ordering: Ordering, lane: str, frames: list[bytes], left_us: int | None) -> None:
        self.lane = lane
        self.frames = frames
        self.left_us = left_us
        self.unscored: list[_Unread] = []
        self.scores: list[tuple[int, float | None]] = []  # boost, prediction of those in `unscored`
        self.too_large = False
        self._ordering = ordering
        self._headers: list[codec.Header] = []
        self._types: list[list[bytes]] = []

    def fill(self) -> bool:
        """Read the frames; False if there is nothing to order, or one of them is damaged: then nobody reads
        on."""
        try:
            for frame in self.frames:
                header = codec.parse(frame)
                scored = _is_scored(header)
                if not scored and header.n > CUT_JOBS:
                    self.too_large = True
                jobs = codec.walk(frame)
                self._headers.append(header)
                self._types.append([job[1] for job in jobs])
                if not scored:
                    self.unscored += [(header, job) for job in jobs]
        except TQEError:
            return False
        # A job that finds an idle worker is never scored.
        return self.left_us is not None or sum(header.n for header in self._headers) > 1

    def decide(self, plan: Plan, held_ns: float, idle: bool, free_slots: int) -> tuple[float, int]:
        """Fill the plan: in the order of scores what fits into the quantum and may not be overtaken by what
        is left in the lane; the rest goes back. Returns (predicted ns held, jobs kept)."""
        if self.too_large:
            self._cut(plan)
            return held_ns, 0
        jobs = self._jobs()
        going = set(range(len(self.frames)))
        kept = 0
        for job in sorted(jobs):
            if self.left_us is not None and job.score_us > self.left_us:
                break
            if self._headers[job.frame_at].n > 1:
                break  # it leaves its frame, and comes back with the next fetch
            ns = self._fits(job, held_ns, free_slots, must=idle and not kept)
            if ns is None:
                break
            frame = self.frames[job.frame_at]
            plan.kept.append(frame)
            plan.predicted_ns[frame] = ns
            going.discard(job.frame_at)
            held_ns += ns
            kept += 1
            task = self._ordering.tasks.get(job.type)
            if task is not None and task.is_async:
                free_slots = max(0, free_slots - 1)
        self._return(plan, going, jobs)
        return held_ns, kept

    def _jobs(self) -> list[_Job]:
        found: list[_Job] = []
        scores = iter(self.scores)
        for at, header in enumerate(self._headers):
            scored = _is_scored(header)
            for index, kind in enumerate(self._types[at], header.base):
                if scored:
                    boost = header.boost_us
                    predicted_s = self._ordering.predicted_s(self.lane, boost)
                else:
                    boost, predicted_s = next(scores)
                entered = header.enqueued_us
                found.append(_Job(entered - boost, entered, at, index, boost, predicted_s, kind))
        return found

    def _fits(self, job: _Job, held_ns: float, free_slots: int, *, must: bool) -> float | None:
        """Predicted ns of the job if it may be kept, else None."""
        ordering = self._ordering
        task = ordering.tasks.get(job.type)
        if task is None or task.is_async or job.predicted_s is None:
            kept = ordering.admission.keep(
                ((job.type, 1),), held_ns=held_ns, free_slots=free_slots, must=must
            )
            return kept.predicted_ns if kept.jobs else None
        ns = job.predicted_s * 1e9
        return ns if must or held_ns + ns <= ordering.quantum_ns else None

    def _return(self, plan: Plan, going: set[int], jobs: Sequence[_Job]) -> None:
        parts: dict[int, list[bytes]] = {at: [] for at in sorted(going)}
        reordered = 0
        for job in jobs:
            if job.frame_at not in going:
                continue
            header, frame = self._headers[job.frame_at], self.frames[job.frame_at]
            if _is_scored(header):
                parts[job.frame_at] = [frame]
                plan.carried.append(frame)
                continue
            parts[job.frame_at] += codec.cut(
                frame, [(job.job_at, 1)], boost_us=job.boost_us, flags=header.flags | codec.SCORED
            )
            reordered += 1
        plan.returned.extend((self.frames[at][4:45], made) for at, made in parts.items())
        self._ordering.view.add("reordered", reordered)

    def _cut(self, plan: Plan) -> None:
        """Everything goes back, large frames in pieces that one settle can take apart. Until they are scored
        they have the lowest score that they could get, as in the list."""
        bound_us = self._ordering.bounds[self.lane]
        for header, frame in zip(self._headers, self.frames, strict=True):
            if _is_scored(header):
                plan.returned.append((frame[4:45], [frame]))
                continue
            spans, base = [], header.base
            for size in even_pieces(header.n, -(-header.n // CUT_JOBS)):
                spans.append((base, size))
                base += size
            plan.returned.append((frame[4:45], codec.cut(frame, spans, boost_us=bound_us)))


def _is_scored(header: codec.Header) -> bool:
    """Scored jobs are frames of one: a larger one with the flag is scored again."""
    return bool(header.flags & codec.SCORED) and header.n == 1


def _waiting(header: codec.Header, job: tuple[int, bytes, bytes, bytes, bool]) -> Waiting:
    _, kind, body, _, zstd = job
    unread_bytes = 0
    try:
        if zstd:
            unread_bytes = payload.plain_bytes(body)
            body = payload.decompress(body) if unread_bytes <= PAYLOAD_BYTES_MAX else b""
    except TQEError:
        body, unread_bytes = b"", 0
    return Waiting(
        kind.decode("ascii"), header.lane, body, header.attempts, header.enqueued_us, None, unread_bytes
    )
