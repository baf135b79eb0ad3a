"""What one worker holds: its leases, the order in which their jobs run, and how much predicted time that is."""

from __future__ import annotations

from collections.abc import Iterator

from tqe.codec.hot import Lease


class Hold:
    """Leases by row, and those with jobs left to start, ordered by lane rank and then by arrival."""

    def __init__(self) -> None:
        self._by_row: dict[int, Lease] = {}
        self._ready: list[tuple[int, int, Lease]] = []
        self._arrivals = 0
        self.held_ns = 0.0  # predicted time of what is not started
        self.bytes = 0
        self.expected = 0  # leases that Redis should hold for this incarnation, as of the replies that were read

    def __len__(self) -> int:
        return len(self._by_row)

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._by_row.values()))

    def add(self, lease: Lease) -> None:
        """Take in a lease; it is ready if it has jobs to start."""
        self._by_row[lease.row] = lease
        self.bytes += len(lease.frame)
        if lease.next < lease.stop:
            self._arrivals += 1
            entry = (lease.rank, self._arrivals, lease)
            at = len(self._ready)
            # A higher lane goes before everything lower that has not started; within a lane, first come first served.
            while at and self._ready[at - 1][0] > lease.rank:
                at -= 1
            self._ready.insert(at, entry)
            self.held_ns += lease.predicted_ns

    def remove(self, lease: Lease) -> None:
        """A lease is gone from Redis and nothing of it runs."""
        if self._by_row.pop(lease.row, None) is not None:
            self.bytes -= len(lease.frame)
        self.unready(lease)

    def unready(self, lease: Lease) -> None:
        """Nothing of the lease is left to start here."""
        for at, (_, _, ready) in enumerate(self._ready):
            if ready is lease:
                del self._ready[at]
                self.held_ns = max(0.0, self.held_ns - lease.predicted_ns)
                lease.predicted_ns = 0.0
                break
        if not self._ready:
            self.held_ns = 0.0

    def ready(self) -> list[Lease]:
        """Leases with jobs left to start, in the order in which they are to run."""
        return [lease for _, _, lease in self._ready]

    @property
    def first(self) -> Lease | None:
        return self._ready[0][2] if self._ready else None

    @property
    def idle(self) -> bool:
        """Nothing waits to be started."""
        return not self._ready

    def spent(self, lease: Lease, ns: float) -> None:
        """So much of a lease's predicted time is no longer ahead."""
        gone = min(ns, lease.predicted_ns)
        lease.predicted_ns -= gone
        self.held_ns = max(0.0, self.held_ns - gone)
