"""Owns the metrics that an app defines with prometheus-client: the folder that its processes share, in which
the files of dead ones are folded into one.

The library gives each process files of its own and adds them up at a scrape, also those of processes that are
gone: a counter must not fall when its worker dies. After a thousand deaths a scrape would read thousands of
files, so what dead processes left is added up once, in steps that may be cut off anywhere: files to be folded
are first renamed to carry the number of the fold (they end with `.db.7`), then their sum with the last one
(`…_folded-6.db`) becomes `…_folded-7.db` in one rename, then they are deleted. A file that carries a number
up to that of the fold that is there has been counted; one that carries the next has not.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from prometheus_client import values
from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from tqe import settings
from tqe.telemetry import logs
from tqe.telemetry.metrics import PREFIX

_log = logs.get("metrics")

_FOLDER: Final = "tqe-metrics-"
_OWNER: Final = "owner.lock"

# The library's own way of storing, which it does not annotate.
_Book: Final[Any] = MmapedDict
_merge: Final[Any] = MultiProcessCollector.merge
_make_value_class: Final[Any] = values.MultiProcessValue

# In one run, and in one hold of the lock that scrapes wait for: the steward has leases to renew.
FOLDED_MAX: Final = 400
AGAIN_S: Final = 0.2  # when more is left

# Beginnings of files' names, and how two values become one. Of gauges that tell of one process each, or of
# live ones only, nothing is kept.
_FOLDS: Final = {
    "counter": "sum",
    "histogram": "sum",
    "summary": "sum",
    "gauge_sum": "sum",
    "gauge_min": "min",
    "gauge_max": "max",
    "gauge_mostrecent": "mostrecent",
}
# The files of a fold. Others' may lie beside them: `counter_1.db.bak` is none of ours.
_PART: Final = re.compile(
    rf"(?P<kind>{'|'.join(_FOLDS)})_"
    r"(?:folded-(?P<fold>\d+)\.db|(?P<left>folded-\d+\.tmp)|.+\.db\.(?P<taken>\d+))"
)


@contextmanager
def shared_folder() -> Iterator[None]:
    """Meanwhile metrics that are made here and in our children share a folder, which goes away at the end.

    One that the user has set (PROMETHEUS_MULTIPROC_DIR) is used as it is, and stays.
    """
    if settings.metrics_folder() is not None:
        yield
        return
    _sweep()
    folder, lock = _make_folder()
    # The library decides at its import, which may have been before.
    before = values.ValueClass
    settings.set_metrics_folder(folder)
    values.ValueClass = _make_value_class()
    try:
        yield
    finally:
        values.ValueClass = before
        settings.set_metrics_folder(None)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_folder() -> tuple[Path, int]:
    """A new folder, and the file whose lock tells others that we or a child of ours may still use it."""
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    made = folder / f"{_OWNER}.new"
    lock = os.open(made, os.O_WRONLY | os.O_CREAT, 0o600)
    # A file system without locks: then nobody ever sweeps it.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(folder / _OWNER)  # only now: a sweep must not meet it before it is locked
    return folder, lock


def _sweep() -> None:
    """Remove what supervisors that were killed have left. Their locks ended with them, whereas their numbers
    may be another process' by now, or mean nothing here: containers may share a folder for temporary files.
    """
    for owner in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*/{_OWNER}"):
        with suppress(OSError):  # it is in use, another user's, or gone since we looked
            lock = os.open(owner, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # it may be anything
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)
            finally:
                os.close(lock)


class UserMetrics:
    """The metrics of the processes that share a folder. Threads may share it; one process folds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._told: set[str] = set()
        with self._lock:
            try:
                self._recover()
            except OSError as e:  # a steward renews leases, whatever lies in this folder
                self._tell(str(folder), f"the app's metrics in {folder} cannot be put in order: {e}")

    def collect(self) -> list[Metric]:
        """What all processes have counted, dead ones too; never raises for what is in a file."""
        with self._lock:
            files = [str(path) for path in self._folder.glob("*.db")]
            try:
                found = list(_merge(files))
            except Exception:  # of a process that was killed within a write, say
                found = list(_merge([file for file in files if self._values(file)]))
        return [metric for metric in found if not self._is_ours(metric.name)]

    def fold(self) -> int:
        """Fold what dead processes left, at most FOLDED_MAX files; how many that were."""
        with self._lock:
            last = self._recover()
            dead: dict[str, list[Path]] = {}
            left = FOLDED_MAX
            for path in self._folder.glob("*.db"):
                kind, _, pid = path.stem.rpartition("_")
                if left and pid.isdecimal() and not Path("/proc", pid).exists():
                    dead.setdefault(kind, []).append(path)
                    left -= 1
            for kind, paths in dead.items():
                if kind not in _FOLDS:
                    for path in paths:
                        path.unlink(missing_ok=True)
                    continue
                number = last.get(kind, 0) + 1
                taken = [path.rename(path.with_name(f"{path.name}.{number}")) for path in paths]
                self._finish(kind, number, taken, last)
            return sum(len(paths) for paths in dead.values())

    # -- a fold's steps

    def _recover(self) -> dict[str, int]:
        """Finish or clear away what was cut off; the number of each kind's last fold."""
        folded: dict[str, set[int]] = {}
        taken: dict[tuple[str, int], list[Path]] = {}
        # One look at the folder: there may be thousands of files.
        for name in os.listdir(self._folder):
            part = _PART.fullmatch(name)
            if part is None:
                continue
            if part["left"]:
                (self._folder / name).unlink(missing_ok=True)
            elif part["fold"]:
                folded.setdefault(part["kind"], set()).add(int(part["fold"]))
            else:
                taken.setdefault((part["kind"], int(part["taken"])), []).append(self._folder / name)
        last = {kind: max(numbers) for kind, numbers in folded.items()}
        for kind, numbers in folded.items():
            for number in numbers - {last[kind]}:
                self._folded(kind, number).unlink(missing_ok=True)
        for kind, number in sorted(taken):
            self._finish(kind, number, taken[kind, number], last)
        return last

    def _finish(self, kind: str, number: int, taken: Sequence[Path], last: dict[str, int]) -> None:
        before = last.get(kind, 0)
        if number > before:
            old = [self._folded(kind, before)] if before else []
            made = self._folder / f"{kind}_folded-{number}.tmp"
            self._write(made, kind, [*old, *taken])
            made.rename(self._folded(kind, number))
            last[kind] = number
            taken = [*old, *taken]
        for path in taken:
            path.unlink(missing_ok=True)

    def _write(self, made: Path, kind: str, paths: Iterable[Path]) -> None:
        total: dict[str, tuple[float, float]] = {}
        for path in paths:
            for key, value, stamp, _ in self._values(str(path)):
                known = total.get(key)
                total[key] = (value, stamp) if known is None else _one(_FOLDS[kind], known, (value, stamp))
        target = _Book(str(made))
        try:
            for key, (value, stamp) in total.items():
                target.write_value(key, value, stamp)
        finally:
            target.close()

    def _folded(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}_folded-{number}.db"

    # -- what is left out

    def _values(self, file: str) -> list[Any]:
        """What stands in a file; nothing if it cannot be read."""
        try:
            if Path(file).stat().st_size:  # else its process is just making it
                return list(_Book.read_all_values_from_file(file))
        except FileNotFoundError:
            pass
        except Exception as e:
            self._tell(file, f"the metrics in {Path(file).name} cannot be read and are left out: {e}")
        return []

    def _is_ours(self, name: str) -> bool:
        """Two metrics of one name would make the whole page unreadable."""
        if not name.startswith(PREFIX):
            return False
        self._tell(name, f"the app's metric {name} is left out: names with {PREFIX} are the engine's")
        return True

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.warning(text)


class FoldUserMetrics:
    """The duty that folds."""

    name = "user_metrics"
    period_s = 5.0

    def __init__(self, metrics: UserMetrics) -> None:
        self._metrics = metrics
        self.next_in_s: float | None = None

    def run_once(self) -> int:
        folded = self._metrics.fold()
        self.next_in_s = AGAIN_S if folded >= FOLDED_MAX else None
        return folded


def of_this_process() -> UserMetrics | None:
    """Those of the folder that this process shares, if it does."""
    folder = settings.metrics_folder()
    return UserMetrics(folder) if folder is not None and folder.is_dir() else None


def _one(how: str, known: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    if how == "sum":
        return known[0] + other[0], max(known[1], other[1])
    if how == "mostrecent":
        return max(known, other, key=lambda one: one[1])
    pick = min if how == "min" else max
    return pick(known[0], other[0]), max(known[1], other[1])
