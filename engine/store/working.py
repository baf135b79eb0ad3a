"""The calls that a worker makes: fetch, takeover, leave, and the wait for wake tokens. Pure: it builds calls
and reads replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from tqe.store.call import Call
from tqe.store.keys import Keys

# Scored jobs of a lane that wait, from which on no more are looked at: a million in bulk would otherwise
# take 20 s of scoring before the first starts, and a frame of one each in Redis.
SORTED_MAX: Final = 20_000


class LaneRule(NamedTuple):
    """A lane as `fetch` is told of it: its name, and the starvation bound T in µs (0 = plain FIFO)."""

    name: str
    bound_us: int = 0


class Fetched(NamedTuple):
    """Reply of `fetch`. `cancels`: position in `frames` → indexes of jobs that somebody asked to cancel.
    `left`: position of an ordered lane among the call's lanes → the lowest key that is left in it."""

    now_us: int
    lease_end_ms: int
    hlen: int
    cancels: dict[int, set[int]]
    left: dict[int, int]
    frames: list[bytes]


class Taken(NamedTuple):
    """Reply of `takeover`: what the new incarnation holds, as (lease, frame)."""

    now_us: int
    lease_end_ms: int
    leases: list[tuple[bytes, bytes]]


class Fetcher:
    """Builds `fetch` calls; keys and lanes are the same for a whole incarnation, so they are put together
    once."""

    def __init__(
        self,
        keys: Keys,
        incarnation: str,
        lanes: Sequence[LaneRule],
        lease_ms: int,
        *,
        even_paused: bool = False,
    ) -> None:
        names = [
            keys.void, keys.incarnations, keys.processing(incarnation), keys.depth, keys.stats, keys.cancel,
            keys.quarantine, keys.parked, keys.void if even_paused else keys.paused,
        ]  # fmt: skip
        rules: list[str | int] = []
        for lane in lanes:
            names += [keys.queue(lane.name), keys.sorted(lane.name), keys.wake(lane.name)]
            rules += [lane.name, lane.bound_us]
        self._keys = tuple(names)
        self._head: tuple[str | int, ...] = (incarnation, lease_ms)
        self._rules = tuple(rules)

    def call(
        self,
        *,
        jobs_max: int,
        bytes_max: int,
        frames_max: int,
        window_jobs: int = 0,
        sorted_max: int = SORTED_MAX,
    ) -> Call:
        """Lease up to so many jobs, bytes and frames; a first frame is always taken. From the list of a lane
        with a bound it is up to `window_jobs` instead of `jobs_max`: they are to be scored. From `sorted_max`
        scored frames on, no more are scored before some of them have gone."""
        budgets = (jobs_max, bytes_max, frames_max, window_jobs, sorted_max)
        return Call("fetch", self._keys, (*self._head, *budgets, *self._rules))


def read_fetch(reply: list[Any]) -> Fetched:
    """Parse the reply of `fetch`."""
    flat = reply[3]
    cancels: dict[int, set[int]] = {}
    for at in range(0, len(flat), 2):
        cancels[int(flat[at]) - 1] = {int(index) for index in flat[at + 1].split(b",") if index}
    left = {int(reply[4][at]) - 1: int(reply[4][at + 1]) for at in range(0, len(reply[4]), 2)}
    return Fetched(reply[0], reply[1], reply[2], cancels, left, reply[5:])


def takeover(keys: Keys, old: str, new: str, lease_ms: int, guard: str = "") -> Call:
    """Move all leases of `old` ('' = none) to `new`. With `guard`, the lease end that was seen, it is a
    reap."""
    names = (keys.void, keys.incarnations, keys.processing(old or new + "-none"), keys.processing(new))
    return Call("takeover", names, (old, new, lease_ms, guard))


def read_takeover(reply: list[Any]) -> Taken:
    """Parse the reply of `takeover`."""
    rest = reply[2:]
    return Taken(reply[0], reply[1], [(rest[at], rest[at + 1]) for at in range(0, len(rest), 2)])


def leave(keys: Keys, incarnation: str) -> Call:
    """End an incarnation that holds nothing."""
    return Call("leave", (keys.void, keys.incarnations, keys.processing(incarnation)), (incarnation,))


def wait_command(keys: Keys, lanes: Sequence[str], timeout_s: float) -> tuple[str | bytes | int | float, ...]:
    """The blocking pop of a wake token of any of the lanes."""
    return ("BLPOP", *(keys.wake(lane) for lane in lanes), timeout_s)
