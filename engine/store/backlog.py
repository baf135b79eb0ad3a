"""Owns the look at how much work waits in each lane, in predicted seconds: jobs times their types' means.

What a lane holds is learnt from its ends, since nobody may read all of it: what leaves it next, and what
entered it last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tqe import codec
from tqe.errors import FrameError
from tqe.store.keys import Keys
from tqe.store.reading import ask
from tqe.store.steps import Steps

UNKNOWN_S: Final = 1.0  # what a job counts as long as no job of any type has been timed
SAMPLE_JOBS: Final = 32  # at each end of a lane
SAMPLE_FRAMES_MAX: Final = 16


class LaneWork(NamedTuple):
    """Jobs that wait in a lane, and how long one worker would be busy with them."""

    jobs: int
    seconds: float
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits, by lane; `workers` is how many are registered, of all hosts."""

    lanes: Mapping[str, LaneWork]
    workers: int = 0

    @property
    def seconds(self) -> float:
        """Work of all lanes that workers take from."""
        return sum(lane.seconds for lane in self.lanes.values() if not lane.paused)


def look(keys: Keys, lanes: Sequence[str]) -> Steps[Backlog]:
    """Work in these lanes. At most some hundred KiB a lane are read, however long it is."""
    depth, means, paused, workers, *frames = yield from ask(
        ("HGETALL", keys.depth),
        ("HGETALL", keys.means),
        ("SMEMBERS", keys.paused),
        ("ZCARD", keys.incarnations),
        *(("LLEN", keys.queue(lane)) for lane in lanes),
        *(("ZCARD", keys.sorted(lane)) for lane in lanes),
    )
    known = _numbers(means)
    jobs = _numbers(depth)
    parts = [
        *((lane, "LRANGE", keys.queue(lane), jobs.get(lane, 0)) for lane in lanes),
        *((lane, "ZRANGE", keys.sorted(lane), jobs.get(f"{lane}:sorted", 0)) for lane in lanes),
    ]
    filled = [(part, size) for part, size in zip(parts, frames, strict=True) if size > 0]
    reads = [one for (_, verb, key, count), size in filled for one in _ends(verb, key, count, size)]
    ends = (yield from ask(*reads)) if reads else []
    waiting = dict.fromkeys(lanes, 0)
    seconds = dict.fromkeys(lanes, 0.0)
    for at, ((lane, _, _, count), size) in enumerate(filled):
        count = max(count, size)  # a cached depth that is too low
        waiting[lane] += count
        seconds[lane] += count * _mean_s([*ends[2 * at], *ends[2 * at + 1]], known)
    stopped = {name.decode("ascii", "replace") for name in paused}
    return Backlog(
        {lane: LaneWork(waiting[lane], seconds[lane], lane in stopped) for lane in lanes}, int(workers)
    )


def _ends(verb: str, key: bytes, jobs: int, frames: int) -> list[tuple[str | bytes | int, ...]]:
    """Commands that read the first and the last frames, as many as hold enough jobs."""
    wanted = min(SAMPLE_FRAMES_MAX, -(-SAMPLE_JOBS * frames // max(1, jobs)), frames)
    return [(verb, key, 0, wanted - 1), (verb, key, -wanted, -1)]


def _mean_s(frames: Sequence[bytes], means_us: Mapping[str, int]) -> float:
    """Mean time of the jobs in these frames; those of a type that nobody has timed count as the others."""
    jobs, total_us = 0, 0
    for frame in frames:
        try:
            runs = codec.types(frame).split(";")
        except FrameError:
            continue  # whoever takes it puts it aside
        for name, _, number in (run.rpartition("*") for run in runs):
            if name in means_us:
                jobs += int(number)
                total_us += int(number) * means_us[name]
    if jobs:
        return total_us / jobs / 1e6
    return sum(means_us.values()) / len(means_us) / 1e6 if means_us else UNKNOWN_S


def _numbers(flat: Sequence[Any]) -> dict[str, int]:
    return {
        name.decode("utf-8", "replace"): int(value)
        for name, value in zip(flat[::2], flat[1::2], strict=True)
        if value.isdigit()
    }
