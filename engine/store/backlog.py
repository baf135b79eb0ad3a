"""Owns the look at how much work waits in each lane, in predicted seconds.

A job that a worker has scored counts as what was predicted of it, another as the mean of its type. Nobody
may read all of a lane: its list is known by its ends, what leaves it next and what entered it last, and its
sorted part by a sample at even distances, since short jobs stand at one end of it and long ones at the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tqe import codec
from tqe.errors import FrameError
from tqe.store.keys import Keys
from tqe.store.model import Order, order_command, read_order
from tqe.store.reading import ask, counts
from tqe.store.steps import Steps

UNKNOWN_S: Final = 1.0  # what a job counts as long as no job of any type has been timed
SAMPLE_JOBS: Final = 64  # of the list, and of the sorted part
SAMPLE_FRAMES_MAX: Final = 32

Command = tuple[str | bytes | int, ...]


class LaneWork(NamedTuple):
    """Jobs that wait in a lane, and how long one worker would be busy with them."""

    jobs: int
    seconds: float
    paused: bool = False
    listed_seconds: float = 0.0  # of that, what is in the list: it came as it was submitted


class Known(NamedTuple):
    """By what a frame's work is told: mean µs by type, and the order in use."""

    means_us: Mapping[str, int]
    order: Order

    def work(self, frame: bytes, lane: str) -> tuple[int, float]:
        """(jobs, seconds) of a frame, without jobs of a type that nobody has timed. Raises FrameError."""
        header = codec.peek(frame)
        if header.flags & codec.SCORED and header.n == 1:
            predicted_s = self.order.predicted_s(lane, header.boost_us)
            if predicted_s is not None:
                return 1, predicted_s
        jobs, total_us = 0, 0
        for name, _, number in (run.rpartition("*") for run in codec.types(frame).split(";")):
            if name in self.means_us:
                jobs += int(number)
                total_us += int(number) * self.means_us[name]
        return jobs, total_us / 1e6

    def mean_s(self, frames: Sequence[bytes], lane: str) -> float:
        """Mean time of the jobs in these frames; those that nobody has timed count as the others."""
        jobs, seconds = 0, 0.0
        for frame in frames:
            try:
                found = self.work(frame, lane)
            except FrameError:
                continue  # whoever takes it puts it aside
            jobs, seconds = jobs + found[0], seconds + found[1]
        if jobs:
            return seconds / jobs
        means_us = self.means_us
        return sum(means_us.values()) / len(means_us) / 1e6 if means_us else UNKNOWN_S

    def seconds(self, frame: bytes, lane: str) -> float:
        """Work of one frame; none of what is no frame."""
        try:
            jobs = codec.peek(frame).n
        except FrameError:
            return 0.0
        return jobs * self.mean_s([frame], lane)


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
    depth, means, told, paused, workers, *frames = yield from ask(
        ("HGETALL", keys.depth),
        ("HGETALL", keys.means),
        order_command(keys, lanes),
        ("SMEMBERS", keys.paused),
        ("ZCARD", keys.incarnations),
        *(("LLEN", keys.queue(lane)) for lane in lanes),
        *(("ZCARD", keys.sorted(lane)) for lane in lanes),
    )
    known = Known(counts(means), read_order(told, lanes))
    jobs = counts(depth)
    names = [*lanes, *(f"{lane}:sorted" for lane in lanes)]
    held = {name: (max(jobs.get(name, 0), size), size) for name, size in zip(names, frames, strict=True)}
    # Where the cached depth is too low, each frame has at least one job.
    reads = {lane: _ends(keys.queue(lane), *held[lane]) for lane in lanes}
    reads |= {f"{lane}:sorted": evenly(keys.sorted(lane), *held[f"{lane}:sorted"]) for lane in lanes}
    commands = [command for own in reads.values() for command in own]
    replies = iter((yield from ask(*commands)) if commands else [])
    stopped = {name.decode("ascii", "replace") for name in paused}
    sampled = {name: [frame for _ in own for frame in next(replies)] for name, own in reads.items()}

    def work(lane: str) -> LaneWork:
        other = f"{lane}:sorted"
        listed_s = held[lane][0] * known.mean_s(sampled[lane], lane) if held[lane][0] else 0.0
        sorted_s = held[other][0] * known.mean_s(sampled[other], lane) if held[other][0] else 0.0
        return LaneWork(held[lane][0] + held[other][0], listed_s + sorted_s, lane in stopped, listed_s)

    return Backlog({lane: work(lane) for lane in lanes}, int(workers))


def _sample(jobs: int, frames: int) -> int:
    """How many frames hold enough jobs."""
    return min(SAMPLE_FRAMES_MAX, -(-SAMPLE_JOBS * frames // max(1, jobs)), frames)


def _ends(key: bytes, jobs: int, frames: int) -> list[Command]:
    """Commands that read the first and the last frames of a list."""
    wanted = _sample(jobs, frames)
    if wanted == frames:
        return [("LRANGE", key, 0, -1)] if frames else []
    wanted = max(2, wanted)  # one at each end: -0 would be the whole list
    return [("LRANGE", key, 0, (wanted + 1) // 2 - 1), ("LRANGE", key, -(wanted // 2), -1)]


def evenly(key: bytes, jobs: int, frames: int) -> list[Command]:
    """Commands that read frames at even distances among the first `frames` of a sorted set."""
    wanted = _sample(jobs, frames)
    if wanted == frames:
        return [("ZRANGE", key, 0, frames - 1)] if frames else []
    ranks = [(2 * at + 1) * frames // (2 * wanted) for at in range(wanted)]
    return [("ZRANGE", key, rank, rank) for rank in ranks]
