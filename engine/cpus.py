"""The CPUs that this process may use: by its affinity, and by the quotas of its control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path


def allowed() -> set[int]:
    """Numbers of the CPUs that we may run on."""
    return os.sched_getaffinity(0)


def usable() -> int:
    """How many workers that compute can run at once: the CPUs that we may run on, or the quota if it is less.

    A part of a CPU counts as one: whoever gets half of it runs half of the time, and nobody leaves it unused.
    """
    limit = quota()
    count = len(allowed())
    return max(1, min(count, math.ceil(limit))) if limit else count


def quota(root: Path = Path("/sys/fs/cgroup"), cgroup: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs that the smallest quota above us allows, 0 when there is none."""
    try:
        lines = cgroup.read_text("utf-8").splitlines()
    except OSError:
        return 0.0
    found: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += [_quota_v2(folder / "cpu.max") for folder in _up(root, path)]
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu"):
                found += [_quota_v1(folder) for folder in _up(mount, path)]
    return min((one for one in found if one), default=0.0)


def _up(root: Path, path: str) -> list[Path]:
    """The folder of a control group and all above it; inside a namespace only the root may exist."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [root.joinpath(*parts[:k]) for k in range(len(parts), -1, -1)]


def _quota_v2(file: Path) -> float:
    try:
        told, period = file.read_text("ascii").split()
    except (OSError, ValueError):
        return 0.0
    return 0.0 if told == "max" else int(told) / int(period)


def _quota_v1(folder: Path) -> float:
    try:
        told_us = int((folder / "cpu.cfs_quota_us").read_text("ascii"))
        period_us = int((folder / "cpu.cfs_period_us").read_text("ascii"))
    except (OSError, ValueError):
        return 0.0
    return told_us / period_us if told_us > 0 and period_us > 0 else 0.0
