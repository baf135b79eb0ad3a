"""Decides in which order one worker serves its lanes, so that each gets its weight's share of the time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


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
        self._seen_ns = 0
        self.order = tuple(range(len(weights)))  # of ranks; equal lanes stay in the order of rank

    def charge(self, rank: int, ns: float) -> None:
        """A slice of this lane's jobs took so long."""
        self._virtual_ns[rank] += ns / self._weights[rank]
        self._sort()

    def charge_beside(self, parts: Iterable[tuple[int, float]], now_ns: int) -> None:
        """Jobs of these ranks run beside others, each on such a part of the worker: charged while they run,
        for one that runs for an hour would not be until then. Between two calls as long as the later says."""
        since_ns, self._seen_ns = self._seen_ns, now_ns
        if since_ns:
            for rank, part in parts:
                self._virtual_ns[rank] += (now_ns - since_ns) * part / self._weights[rank]
            self._sort()

    def fetched(self, asked: Sequence[int], brought: Collection[int], held: Collection[int] = ()) -> None:
        """A fetch that asked in this order brought jobs of these lanes; of those `held` some wait here.

        A lane that was asked before the last of them and brought nothing is empty or paused. It is set
        level with the busy ones: with saved credit it would shut them out when its jobs come.
        """
        reached = [asked.index(rank) for rank in brought if rank in asked]
        if not reached:
            return
        busy = {*brought, *held}
        level = min(self._virtual_ns[rank] for rank in busy if rank in asked)
        never_asked = set(range(len(self._weights))).difference(asked)
        for rank in {*asked[: max(reached)], *never_asked} - busy:
            self._virtual_ns[rank] = max(self._virtual_ns[rank], level)
        self._sort()

    def _sort(self) -> None:
        # Only differences count: kept small, a float stays exact to the nanosecond.
        least = min(self._virtual_ns)
        self._virtual_ns = [ns - least for ns in self._virtual_ns]
        self.order = tuple(sorted(range(len(self._weights)), key=self._virtual_ns.__getitem__))
