"""Runs the whole suite as several pytests at once: which file goes into which lane, and what became of each.

    python -m tests.support.lanes                          the lanes, then the tests marked `alone`
    python -m tests.support.lanes --beside 'make lint'     with other commands at the same time
    python -m tests.support.lanes --write                  and commit how long each file took

Most tests wait for something, so more lanes than CPUs are full. Lanes share nothing: each is a process with
servers, temporary folders and a cache of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = ROOT / "tests" / "seconds.json"
# A file that is not listed: short, or new.
UNLISTED_S = 1.0
PROGRESS_S = 30.0
STOP_S = 30.0
LIMIT_S = 1_500.0  # of one job: what hangs is to be told, not waited for


def suite(root: Path = ROOT) -> list[str]:
    """Every file that pytest would collect, relative to the root."""
    return sorted(str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py"))


def share_out(files: Sequence[str], seconds: Mapping[str, float], lanes: int) -> list[list[str]]:
    """Longest first, each to the lane that would end first; within a lane in pytest's own order."""
    shared: list[list[str]] = [[] for _ in range(lanes)]
    sums = [0.0] * lanes
    for name in sorted(files, key=lambda name: (-seconds.get(name, UNLISTED_S), name)):
        shortest = sums.index(min(sums))
        shared[shortest].append(name)
        sums[shortest] += seconds.get(name, UNLISTED_S)
    return [sorted(lane) for lane in shared if lane]


def with_lonely_tests(files: Sequence[str], root: Path = ROOT) -> list[str]:
    """Those that have a test marked `alone`."""
    return [name for name in files if "mark.alone" in (root / name).read_text("utf-8")]


@dataclass
class Job:
    """A command that runs, its output in a file until it has ended."""

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] = field(init=False)
    code: int | None = None

    def __post_init__(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: Ctrl-C comes once, from here, and its fixtures clean up.
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether it has; notes how."""
        if self.code is None:
            self.code = self.process.poll()
        return self.code is not None

    def told(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def progress(self) -> str:
        """`lane 1 45%`, from what pytest writes at the ends of its lines."""
        percent = re.findall(r"\[ *(\d+%)\]$", self.told(), re.M)
        return f"{self.name} {percent[-1] if percent else '...'}"

    def report(self) -> None:
        """What it has said, under one line that says how it went."""
        took_s = time.monotonic() - self.began
        went = "passed" if self.code == 0 else f"FAILED with {self.code}"
        print(f"\n===== {self.name}: {went} after {took_s:.0f} s\n{self.told().rstrip()}", flush=True)

    def stop(self) -> None:
        """As Ctrl-C would; by force when that does not help."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.code = self.process.wait()


def run_all(jobs: list[Job]) -> list[str]:
    """Wait for all, report each when it ends; the names of those that failed."""
    try:
        return list(_failing(jobs))
    finally:
        for job in jobs:
            if not job.ended:
                job.stop()
                job.report()


def _failing(jobs: Sequence[Job]) -> Iterator[str]:
    running, said = list(jobs), time.monotonic()
    while running:
        for job in [job for job in running if job.ended]:
            running.remove(job)
            job.report()
            if job.code != 0:
                yield job.name
        for job in running:
            if time.monotonic() - job.began > LIMIT_S:
                job.stop()
        if running and time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            print("...", ", ".join(job.progress() for job in running), flush=True)
        time.sleep(0.1)


def pytest_job(name: str, folder: Path, marks: str, files: Sequence[str]) -> Job:
    """One pytest in a folder of its own."""
    own = folder / name.replace(" ", "-")
    own.mkdir()
    command = [sys.executable, "-m", "pytest", "-m", marks, f"--basetemp={own / 'tests'}"]
    command += ["-o", f"cache_dir={own / 'cache'}", "-o", "junit_family=xunit1", f"--junitxml={own}.xml"]
    # What is killed cannot clear away its temporary files: they go with the folder.
    return Job(name, [*command, *files], Path(f"{own}.log"), {"TMPDIR": str(own)})


def durations(folder: Path) -> dict[str, float]:
    """Seconds that each test file took in the lanes, read from their reports."""
    found: defaultdict[str, float] = defaultdict(float)
    for report in folder.glob("lane-*.xml"):
        for case in ET.parse(report).iter("testcase"):
            found[case.attrib["file"]] += float(case.attrib["time"])
    return {name: round(took_s) for name, took_s in sorted(found.items()) if took_s > 1.5 * UNLISTED_S}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=(os.cpu_count() or 1) + 1, metavar="N")
    parser.add_argument("--beside", action="append", default=[], metavar="COMMAND", help="run this as well")
    parser.add_argument("--write", action="store_true", help=f"write {SECONDS.name} from what was measured")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Short, since sockets lie below it: a path of one has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="tqe-lanes-"))
    files = suite()
    lanes = share_out(files, json.loads(SECONDS.read_text()), options.lanes)
    print(f"{len(files)} test files in {len(lanes)} lanes; output comes when one ends", flush=True)
    jobs = [
        Job(command, shlex.split(command), folder / f"beside-{number}.log")
        for number, command in enumerate(options.beside)
    ]
    jobs += [
        pytest_job(f"lane {number}", folder, "not campaign and not alone", lane)
        for number, lane in enumerate(lanes, 1)
    ]
    failed = run_all(jobs)
    # What is promised within a time can be tested only where nothing else runs.
    failed += run_all([pytest_job("alone", folder, "alone and not campaign", with_lonely_tests(files))])
    if options.write and not failed:
        SECONDS.write_text(json.dumps(durations(folder), indent=1) + "\n")
    if failed:
        print(f"\nFAILED: {', '.join(failed)}; what they left is in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    print("\nall passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
