"""Proves that the campaigns can fail: a copy of the engine without one protection must turn one of them red.

A mutant whose text is not found any more fails too: then the protection has moved, and the mutant with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tqe
from tests.chaos.procs import ROOT

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(300)]
CAMPAIGN, LOST = "tests/chaos/test_campaign.py::", "tests/chaos/test_lost_replies.py::"


@dataclass(frozen=True)
class Mutant:
    """One protection less."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, package: Path) -> None:
        path = package / self.file
        text = path.read_text()
        assert self.old in text, f"{self.file} has changed: where is this protection now?\n{self.old}"
        path.write_text(text.replace(self.old, self.new))


MUTANTS = [
    Mutant(
        "an incarnation without its lease still settles",
        "lua/settle.lua",
        "if call('HDEL', processing, lease) ~= 1 then",
        "if call('HDEL', processing, lease) < 0 then",
        LOST + "test_each_script_may_lose_a_command[late]",
    ),
    Mutant(
        "a repeated enqueue pushes again",
        "lua/enqueue.lua",
        "if not (have and have[j - first + 1]) then",
        "if true then",
        LOST + "test_each_script_may_lose_a_command[reply]",
    ),
    Mutant(
        "a takeover leaves the old hash in place",
        "lua/takeover.lua",
        "redis.call('RENAME', KEYS[3], KEYS[4])",
        "redis.call('HSET', KEYS[4], unpack(redis.call('HGETALL', KEYS[3])))",
        CAMPAIGN + "test_killed_workers_lose_nothing_and_one_job_a_kill_runs_again[short]",
    ),
    Mutant(
        "recovery does not read the board",
        "steward/recovery.py",
        "rows = slot.rows() if trust_board else []",
        "rows: list[Row] = []",
        CAMPAIGN + "test_killed_workers_lose_nothing_and_one_job_a_kill_runs_again[short]",
    ),
    Mutant(
        "a reaper believes the lease end alone",
        "steward/reaper.py",
        "and watch.seen_ns >= context.settings.lease_ms * MS",
        "and watch.seen_ns >= 0",
        CAMPAIGN + "test_silent_redis_costs_no_lease[short]",
    ),
    Mutant(
        "children outlive their parent",
        "supervisor/process.py",
        "_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)",
        "pass",
        CAMPAIGN + "test_killed_supervisor_takes_its_children_along_and_others_reap_it[short]",
    ),
    Mutant(
        "a stopped worker is renewed for ever",
        "steward/renewal.py",
        "if state in _STOPPED:",
        "if state in ():",
        CAMPAIGN + "test_frozen_worker_wakes_after_its_lease_and_changes_nothing[short]",
    ),
]


def copy_of_the_package(folder: Path) -> Path:
    assert tqe.__file__ is not None
    package = folder / "tqe"
    shutil.copytree(Path(tqe.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def run_on(package: Path, test: str) -> subprocess.CompletedProcess[str]:
    # Before the installed one: what stands on PYTHONPATH is found first, also by every `tqe run`.
    path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS}))
def test_the_copy_itself_is_sound(tmp_path: Path, test: str) -> None:
    done = run_on(copy_of_the_package(tmp_path), test)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-6000:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_missing_protection_is_noticed(tmp_path: Path, mutant: Mutant) -> None:
    package = copy_of_the_package(tmp_path)
    mutant.apply(package)
    done = run_on(package, mutant.test)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-6000:]
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("E  "))[:2000])
