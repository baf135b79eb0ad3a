"""Owns what can be said beforehand of one job: how long it will run, and how long it will wait.

How long it runs is what a worker has predicted when it scored the job, else the mean of its type; how long it
waits is the work before it in the order that is in use, shared by the workers of now. Both are None where
nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tqe import codec
from tqe.errors import FrameError
from tqe.job import JobStatus, split_job_id
from tqe.store import backlog
from tqe.store.backlog import Known
from tqe.store.keys import Keys
from tqe.store.model import Order, order_command, read_order
from tqe.store.reading import ask, counts
from tqe.store.steps import Steps

# A job is looked for among so many scored ones, which costs Redis a millisecond a thousand, and clients poll.
# In a larger sorted part its score is reckoned from the mean of its type.
SEARCH_JOBS_MAX: Final = 2_000
SEARCH_PAGE: Final = 1_000

_AHEAD = ("scheduled", "queued", "retrying", "running")


class Forecast(NamedTuple):
    """Predicted run time and wait in ms; None where nobody can say."""

    predicted_ms: int | None = None
    predicted_wait_ms: int | None = None

    def as_dict(self) -> dict[str, int | None]:
        return self._asdict()


class _Place(NamedTuple):
    """Where a job stands: its score in µs, and its predicted run time."""

    score_us: float
    predicted_s: float | None


def forecast(keys: Keys, lanes: Sequence[str], job: JobStatus) -> Steps[Forecast]:
    """Of a job that has not ended. `lanes` in the order in which workers take from them; a wait is predicted
    for what waits in one of them, and for nothing that is due later or runs already."""
    if job.status not in _AHEAD or job.type is None:
        return Forecast()
    lane, since = job.lane, job.submitted_at
    own = [] if lane is None else [lane]
    mean_us, timed, told, scored = yield from ask(
        ("HGET", keys.means, job.type),
        ("HLEN", keys.means),
        order_command(keys, own),
        ("ZCARD", keys.sorted(lane or "")),
    )
    mean_s = int(mean_us) / 1e6 if mean_us is not None and mean_us.isdigit() else None
    if job.status != "queued" or lane is None or lane not in lanes or since is None:
        return Forecast(_ms(mean_s))
    order = read_order(told, own)
    place = (yield from _find(keys, lane, job.id, order)) if 0 < scored <= SEARCH_JOBS_MAX else None
    if place is None or place.predicted_s is None:
        score_us = since.timestamp() * 1e6 - order.likely_boost_us(lane, mean_s)
        place = _Place(score_us if place is None else place.score_us, mean_s)
    if not timed:
        return Forecast(_ms(place.predicted_s))
    work = yield from backlog.look(keys, lanes)
    if work.lanes[lane].paused or not work.workers:
        return Forecast(_ms(place.predicted_s))
    seconds = yield from _before(keys, lane, place, work.lanes[lane].listed_seconds, order)
    for higher in lanes[: lanes.index(lane)]:
        if not work.lanes[higher].paused:
            seconds += work.lanes[higher].seconds
    return Forecast(_ms(place.predicted_s), round(1000 * seconds / work.workers))


def _find(keys: Keys, lane: str, name: str, order: Order) -> Steps[_Place | None]:
    """The job in the sorted part of its lane, where it is alone in its frame once it was scored; None if it
    is not there."""
    frame_id, index = split_job_id(name)
    alone = b"????%s.%03d.0001.*" % (frame_id, index)
    cursor: bytes = b"0"
    for _ in range(2 * SEARCH_JOBS_MAX // SEARCH_PAGE):  # pages may hold less, and the set may grow
        ((cursor, found),) = yield from ask(
            ("ZSCAN", keys.sorted(lane), cursor, "MATCH", alone, "COUNT", SEARCH_PAGE)
        )
        for frame, score in zip(found[::2], found[1::2], strict=True):
            try:
                header = codec.peek(frame)
            except FrameError:
                continue
            scored = header.flags & codec.SCORED
            return _Place(float(score), order.predicted_s(lane, header.boost_us) if scored else None)
        if cursor == b"0":
            break
    return None


def _before(keys: Keys, lane: str, place: _Place, listed_s: float, order: Order) -> Steps[float]:
    """Seconds of work in the lane that go first: what is scored lower, and the part of the list that is
    likely to be."""
    lower, means, first, last = yield from ask(
        ("ZCOUNT", keys.sorted(lane), "-inf", f"({place.score_us:.0f}"),
        ("HGETALL", keys.means),
        ("LINDEX", keys.queue(lane), 0),
        ("LINDEX", keys.queue(lane), -1),
    )
    known = Known(counts(means), order)
    seconds = 0.0
    if lower:
        sample = yield from ask(*backlog.evenly(keys.sorted(lane), lower, lower))
        frames = [frame for part in sample for frame in part]
        seconds += lower * sum(known.seconds(frame, lane) for frame in frames) / max(1, len(frames))
    # Nobody has scored what is in the list: it is held to be as long as the list's ends are.
    boost_us = order.likely_boost_us(lane, known.mean_s([f for f in (first, last) if f], lane))
    return seconds + listed_s * _share_before([first, last], place.score_us + boost_us)


def _share_before(ends: Sequence[bytes | None], moment_us: float) -> float:
    """What part of a list entered it before this moment, if jobs came evenly: its ends tell since when they
    wait. All of it where they tell nothing."""
    try:
        first_us, last_us = (codec.peek(frame).enqueued_us for frame in ends)  # type: ignore[arg-type]
    except (FrameError, TypeError):
        return 1.0
    if last_us <= first_us:
        return 1.0
    return min(1.0, max(0.0, (moment_us - first_us) / (last_us - first_us)))


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else max(1, round(seconds * 1000))
