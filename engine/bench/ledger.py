"""The shared memory in which tasks of the benchmarks leave what they saw: one entry a job, by its number."""

from __future__ import annotations

import mmap
import os
from typing import Final

from tqe import clock

ENTRIES: Final = 1 << 18
_WORDS: Final = 2  # a value in ns, and the process that wrote it


class Ledger:
    """Made before any fork, so that workers and the measuring process see the same pages.

    Two stores a job and no lock: each number is written by one job only.
    """

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, ENTRIES * _WORDS * 8)
        self._words = memoryview(self._map).cast("Q")

    def clear(self) -> None:
        self._map[:] = bytes(len(self._map))

    def put(self, number: int, value: int) -> None:
        """Called by tasks."""
        self._words[_WORDS * number + 1] = os.getpid()
        self._words[_WORDS * number] = value

    def latency(self, number: int, sent_ns: int) -> None:
        """The time from a submission to this moment; one clock for all processes."""
        self.put(number, clock.monotonic_ns() - sent_ns)

    def values(self, first: int, end: int) -> list[int]:
        """What the jobs of a range left, without those that left nothing."""
        return [value for value in self._words[_WORDS * first : _WORDS * end : _WORDS].tolist() if value]

    def first_by_process(self, end: int) -> dict[int, int]:
        """The smallest value that each process left."""
        found: dict[int, int] = {}
        for number in range(end):
            value, pid = self._words[_WORDS * number], self._words[_WORDS * number + 1]
            if value and value < found.get(pid, value + 1):
                found[pid] = value
        return found
