"""What one worker holds: its leases, the order in which their jobs run, and how much predicted time that
is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqe.codec import hot
from tqe.codec.hot import Lease


class Spot(NamedTuple):
    """Where to run next: the leases of a rank, and the position in them."""

    leases: list[Lease]
    at: int


class Hold:
    """All leases; those with jobs left to start by lane rank, in the order of their arrival; those that
    have ended."""

    def __init__(self, ranks: int) -> None:
        self.order: Sequence[int] = range(ranks)  # of ranks: whose jobs run first
        self._held: dict[Lease, None] = {}  # a row may become another lease's, so not by row
        self._ready: list[list[Lease]] = [[] for _ in range(ranks)]
        self.ended: list[Lease] = []  # nothing of them waits or runs: to be settled whole
        self.cut: list[Lease] = []  # a part of them goes back
        self.held_ns = 0.0  # predicted time of what is not started
        self.bytes = 0
        # Leases that Redis should hold for this incarnation, as of the replies that were read.
        self.expected = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._held))

    def add(self, lease: Lease) -> None:
        """Take in a lease; it is ready if it has jobs to start, else it has ended."""
        self._held[lease] = None
        self.bytes += len(lease.frame)
        if lease.next < lease.stop:
            self._ready[lease.rank].append(lease)
            self.held_ns += lease.predicted_ns
        else:
            self.ended.append(lease)

    def set_aside(self, lease: Lease) -> None:
        """Take in a lease that is not to be started yet: `ready` or `give_way` says how it goes on."""
        self._held[lease] = None
        self.bytes += len(lease.frame)

    def ready(self, lease: Lease) -> None:
        """A lease that was set aside may start."""
        self._ready[lease.rank].append(lease)
        self.held_ns += lease.predicted_ns

    def give_way(self, lease: Lease) -> None:
        """A lease that was set aside goes back, whole or in part."""
        (self.ended if lease.ended() else self.cut).append(lease)

    def add_all(self, leases: list[Lease], predicted_ns: float) -> None:
        """Take in leases that all have jobs to start, of so much predicted time a job."""
        size, ns = hot.hold_all(leases, self._held, self._ready, predicted_ns)
        self.bytes += size
        self.held_ns += ns

    def __contains__(self, lease: Lease) -> bool:
        """Whether it is held."""
        return lease in self._held

    def remove(self, lease: Lease) -> bool:
        """A lease is gone from Redis and nothing of it runs. False if it was removed before."""
        if lease not in self:
            return False
        del self._held[lease]
        self.bytes -= len(lease.frame)
        return True

    @property
    def idle(self) -> bool:
        """Nothing waits to be started."""
        return not any(self._ready)

    def ranks(self) -> list[int]:
        """Lanes with jobs to start."""
        return [rank for rank, leases in enumerate(self._ready) if leases]

    def spot(self) -> Spot | None:
        """The first lease with a job to start, of the first lane that has one."""
        for rank in self.order:
            leases = self._ready[rank]
            if leases:
                return Spot(leases, 0)
        return None

    def started(self, spot: Spot, end: int) -> None:
        """All jobs of the leases from the spot up to `end` have been started."""
        self.held_ns -= hot.start_all(spot.leases, spot.at, end, self.ended)
        if self.idle:
            self.held_ns = 0.0

    def take_ended(self) -> tuple[list[Lease], list[Lease]]:
        """What has ended or was cut since the last time, each once: ([to be settled], [without a claim])."""
        found = hot.still_held(self.ended + self.cut, self._held)
        self.ended.clear()
        self.cut.clear()
        return found

    def close(self, leases: list[Lease], slot: hot.Slot) -> None:
        """These are settled whole: free their rows."""
        self.bytes -= hot.close_all(leases, self._held, slot)
        self.expected -= len(leases)

    def unready(self, lease: Lease) -> None:
        """Nothing of the lease is to be started here any more."""
        leases = self._ready[lease.rank]
        if lease in leases:
            leases.remove(lease)
            self.held_ns = max(0.0, self.held_ns - lease.predicted_ns)
            lease.predicted_ns = 0.0

    def give_back_all(self) -> None:
        """Start nothing more: all that is ahead goes back."""
        for leases in self._ready:
            for lease in leases:
                lease.give_back(lease.next)
                (self.ended if lease.ended() else self.cut).append(lease)
            leases.clear()
        self.held_ns = 0.0

    def spent(self, spot: Spot | None, ns: float) -> None:
        """So much of the predicted time of the lease that runs is no longer ahead."""
        if spot is not None:
            lease = spot.leases[spot.at]
            gone = min(ns, lease.predicted_ns)
            lease.predicted_ns -= gone
            self.held_ns = max(0.0, self.held_ns - gone)
