"""Proves the process control with processes that are no engine: pids, states, deaths, stops."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.journal import FaultLog, load
from tests.chaos.procs import TqeRun, alive, children, processes_of, send, state, wait_gone
from tests.support.waiting import wait_until

# A supervisor in miniature: a memfd that looks like a board, two workers and a steward that ignore SIGTERM.
FAKE = """
import ctypes, os, signal, sys, time
from tqe.board import layout
fd = os.memfd_create("tqe-board")
def word(at, value):
    os.pwrite(fd, value.to_bytes(8, "little"), at)
def child():
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return pid
steward = child()
workers = [child(), child()]
for number, pid in enumerate(workers):
    slot = layout.HEADER_BYTES + number * layout.CONTROL_BYTES
    word(slot + layout.C_PID, pid)
    word(slot + layout.C_STATE, layout.LIVE)
    word(slot + layout.C_READY, 1)
word(layout.H_SLOTS, 2)
word(layout.H_SLOT_BYTES, layout.CONTROL_BYTES)
word(layout.H_STEWARD_PID, steward)
word(layout.H_MAGIC, layout.MAGIC)
def stop(*_):
    for pid in [*workers, steward]:
        os.kill(pid, signal.SIGKILL)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
while True:
    time.sleep(600)
"""


class FakeRun(TqeRun):
    def __init__(self, folder: Path) -> None:
        super().__init__("unix:///nowhere", folder, FaultLog(folder), procs=2)
        self._command = [sys.executable, "-c", FAKE]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[FakeRun]:
    made = FakeRun(tmp_path)
    made.start()
    yield made
    made.close()


def test_roles_are_told_apart(run: FakeRun) -> None:
    assert run.steward() in children(run.pid)
    assert len(run.workers()) == 2
    assert sorted([*run.workers(), run.steward()]) == sorted(run.children())


def test_killed_worker_is_gone_and_on_the_timeline(run: FakeRun, tmp_path: Path) -> None:
    pid = run.kill_worker(random.Random(1))
    assert pid and not alive(pid)
    assert len(run.workers()) == 1
    fault = load(tmp_path).faults[0]
    assert (fault.kind, fault.pids) == ("kill", (pid,))
    assert 0 < fault.t_ns <= fault.until_ns


def test_killed_steward_is_no_worker(run: FakeRun, tmp_path: Path) -> None:
    steward, workers = run.steward(), run.workers()
    assert run.kill_steward() == steward
    assert (run.steward(), run.workers()) == (0, workers)
    assert [fault.kind for fault in load(tmp_path).faults] == ["kill_steward"]


def test_killed_supervisor_names_its_workers(run: FakeRun, tmp_path: Path) -> None:
    workers = run.workers()
    assert len(processes_of(tmp_path)) == 4
    assert run.kill_supervisor() == workers
    assert processes_of(tmp_path) == []
    fault = load(tmp_path).faults[0]
    assert (fault.kind, sorted(fault.pids)) == ("kill_host", workers)


def test_stopped_process_stands_still_and_goes_on(run: FakeRun, tmp_path: Path) -> None:
    pid = run.workers()[0]
    with run.stopped(pid):
        assert state(pid) == "T"
    wait_until(lambda: state(pid) in "SR")
    fault = load(tmp_path).faults[0]
    assert (fault.kind, fault.pids) == ("stop", (pid,))
    assert fault.t_ns < fault.until_ns


def test_terminated_run_answers_with_its_code(run: FakeRun, tmp_path: Path) -> None:
    workers = run.workers()
    assert run.stop() == 0
    wait_gone(workers)
    assert load(tmp_path).faults[0].pids == tuple(workers)


def test_run_that_ends_at_start_says_why(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run._command = [sys.executable, "-c", "print('no such app'); raise SystemExit(1)"]
    with pytest.raises(AssertionError, match="no such app"):
        run.start()
    run.close()


def test_a_process_that_nobody_waited_for_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: state(process.pid) == "Z")
    assert not alive(process.pid)
    process.wait()
    assert state(process.pid) == "" and not send(process.pid, signal.SIGCONT)
