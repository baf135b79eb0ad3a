"""Owns the processes of a campaign: a real `tqe run`, who its children are, and what is done to them by pid.

Roles are read from outside: children from /proc, who is the steward and which workers are ready from the
board (docs/WIRE_FORMAT.md, section 6). Every deed goes to the fault timeline, with a stamp from before it
and one from when its effect was seen; whoever is hit is named by pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.chaos.journal import FaultLog, now_ns
from tests.support.waiting import wait_until
from tqe.board import layout

ROOT = Path(__file__).resolve().parents[2]
TQE = str(Path(sys.executable).with_name("tqe"))
APP = "tests.chaos.app:app"
JOURNAL_VARIABLE = "CHAOS_JOURNAL"


def python_path() -> str:
    """Where a child finds this package; whatever came first for us comes first for it."""
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)]))


# ---- any process


def children(pid: int) -> list[int]:
    """Direct children, dead ones that nobody has waited for left out."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if alive(child)]


def state(pid: int) -> str:
    """The letter of /proc: R S D T Z …; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text[text.rindex(")") + 2]


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def send(pid: int, number: signal.Signals) -> bool:
    """False when the process was gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_gone(pids: Sequence[int], timeout: float = 10.0) -> None:
    wait_until(lambda: not any(alive(pid) for pid in pids), timeout, f"processes {list(pids)} end")


def processes_of(folder: Path) -> list[int]:
    """Everything that was started for this run's folder, whoever its parent is by now."""
    mark = f"{JOURNAL_VARIABLE}={folder}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes() and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


# ---- tqe run


class TqeRun:
    """One supervisor with its workers and its steward."""

    def __init__(
        self,
        redis_url: str,
        folder: Path,
        faults: FaultLog,
        *,
        procs: int = 2,
        lease_s: float = 2.0,
        grace_s: float = 5.0,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.faults = faults
        self.procs = procs
        self.grace_s = grace_s
        self.log = folder / f"run-{now_ns()}.log"
        self._command = [TQE, "run", APP, "--procs", str(procs)]
        self._command += ["--redis", redis_url, "--lease", f"{lease_s:g}", "--grace", f"{grace_s:g}"]
        self._command += ["--no-pin", *args]
        self._env = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
            "TQE_DATA_DIR": str(folder / "data"),
            JOURNAL_VARIABLE: str(folder),
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._board: Path | None = None

    # ---- life

    def start(self, timeout: float = 20.0) -> Self:
        self._board = None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        wait_until(self._started, timeout, f"`tqe run` has {self.procs} workers and a steward")
        return self

    def _started(self) -> bool:
        if not self.running:
            raise AssertionError(f"`tqe run` ended with {self.exit_code} at start:\n{self.text()[-4000:]}")
        return self.steward() != 0 and len(self.ready()) >= self.procs

    @property
    def pid(self) -> int:
        assert self._process is not None, "`tqe run` was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def wait(self, timeout: float = 30.0) -> int:
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"`tqe run` goes on after {timeout} s:\n{self.text()[-4000:]}") from None

    def close(self) -> None:
        """Whatever state it is in: nothing stays behind."""
        if self._process is None:
            return
        family = [*self.children(), self.pid]
        for pid in family:
            send(pid, signal.SIGKILL)
        self._process.wait(10)
        wait_gone(family[:-1])

    # ---- roles

    def children(self) -> list[int]:
        return children(self.pid)

    def steward(self) -> int:
        """Its pid as the supervisor wrote it on the board; 0 while there is none."""
        pid = self._word(layout.H_STEWARD_PID)
        return pid if pid and alive(pid) else 0

    def workers(self) -> list[int]:
        steward = self.steward()
        return sorted(pid for pid in self.children() if pid != steward)

    def ready(self) -> list[int]:
        """Workers that have registered; the others die of a kill without having held anything."""
        found = []
        for number in range(self._word(layout.H_SLOTS)):
            slot = layout.HEADER_BYTES + number * self._word(layout.H_SLOT_BYTES)
            if self._word(slot + layout.C_READY) and self._word(slot + layout.C_STATE) == layout.LIVE:
                found.append(self._word(slot + layout.C_PID))
        return sorted(pid for pid in found if alive(pid))

    def _word(self, at: int) -> int:
        """A word of the board, 0 while there is none."""
        board = self._find_board()
        try:
            if board is None:
                return 0
            with board.open("rb") as file:
                file.seek(at)
                return int.from_bytes(file.read(layout.WORD), "little")
        except OSError:
            return 0

    def _find_board(self) -> Path | None:
        if self._board is None:
            magic = layout.MAGIC.to_bytes(layout.WORD, "little")
            with contextlib.suppress(OSError):
                for fd in Path(f"/proc/{self.pid}/fd").iterdir():
                    if "memfd:" in os.readlink(fd):
                        with fd.open("rb") as file:
                            if file.read(layout.WORD) == magic:
                                self._board = fd
        return self._board

    def family(self) -> list[int]:
        return [self.pid, *self.children()]

    # ---- deeds

    def kill_worker(self, rng: random.Random) -> int:
        """SIGKILL one of the ready workers; 0 when there is none at the moment."""
        workers = self.ready()
        if not workers:
            return 0
        pid = rng.choice(workers)
        began = now_ns()
        if not send(pid, signal.SIGKILL):
            return 0
        wait_gone([pid])
        self.faults.record("kill", [pid], t_ns=began, until_ns=now_ns())
        return pid

    def kill_steward(self) -> int:
        pid, began = self.steward(), now_ns()
        if not pid or not send(pid, signal.SIGKILL):
            return 0
        wait_gone([pid])
        self.faults.record("kill_steward", [pid], t_ns=began, until_ns=now_ns())
        return pid

    def kill_supervisor(self) -> list[int]:
        """SIGKILL the parent alone; the kernel ends its children, and the board is gone with them."""
        family, workers, began = self.children(), self.workers(), now_ns()
        send(self.pid, signal.SIGKILL)
        self.wait()
        wait_gone(family)
        self.faults.record("kill_host", workers, t_ns=began, until_ns=now_ns(), supervisor=self.pid)
        return workers

    @contextlib.contextmanager
    def stopped(self, pid: int, kind: str = "stop") -> Iterator[None]:
        """SIGSTOP for the time of the block; `kind` steward_stop may cost every worker its lease."""
        began = now_ns()
        assert send(pid, signal.SIGSTOP), f"process {pid} is gone"
        wait_until(lambda: state(pid) in ("T", ""), 5, f"process {pid} is stopped")
        try:
            yield
        finally:
            until = now_ns()
            send(pid, signal.SIGCONT)
            self.faults.record(kind, [pid], t_ns=began, until_ns=until)

    def terminate(self) -> None:
        """SIGTERM to the supervisor; workers that are in a job longer than the grace are cut short."""
        workers, began = self.workers(), now_ns()
        send(self.pid, signal.SIGTERM)
        self.faults.record("term", workers, t_ns=began)

    def stop(self) -> int:
        """Terminate and wait; answers with the exit code."""
        self.terminate()
        return self.wait(self.grace_s + 30)


# ---- other commands


def tqe(*args: str, redis_url: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    """One run of the command line, as a user would."""
    command = [TQE, *args, "--redis", redis_url]
    env = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def status(redis_url: str) -> dict[str, Any]:
    done = tqe("status", "--json", redis_url=redis_url)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
