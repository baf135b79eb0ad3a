"""The fingerprint of a measurement: machine, versions and settings, without which figures mean nothing."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from tqe import __version__, codec

_LIBRARIES: Final = ("redis", "hiredis", "msgspec", "uvloop", "zstandard")


def machine(folder: Path) -> dict[str, Any]:
    """What runs here; `folder` is where Redis writes its log."""
    cpus = sorted(os.sched_getaffinity(0))
    return {
        "cpu": _cpu_model(),
        "cores": len(cpus),
        "cores_of_machine": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual": _virtual(),
        "file_system": _file_system(folder),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def versions(redis: str) -> dict[str, str]:
    found = {
        "tqe": __version__,
        "codec": codec.BACKEND,
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}",
        "compiler": platform.python_compiler(),
        "redis_server": redis,
        "kernel": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}",
        "os": _os_name(),
    }
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text("utf-8", "replace").strip() or None
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_line("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.machine()


def _virtual() -> bool | None:
    text = _line("/proc/cpuinfo")
    return None if text is None else " hypervisor" in text


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _file_system(folder: Path) -> str | None:
    """Type of the file system that holds the folder: an AOF on tmpfs never waits for a disk."""
    best, kind = "", None
    inside = str(folder.resolve())
    for line in (_line("/proc/self/mounts") or "").splitlines():
        fields = line.split()
        if len(fields) > 2:
            at = fields[1].rstrip("/")
            if (inside == at or inside.startswith(f"{at}/")) and len(at) >= len(best):
                best, kind = at, fields[2]
    return kind
