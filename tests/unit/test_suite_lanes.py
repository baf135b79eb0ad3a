"""The suite in lanes: each file in one of them, the longest apart, and no failure that is not told."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import lanes
from tests.support.lanes import Job, run_all, share_out
from tests.support.waiting import wait_until

TABLE: dict[str, float] = json.loads(lanes.SECONDS.read_text())


@pytest.mark.parametrize("count", [1, 2, 3, 8, 1_000])
def test_each_file_is_in_exactly_one_lane(count: int) -> None:
    shared = share_out(lanes.suite(), TABLE, count)
    found = Counter(name for lane in shared for name in lane)
    assert found == Counter(dict.fromkeys(lanes.suite(), 1)) and all(shared)
    assert str(Path(__file__).relative_to(lanes.ROOT)) in found


def test_what_pytest_collects_and_what_the_lanes_have_is_the_same(pytestconfig: pytest.Config) -> None:
    tests = lanes.ROOT / "tests"
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert pytestconfig.getini("python_files") == ["test_*.py", "*_test.py"]
    assert list(tests.rglob("*_test.py")) == []
    # A test is marked where it stands: the last run is given only files that do so.
    marking = {path.name for path in tests.rglob("*.py") if "mark.alone" in path.read_text()}
    assert {name for name in marking if not name.startswith("test_")} == {"lanes.py"}


def test_the_table_names_files_that_there_are() -> None:
    assert TABLE.keys() <= set(lanes.suite())


def test_the_longest_are_apart_and_what_is_not_listed_goes_to_the_shortest() -> None:
    seconds = {"a": 90.0, "b": 50.0, "c": 30.0, "d": 5.0}
    assert share_out(["a", "b", "c", "d", "new"], seconds, 2) == [["a"], ["b", "c", "d", "new"]]
    assert share_out(["a", "b", "c", "d", "new"], seconds, 3) == [["a"], ["b"], ["c", "d", "new"]]


def python(name: str, folder: Path, code: str) -> Job:
    return Job(name, [sys.executable, "-c", code], folder / f"{name}.log")


def test_all_that_failed_is_named_and_all_that_was_said_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {"good": 0, "bad": 1, "empty": 5, "worse": 3}
    code = "print('I am {}'); raise SystemExit({})"
    jobs = [python(name, tmp_path, code.format(name, number)) for name, number in codes.items()]
    assert sorted(run_all(jobs)) == ["bad", "empty", "worse"]
    said = capsys.readouterr().out
    assert all(f"I am {name}" in said for name in codes)
    assert "good: passed" in said and "empty: FAILED with 5" in said


def test_an_interrupt_stops_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = python("long", tmp_path, "import time; print('began', flush=True); time.sleep(1000)")

    def interrupted(jobs: list[Job]) -> list[str]:
        wait_until(lambda: "began" in job.told(), 20)
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "_failing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([job])
    assert job.process.returncode is not None
    assert "long: FAILED" in capsys.readouterr().out


def test_what_hangs_is_stopped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lanes, "LIMIT_S", 0.2)
    assert run_all([python("stuck", tmp_path, "import time; time.sleep(1000)")]) == ["stuck"]
    assert "stuck: FAILED" in capsys.readouterr().out
