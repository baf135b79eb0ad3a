"""Which worker runs on which CPU, decided once at start, with the reason.

Pinning helps only who owns the CPUs. In a container with a quota every neighbour sees all CPUs of the
host, and ten of them would pin to the same few; with more workers than CPUs pins only get in the scheduler's
way. Redis and the steward are never pinned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tqe import cpus

LOAD_SAMPLE_S: Final = 0.1  # ten ticks of the kernel's CPU accounting


@dataclass(frozen=True, slots=True)
class Pins:
    """One CPU a worker, in the order of their numbers; empty when nobody is pinned. `reason` is for us."""

    cpus: tuple[int, ...]
    reason: str

    def cpu(self, number: int) -> int | None:
        """CPU of the worker with this number."""
        return self.cpus[number] if number < len(self.cpus) else None


def plan(
    procs: int,
    *,
    pin: bool,
    allowed: set[int] | None = None,
    quota: float | None = None,
    stat: Path = Path("/proc/stat"),
) -> Pins:
    """Decide. `allowed` and `quota` are read from the kernel when they are not given."""
    if not pin:
        return Pins((), "not pinned: switched off")
    allowed = cpus.allowed() if allowed is None else allowed
    quota = cpus.quota() if quota is None else quota
    if quota:
        return Pins((), f"not pinned: a quota of {quota:g} CPUs is set, so the CPUs are shared with others")
    if procs > len(allowed):
        return Pins((), f"not pinned: {procs} workers are more than the {len(allowed)} allowed CPUs")
    ranked = sorted(allowed) if procs == len(allowed) else least_loaded(allowed, stat)
    chosen = tuple(sorted(ranked[:procs]))
    return Pins(chosen, f"pinned to CPUs {', '.join(map(str, chosen))} of {len(allowed)} allowed")


def least_loaded(allowed: set[int], stat: Path = Path("/proc/stat")) -> list[int]:
    """The allowed CPUs, idlest of the last moment first."""
    before = _busy_ticks(stat)
    time.sleep(LOAD_SAMPLE_S)
    after = _busy_ticks(stat)
    return sorted(allowed, key=lambda cpu: (after.get(cpu, 0) - before.get(cpu, 0), cpu))


def _busy_ticks(stat: Path) -> dict[int, int]:
    found = {}
    try:
        lines = stat.read_text("ascii").splitlines()
    except OSError:
        return {}
    for line in lines:
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit():
            ticks = [int(field) for field in fields]
            found[int(name[3:])] = sum(ticks) - sum(ticks[3:5])  # all but idle and waiting for a disk
    return found
