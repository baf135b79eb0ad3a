"""Metrics of the app's own over many processes: what dead ones counted is never lost, nor counted twice."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from tqe import settings
from tqe.telemetry import user_metrics
from tqe.telemetry.user_metrics import FoldUserMetrics, UserMetrics

# Above what Linux gives to any process.
DEAD = range(5_000_000, 5_001_000)


def write(
    folder: Path, kind: str, pid: int | str, value: float, *, name: str = "seen", stamp: float = 0.0
) -> None:
    book = MmapedDict(str(folder / f"{kind}_{pid}.db"))
    book.write_value(mmap_key(name, f"{name}_total", [], [], "Help."), value, stamp)
    book.close()


def total(folder: Path, name: str = "seen_total") -> float:
    """As a process that has just started to fold sees it."""
    samples = [one for metric in UserMetrics(folder).collect() for one in metric.samples]
    return sum(sample.value for sample in samples if sample.name == name)


def test_what_a_thousand_dead_processes_counted_is_one_file(tmp_path: Path) -> None:
    for pid in DEAD:
        write(tmp_path, "counter", pid, 2)
    write(tmp_path, "counter", os.getpid(), 5)
    found = UserMetrics(tmp_path)
    duty = FoldUserMetrics(found)
    folded = []
    while duty.next_in_s is not None or not folded:  # the steward has other duties in between
        folded.append(duty.run_once())
        assert total(tmp_path) == 2_005
    assert folded == [400, 400, 200]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"counter_{os.getpid()}.db",
        "counter_folded-3.db",
    ]
    assert found.fold() == 0
    write(tmp_path, "counter", DEAD[0], 1)  # the number of a process comes again
    found.fold()
    assert total(tmp_path) == 2_006
    assert (tmp_path / "counter_folded-4.db").exists() and not (tmp_path / "counter_folded-3.db").exists()


def test_each_kind_is_folded_in_its_way(tmp_path: Path) -> None:
    for number, pid in enumerate(DEAD[:3]):
        for kind in ("gauge_sum", "gauge_min", "gauge_max", "gauge_all", "gauge_livesum", "histogram"):
            write(tmp_path, kind, pid, number + 1, name=kind)
        write(tmp_path, "gauge_mostrecent", pid, number, name="gauge_mostrecent", stamp=10 - number)
    UserMetrics(tmp_path).fold()
    shown = {
        kind: total(tmp_path, f"{kind}_total")
        for kind in ("gauge_sum", "gauge_min", "gauge_max", "histogram")
    }
    assert shown == {"gauge_sum": 6, "gauge_min": 1, "gauge_max": 3, "histogram": 6}
    assert total(tmp_path, "gauge_mostrecent_total") == 0
    kept = {path.name.rpartition("_")[0] for path in tmp_path.iterdir()}
    assert not kept & {"gauge_all", "gauge_livesum"}


class Cut(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", range(12))
def test_a_fold_that_is_cut_off_anywhere_counts_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    for pid in DEAD[:3]:
        write(tmp_path, "counter", pid, 1)
    UserMetrics(tmp_path).fold()
    for pid in DEAD[:3]:
        write(tmp_path, "counter", pid, 1)
    left = step
    with monkeypatch.context() as patched:
        for name in ("rename", "unlink"):
            real = getattr(Path, name)

            def cut(self: Path, *args: object, real: object = real, **kwargs: object) -> object:
                nonlocal left
                if left == 0:
                    raise Cut
                left -= 1
                return real(self, *args, **kwargs)  # type: ignore[operator]

            patched.setattr(Path, name, cut)
        try:
            UserMetrics(tmp_path).fold()
        except Cut:
            pass
        else:
            assert step >= 8, "it was not cut off"
    assert total(tmp_path) == 6
    UserMetrics(tmp_path).fold()
    assert total(tmp_path) == 6
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_read_costs_itself(tmp_path: Path) -> None:
    write(tmp_path, "counter", DEAD[0], 3)
    (tmp_path / f"counter_{DEAD[1]}.db").write_bytes(b"\xff" * 64)
    found = UserMetrics(tmp_path)
    assert total(tmp_path) == 3
    found.fold()
    assert total(tmp_path) == 3


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """The folder is the user's own: a backup in it must not keep the steward from starting."""
    strange = ["counter_1.db.bak", "counter_folded-old.tmp.gz", "notes.tmp", "counter_folded-x.txt"]
    for name in strange:
        (tmp_path / name).write_bytes(b"?")
    write(tmp_path, "counter", DEAD[0], 3)
    assert UserMetrics(tmp_path).fold() == 1
    assert total(tmp_path) == 3
    assert {path.name for path in tmp_path.iterdir()} == {*strange, "counter_folded-1.db"}


def test_a_folder_that_is_not_ours_to_write_is_told_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "counter", DEAD[0], 3)
    (tmp_path / "counter_folded-1.tmp").touch()  # of a fold that was cut off

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    told: list[str] = []
    monkeypatch.setattr(user_metrics, "_log", SimpleNamespace(warning=told.append))
    found = UserMetrics(tmp_path)
    assert len(told) == 1 and "cannot be put in order" in told[0]
    assert [metric.name for metric in found.collect()] == ["seen"]


def test_a_file_that_goes_away_in_between_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "counter", DEAD[0], 3)
    found = UserMetrics(tmp_path)
    real = Path.glob

    def glob(self: Path, pattern: str) -> Iterator[Path]:
        yield from real(self, pattern)
        yield self / f"counter_{DEAD[1]}.db"  # its process ended, and somebody has folded it

    monkeypatch.setattr(Path, "glob", glob)
    assert [one.value for metric in found.collect() for one in metric.samples] == [3]


def test_names_of_the_engine_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "counter", DEAD[0], 3, name="taskqueue_jobs_completed")
    write(tmp_path, "counter", DEAD[1], 3)
    assert [metric.name for metric in UserMetrics(tmp_path).collect()] == ["seen"]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    yield


def test_the_folder_goes_away_with_who_made_it(clean: None) -> None:
    before = values.ValueClass
    with user_metrics.shared_folder():
        folder = settings.metrics_folder()
        assert folder is not None and folder.is_dir() and values.ValueClass is not before
        code = "import prometheus_client as p; p.Counter('seen', 'Help.').inc(4)"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert total(folder) == 4
    assert not folder.exists() and settings.metrics_folder() is None and values.ValueClass is before


def test_what_a_killed_supervisor_left_is_removed_by_the_next(
    clean: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, lock = user_metrics._make_folder()
    write(left, "counter", DEAD[0], 1)
    os.close(lock)  # as its death would
    used, lock = user_metrics._make_folder()
    foreign = tmp_path / "tqe-metrics-of-an-older-version"
    foreign.mkdir()
    with user_metrics.shared_folder():
        assert not left.exists() and used.exists() and foreign.exists()
        own = settings.metrics_folder()
        user_metrics._sweep()
        assert own is not None and own.exists()
    os.close(lock)
    with user_metrics.shared_folder():
        assert set(tmp_path.iterdir()) == {foreign, settings.metrics_folder()}


def test_a_folder_of_the_users_own_stays(
    clean: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with user_metrics.shared_folder():
        assert settings.metrics_folder() == tmp_path
        assert user_metrics.of_this_process() is not None
    assert tmp_path.exists()
