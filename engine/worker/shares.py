"""Decides in which order one worker serves its lanes, so that each gets its weight's share of the time."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Shares:
    """Virtual time per lane: time spent over weight; the lane with the least goes first.

    Weights by the count of jobs would give a lane of long jobs nearly all the time.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """A weight for each lane, in the order of rank."""
        if not weights or min(weights) < 1:
            raise ValueError("a weight is at least 1")
        self._weights = tuple(weights)
        self._virtual_ns = [0.0] * len(weights)
        self.order = tuple(range(len(weights)))  # of ranks; equal lanes stay in the order of rank

    def charge(self, rank: int, ns: float) -> None:
        """A slice of this lane's jobs took so long."""
        self._virtual_ns[rank] += ns / self._weights[rank]
        self._sort()

    def fetched(self, brought: Collection[int], held: Collection[int] = ()) -> None:
        """A fetch in `order` brought jobs of these lanes; of those `held` some wait here.

        A lane that was asked before the last of them and brought nothing is empty or paused. It is set
        level with the busy ones: with saved credit it would shut them out when its jobs come.
        """
        if not brought:
            return
        busy = {*brought, *held}
        level = min(self._virtual_ns[rank] for rank in busy)
        for rank in self.order[: max(map(self.order.index, brought))]:
            if rank not in busy:
                self._virtual_ns[rank] = max(self._virtual_ns[rank], level)
        self._sort()

    def _sort(self) -> None:
        # Only differences count: kept small, a float stays exact to the nanosecond.
        least = min(self._virtual_ns)
        self._virtual_ns = [ns - least for ns in self._virtual_ns]
        self.order = tuple(sorted(range(len(self._weights)), key=self._virtual_ns.__getitem__))
