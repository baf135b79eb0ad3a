"""Runs suspects: jobs that may have ended a process or a host before, one at a time and alone.

A job that takes the whole container with it leaves no board to read: all that is known afterwards is what
Redis holds. So before a suspect starts, Redis is told so, and nothing else runs beside it, here or in a
suspect's place on this host: whose lease then ends without a word is the one to blame, and nobody else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from tqe import clock
from tqe.board import layout
from tqe.board.board import SlotView
from tqe.codec import hot
from tqe.store import settling
from tqe.worker.admission import PIECES_MAX, even_pieces, laid_out
from tqe.worker.hold import Hold
from tqe.worker.peers import Peers
from tqe.worker.runner import JobRunner
from tqe.worker.settler import Change, Settler

# A worker that waits fetches nothing. So long for its own coroutines to end:
OWN_WAIT_NS: Final = 30_000_000_000
# and so long for the suspect of another worker; then the suspect comes again later, in ms
PEER_WAIT_NS: Final = 500_000_000
POSTPONE_MS: Final = 4_000
# Given back because another worker is idle: so long it may have it before this one fetches again.
REST_NS: Final = 250_000_000

WAITING, MARKING, LEAVING, RUNNING = range(4)


class Suspects:
    """The suspect that one worker has in hand, if any."""

    def __init__(self, view: SlotView, peers: Peers, hold: Hold, runner: JobRunner, settler: Settler) -> None:
        self._view = view
        self._peers = peers
        self._hold = hold
        self._runner = runner
        self._settler = settler
        self._lease: hot.Lease | None = None
        self._phase = WAITING
        self._alone = False  # nothing of this worker stands in its way any more
        self._since_ns = 0  # when that began or ended
        self._rest_until_ns = 0
        self._met = False

    @property
    def hinder(self) -> bool:
        """Whether nothing may be fetched now."""
        if self._rest_until_ns and clock.boottime_ns() >= self._rest_until_ns:
            self._rest_until_ns = 0
        return self._lease is not None or self._rest_until_ns != 0

    def jobs_max(self, budget: int) -> int:
        """How many jobs to ask for: one, after suspects were met, since of many one could be kept."""
        met, self._met = self._met, False
        return 1 if met else budget

    def take_in(self, leases: list[hot.Lease], cancels: Mapping[bytes, set[int]]) -> None:
        """Keep the first job, if there is none yet; all else goes back, where others can take it."""
        self._met = True
        for lease in leases:
            kept = self._lease is None
            if kept:
                lease.cancels = cancels.get(lease.frame)
                self._lease = lease
                self._phase = WAITING
                self._alone = False
                self._since_ns = clock.boottime_ns()
            self._hold.set_aside(lease)
            self._cut(lease, lease.next + kept)

    def look(self) -> None:
        """Bring the suspect on by a step, if one can be taken now."""
        lease = self._lease
        if lease is None:
            return
        if lease not in self._hold:
            self._lease = None
            self._view.set(layout.C_SUSPECT, 0)
            return
        if self._phase != WAITING or lease.next >= lease.stop or not self._known(lease):
            return
        now_ns = clock.boottime_ns()
        alone = len(self._hold) == 1 and not self._runner.active and not self._settler.busy
        if alone != self._alone:
            self._alone = alone
            self._since_ns = now_ns
        waited_ns = now_ns - self._since_ns
        if alone and self._first_on_host():
            self._mark(lease)
        elif self._runner.active and self._peers.idle():
            self._rest_until_ns = now_ns + REST_NS
            self.give_back()
        elif waited_ns > (PEER_WAIT_NS if alone else OWN_WAIT_NS):
            self._postpone(lease)

    def give_back(self) -> None:
        """Others may have it, if it has not started. One that is just being told of is asked again later."""
        lease = self._lease
        if lease is not None and self._phase == WAITING and not lease.settling:
            self._cut(lease, lease.next)

    def forget(self) -> None:
        """The reply is lost: what was said is said again. A mark that is there already changes nothing."""
        if self._phase in (MARKING, LEAVING):
            self._phase = WAITING

    def _known(self, lease: hot.Lease) -> bool:
        """Whether Redis holds it as a lease of one, and says so."""
        return not lease.settling and len(lease.claims) == 1 and lease.claims[0][1] == 1

    def _first_on_host(self) -> bool:
        """Whether no other worker of this host has a suspect at work; if so, none begins from now on.

        Two that look at the same moment both see the other, and both try again: neither may go on.
        """
        self._view.set(layout.C_SUSPECT, 1)
        if self._peers.suspect_at_work():
            self._view.set(layout.C_SUSPECT, 0)
            return False
        return True

    def _mark(self, lease: hot.Lease) -> None:
        self._phase = MARKING
        ((base, n),) = lease.claims
        change = Change(lease, (base, n), [(base, n)], then=self._marked)
        self._settler.tell(settling.marked(lease.frame, lease.header, base), change)

    def _marked(self) -> None:
        """From here on its lease cannot end without a charge: it may start."""
        lease = self._lease
        if lease is not None and lease.next < lease.stop:
            self._phase = RUNNING
            self._hold.ready(lease)

    def _postpone(self, lease: hot.Lease) -> None:
        self._phase = LEAVING
        ((base, n),) = lease.claims
        delay_ms = POSTPONE_MS // 2 + random.randint(0, POSTPONE_MS // 2)
        item = settling.postponed(lease.frame, lease.header, base, delay_ms)
        self._settler.tell(item, Change(lease, (base, n), []))

    def _cut(self, lease: hot.Lease, index: int) -> None:
        """Give back what stands from `index` on, in pieces for others to cut further: a frame of a thousand
        in frames of one would keep Redis busy for milliseconds."""
        jobs = lease.stop - index
        if not jobs:
            return
        lease.give_back(index)
        lease.pieces = laid_out(index, even_pieces(jobs, min(PIECES_MAX, jobs)))
        self._hold.give_way(lease)
        self._view.add("returned", jobs)
