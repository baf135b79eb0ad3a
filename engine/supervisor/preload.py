"""Whether the app may be imported before the fork, and that import."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tqe.supervisor import process
from tqe.telemetry import logs, procfs

_log = logs.get("supervisor")


def load(app_path: str, load_app: Callable[[str], Any]) -> Any | None:
    """Import the app here, or answer None when each worker should import it for itself.

    Threads do not survive a fork, but the locks that they held do; connections are shared by all children.
    What the import leaves behind is found out in a throw-away child, as it cannot be undone.
    """

    def look() -> bytes:
        threads, sockets = len(procfs.thread_names()), procfs.inet_sockets()
        load_app(app_path)
        names = procfs.thread_names()
        return json.dumps(
            {"threads": names[threads:], "sockets": max(0, procfs.inet_sockets() - sockets)}
        ).encode()

    answer = process.probe(look)
    if answer is not None:
        left = json.loads(answer)
        if left["threads"] or left["sockets"]:
            _log.warning(
                f"importing {app_path} leaves {_counted(left)}, which no fork survives:"
                " each worker imports it for itself (--no-preload says so without this check)"
            )
            return None
    return load_app(app_path)


def _counted(left: dict[str, Any]) -> str:
    found = []
    if left["threads"]:
        found.append(f"{len(left['threads'])} threads ({', '.join(sorted(set(left['threads'])))})")
    if left["sockets"]:
        found.append(f"{left['sockets']} network connections")
    return " and ".join(found)
