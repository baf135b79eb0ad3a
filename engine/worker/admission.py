"""How much of what was fetched a worker keeps, and how the rest is cut: by predicted time, never by count.

A worker that keeps a quantum (5 ms) of predicted work holds thousands of no-op jobs and one long job: no
short job waits behind a long one in a private buffer. What is not kept goes back at once, cut into pieces
that other workers can take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

PIECES_MAX: Final = 32
# Of a type that was never measured, a worker takes 1 job, then 8, 64, 512 while they turn out short.
RAMP: Final = ((1, 1), (9, 8), (73, 64), (585, 512))
UNMEASURED_PIECES: Final = 8


class Measured(Protocol):
    """What admission reads of a task: its running mean (< 0: never measured) and how many jobs stand behind
    it."""

    mean_ns: float
    seen: int

    @property
    def is_async(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """Of a frame's jobs ahead: how many to keep, their predicted time, and the sizes of the pieces that go
    back, in order."""

    jobs: int
    predicted_ns: float
    pieces: tuple[int, ...]


class Admission:
    """Decides for one worker. `slots` coroutines run at once; `quantum_ns` limits the predicted time of what
    is
    kept."""

    def __init__(self, tasks: Mapping[bytes, Measured], *, quantum_ns: int, slots: int = 1) -> None:
        self._tasks = tasks
        self._slots = slots
        self._quantum_ns = quantum_ns

    def keep(
        self, ahead: Sequence[tuple[bytes, int]], *, held_ns: float, free_slots: int, must: bool
    ) -> Kept:
        """What to keep of a frame whose jobs ahead are runs of (type, jobs).

        `held_ns` is the predicted time of what the worker holds already; `must` says that it holds nothing,
        and so has to keep at least one job, however long.
        """
        room = self._quantum_ns - held_ns
        kept = 0
        predicted = 0.0
        taken: dict[bytes, int] = {}  # a frame in which types alternate has many runs of each
        for key, jobs in ahead:
            task = self._tasks.get(key)
            if task is None:
                take, mean = jobs, 0.0  # settled without being run
            elif task.is_async:
                # As many as can start now; of short ones, as many as will have started within the quantum.
                mean = max(task.mean_ns, 0.0) / self._slots if task.seen >= self._slots else 0.0
                fit = int((room - predicted) / mean) if mean > 0 else 0
                take = min(jobs, max(free_slots, fit, 1 if must and not kept else 0))
                free_slots = max(0, free_slots - take)
            else:
                # What was never measured counts as a whole quantum, so that one such job fills it.
                mean = task.mean_ns if task.mean_ns >= 0 else float(self._quantum_ns)
                before = taken.get(key, 0)
                take = min(jobs, self._ramp(task) - before)
                taken[key] = before + take
                if mean > 0:
                    fit = int((room - predicted) / mean)
                    take = min(take, max(fit, 1 if must and not kept else 0))
            kept += take
            predicted += take * mean
            if take < jobs:
                break
        return Kept(kept, predicted, self._pieces(ahead, kept))

    def quick(self, types: Iterable[bytes], jobs: int, held_ns: float) -> float | None:
        """Predicted ns a job if so many jobs of these types are sure to fit, else None: no look at each frame
        of no-op jobs."""
        slowest = 0.0
        for key in types:
            task = self._tasks.get(key)
            if task is None or task.seen < RAMP[-1][0]:
                return None
            slowest = max(slowest, task.mean_ns / self._slots if task.is_async else task.mean_ns)
        # Twice the quantum, since a fetch that went out in time meets what was still at hand: giving back
        # would be the dearer part.
        return slowest if held_ns + slowest * jobs <= 2 * self._quantum_ns else None

    def _ramp(self, task: Measured) -> int:
        for seen, jobs in RAMP:
            if task.seen < seen:
                return jobs
        return 1 << 30

    def _pieces(self, ahead: Iterable[tuple[bytes, int]], skip: int) -> tuple[int, ...]:
        """Up to 32 pieces of equal predicted work, each at least a quantum: a job's bytes are rewritten a few
        times, not often."""
        rest: list[tuple[float, int]] = []
        for key, jobs in ahead:
            gone = min(skip, jobs)
            skip -= gone
            if jobs > gone:
                task = self._tasks.get(key)
                mean = -1.0 if task is None or task.is_async or task.mean_ns < 0 else task.mean_ns
                rest.append((mean, jobs - gone))
        total_jobs = sum(jobs for _, jobs in rest)
        if not total_jobs:
            return ()
        if any(mean < 0 for mean, _ in rest):
            return even_pieces(total_jobs, min(UNMEASURED_PIECES, total_jobs))
        if len(rest) == 1:
            mean = rest[0][0]
            least = math.ceil(self._quantum_ns / mean) if mean else total_jobs
            return even_pieces(total_jobs, max(1, min(PIECES_MAX, total_jobs // least)))
        work = sum(mean * jobs for mean, jobs in rest)
        return _equal_work(rest, max(work / PIECES_MAX, self._quantum_ns), self._quantum_ns)


def even_pieces(jobs: int, pieces: int) -> tuple[int, ...]:
    """Split so many jobs as evenly as possible, larger pieces first."""
    size, more = divmod(jobs, pieces)
    return tuple(size + 1 if k < more else size for k in range(pieces))


def laid_out(base: int, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Pieces of these sizes one after the other: [(base, jobs)]."""
    pieces = []
    for size in sizes:
        pieces.append((base, size))
        base += size
    return pieces


def _equal_work(rest: list[tuple[float, int]], share_ns: float, least_ns: float) -> tuple[int, ...]:
    sizes: list[int] = []
    size = 0
    work = 0.0
    for mean, jobs in rest:
        for _ in range(jobs):
            size += 1
            work += mean
            if work >= share_ns and len(sizes) < PIECES_MAX - 1:
                sizes.append(size)
                size, work = 0, 0.0
    if size and sizes and work < least_ns:
        sizes[-1] += size
    elif size:
        sizes.append(size)
    return tuple(sizes)
