"""Owns the throw-away child that loads a new model first: a damaged one kills whatever process holds it.

`python -m tqe.ml.canary FOLDER` reads, loads and scores the reference rows; it exits with 0 when all is
well. A signal, a hang or another code means that no worker may touch that model. The history is none of
its business: it takes seconds to read where it is large, and the child has two.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tqe.ml import HostError, ModelError, model

LIMIT_S: Final = 2.0
HOST_EXIT: Final = 75  # of a child that this host leaves without what it needs


def passes(folder: Path, *, limit_s: float = LIMIT_S, command: Sequence[str] | None = None) -> str:
    """Empty when a child survived the model in `folder`, else the reason why not. `command` stands in for the
    child in tests. Raises HostError where that is this host's trouble and not the model's."""
    argv = command or (sys.executable, "-m", __name__, str(folder))
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the canary had not finished after {limit_s:g} s"
    except OSError as e:
        raise HostError(f"the canary could not be started: {e}") from e
    if done.returncode == 0:
        return ""
    # What is killed so was killed from outside: where memory ends, by the system.
    if done.returncode in (HOST_EXIT, -signal.SIGKILL):
        raise HostError("the canary was killed from outside, or this host gave it no memory or no files")
    if done.returncode < 0:
        return f"the canary was killed by signal {-done.returncode}"
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"the canary refused the model: {said[-1][:200] if said else f'exit code {done.returncode}'}"


class Gatekeeper:
    """Lets models in: hash, canary, load. Remembers what it refused, so that no hash is tried twice."""

    def __init__(self, *, limit_s: float = LIMIT_S, command: Sequence[str] | None = None) -> None:
        self.banned: dict[str, str] = {}  # hash -> reason
        self._limit_s = limit_s
        self._command = command

    def admit(self, folder: Path) -> model.Files:
        """The checked files of a version that a child has survived. Raises ModelError with the reason,
        HostError where it is this host's."""
        files = model.read(folder)
        sha256 = files.manifest.sha256
        if sha256 in self.banned:
            raise ModelError(f"this model was refused before: {self.banned[sha256]}")
        if files.model is not None:
            reason = passes(folder, limit_s=self._limit_s, command=self._command)
            if reason:
                self.banned[sha256] = reason
                raise ModelError(reason)
        return files


def main(folder: str) -> None:
    """The child."""
    try:
        manifest, text = model.read_model(Path(folder))
        if text is not None:
            model.open_model(manifest, text).close()
    except (HostError, MemoryError):
        sys.exit(HOST_EXIT)
    except ModelError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main(sys.argv[1])
