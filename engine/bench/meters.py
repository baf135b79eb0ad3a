"""What measurements read from outside of the processes: CPU time, other work on the machine, memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tqe import clock

_TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_IDLE_COLUMNS: Final = (3, 4)  # of /proc/stat: idle, and waiting for a disk
_GUEST_COLUMNS: Final = (8, 9)  # counted in user time already


def cpu_ns(pids: list[int]) -> int:
    """CPU time that these processes have used, all threads; those that are gone count nothing."""
    return sum(clock.process_cpu_ns(pid) for pid in pids)


def children(pid: int) -> list[int]:
    """Direct children of a process; [] where the kernel does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        return []


def machine_busy_ns(cpus: set[int]) -> int:
    """Time for which the given CPUs were busy for anybody, or taken by the hypervisor, in ticks of 10 ms."""
    ticks = 0
    for line in Path("/proc/stat").read_text("ascii").splitlines():
        name, *columns = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            skipped = (*_IDLE_COLUMNS, *_GUEST_COLUMNS)
            ticks += sum(int(value) for at, value in enumerate(columns) if at not in skipped)
    return ticks * _TICK_NS


def private_bytes(pid: int) -> int:
    """Memory that would come back if this process ended: what it shares with nobody."""
    found = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            found += int(line.split()[1]) * 1024
    return found


@dataclass(frozen=True, slots=True)
class Reading:
    """The clocks at one moment."""

    at_ns: int
    workers_ns: int
    redis_ns: int
    own_ns: int  # everything that belongs to the benchmark, workers and Redis included
    machine_ns: int

    def since(self, before: Reading) -> Reading:
        return Reading(
            self.at_ns - before.at_ns,
            self.workers_ns - before.workers_ns,
            self.redis_ns - before.redis_ns,
            self.own_ns - before.own_ns,
            self.machine_ns - before.machine_ns,
        )

    def foreign(self, cpus: int) -> float:
        """Part of the machine that others used (of a difference)."""
        if self.at_ns < 10 * _TICK_NS:
            return 0.0  # too short for clocks that tick
        return max(0.0, (self.machine_ns - self.own_ns) / (self.at_ns * cpus))


def percentile(values: list[int], part: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(part * len(ordered)))]) if ordered else 0.0
