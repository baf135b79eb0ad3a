"""Owns what can be said beforehand of one job: how long it will run, and how long it will wait.

Both come from means that were measured, and are None where nothing was. The wait is that of the order of
entry with the workers of now; in a lane that is ordered a short job waits less, a long one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tqe import codec
from tqe.errors import FrameError
from tqe.job import JobStatus
from tqe.store import backlog
from tqe.store.keys import Keys
from tqe.store.reading import ask
from tqe.store.steps import Steps

_AHEAD = ("scheduled", "queued", "retrying", "running")


class Forecast(NamedTuple):
    """Predicted run time and wait in ms; None where nobody can say."""

    predicted_ms: int | None = None
    predicted_wait_ms: int | None = None

    def as_dict(self) -> dict[str, int | None]:
        return self._asdict()


def forecast(keys: Keys, lanes: Sequence[str], job: JobStatus) -> Steps[Forecast]:
    """Of a job that has not ended. `lanes` in the order in which workers take from them; a wait is predicted
    for what waits in one of them, and for nothing that is due later or runs already."""
    if job.status not in _AHEAD or job.type is None:
        return Forecast()
    mean_us, timed = yield from ask(("HGET", keys.means, job.type), ("HLEN", keys.means))
    run_ms = _ms(int(mean_us)) if mean_us is not None and mean_us.isdigit() else None
    lane, since = job.lane, job.submitted_at
    if job.status != "queued" or lane is None or lane not in lanes or since is None or not timed:
        return Forecast(run_ms)
    work = yield from backlog.look(keys, lanes)
    own = work.lanes[lane]
    if own.paused or not work.workers:
        return Forecast(run_ms)
    seconds = own.seconds * (yield from _share_before(keys, lane, round(since.timestamp() * 1000)))
    for higher in lanes[: lanes.index(lane)]:
        if not work.lanes[higher].paused:
            seconds += work.lanes[higher].seconds
    return Forecast(run_ms, round(1000 * seconds / work.workers))


def _share_before(keys: Keys, lane: str, entered_ms: int) -> Steps[float]:
    """What part of a lane entered it before this moment, if jobs came evenly: its ends tell since when they
    wait. All of it where they tell nothing."""
    ends = yield from ask(("LINDEX", keys.queue(lane), 0), ("LINDEX", keys.queue(lane), -1))
    try:
        first_ms, last_ms = (codec.peek(frame).enqueued_us // 1000 for frame in ends)
    except (FrameError, TypeError):
        return 1.0
    if last_ms <= first_ms:
        return 1.0
    return min(1.0, max(0.0, (entered_ms - first_ms) / (last_ms - first_ms)))


def _ms(us: int) -> int:
    return max(1, round(us / 1000))
