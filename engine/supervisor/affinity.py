"""Which worker runs on which CPU, decided once at start, with the reason.

Pinning helps only who owns the CPUs. In a container with a quota every neighbour sees all CPUs of the
host, and ten of them would pin to the same few; with more workers than CPUs pins only get in the scheduler's
way. Redis and the steward are never pinned.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    quota = cpu_quota() if quota is None else quota
    if quota:
        return Pins((), f"not pinned: a quota of {quota:g} CPUs is set, so the CPUs are shared with others")
    if procs > len(allowed):
        return Pins((), f"not pinned: {procs} workers are more than the {len(allowed)} allowed CPUs")
    cpus = sorted(allowed) if procs == len(allowed) else least_loaded(allowed, stat)
    chosen = tuple(sorted(cpus[:procs]))
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


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), cgroup: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs that the smallest quota above us allows, 0 when there is none."""
    try:
        lines = cgroup.read_text("utf-8").splitlines()
    except OSError:
        return 0.0
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            quotas += [_quota_v2(folder / "cpu.max") for folder in _up(root, path)]
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu"):
                quotas += [_quota_v1(folder) for folder in _up(mount, path)]
    return min((quota for quota in quotas if quota), default=0.0)


def _up(root: Path, path: str) -> list[Path]:
    """The folder of a control group and all above it; inside a namespace only the root may exist."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [root.joinpath(*parts[:k]) for k in range(len(parts), -1, -1)]


def _quota_v2(file: Path) -> float:
    try:
        quota, period = file.read_text("ascii").split()
    except (OSError, ValueError):
        return 0.0
    return 0.0 if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text("ascii"))
        period = int((folder / "cpu.cfs_period_us").read_text("ascii"))
    except (OSError, ValueError):
        return 0.0
    return quota / period if quota > 0 and period > 0 else 0.0
