"""What Linux tells about processes: state, memory, threads and open sockets, as numbers."""

import os
from pathlib import Path
from typing import Final

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def state(pid: int) -> str:
    """The process' state letter (R, S, D, T, t, Z, X …); '' when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # The name stands in parentheses and may itself hold spaces and parentheses: the last one ends it.
    return stat.rpartition(b")")[2].split()[0].decode("ascii")


def rss_bytes(pid: int | None = None) -> int:
    """Resident memory of a process (this one by default), 0 when there is no such process."""
    try:
        statm = Path(f"/proc/{pid or 'self'}/statm").read_text("ascii")
    except OSError:
        return 0
    return int(statm.split()[1]) * _PAGE_BYTES


def thread_names() -> list[str]:
    """Names of this process' threads as the kernel knows them, the main one first."""
    found = []
    for task in sorted(Path("/proc/self/task").iterdir(), key=lambda path: int(path.name)):
        try:
            found.append((task / "comm").read_text("utf-8", "replace").strip())
        except OSError:
            continue  # it ended meanwhile
    return found


def inet_sockets() -> int:
    """How many TCP and UDP sockets this process has open."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    if not inodes:
        return 0
    found = 0
    for table in ("tcp", "tcp6", "udp", "udp6"):
        try:
            lines = Path(f"/proc/self/net/{table}").read_text("ascii", "replace").splitlines()[1:]
        except OSError:
            continue
        found += sum(1 for line in lines if len(line.split()) > 9 and line.split()[9] in inodes)
    return found
