"""Owns scoring in a worker: LightGBM's library behind ctypes, and the ladder that falls from it to means.

The Python package is never imported: that costs a worker 270 ms and 55 MB, the library alone 20 ms. OpenMP
and fork together hang for ever unless the library is told to use one thread before it does anything else, so
that is the first call after opening it, and every predict call says it again.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from tqe import clock
from tqe.ml import ModelError
from tqe.ml.dataset import Facts
from tqe.ml.features import Columns
from tqe.ml.history import History
from tqe.ml.order import checked

Rung = Literal["model", "mean", "fifo"]

BATCH_MAX: Final = 256
# The breaker: a batch that takes longer than this is too slow. A lone job carries the cost of the call alone,
# so the first microseconds are free; and a preempted batch is no slow model, so it takes some in a row.
BATCH_US_MAX: Final = 5_000
JOB_US_MAX: Final = 20
CALL_US: Final = 200
SLOW_BATCHES_MAX: Final = 4
BREAK_S: Final = 60

_FLOAT64: Final = 1
_ROW_MAJOR: Final = 1
_NORMAL: Final = 0
_PARAMETERS: Final = b"num_threads=1 predict_disable_shape_check=false verbosity=-1"


def library_path() -> Path:
    """LightGBM's shared library, found without importing the package. Raises ModelError."""
    spec = importlib.util.find_spec("lightgbm")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError('LightGBM is not installed: pip install "tqe[ml]"')
    for folder in spec.submodule_search_locations:
        for inner in ("lib", "bin", "."):
            path = Path(folder) / inner / "lib_lightgbm.so"
            if path.is_file():
                return path
    raise ModelError("the installed LightGBM has no lib_lightgbm.so")


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """The library, opened once a process. Raises ModelError."""
    path = library_path()
    try:
        opened = ctypes.CDLL(str(path))
        # First of all: without it a fork after any use of OpenMP hangs for ever.
        opened.LGBM_SetMaxThreads(ctypes.c_int(1))
        opened.LGBM_GetLastError.restype = ctypes.c_char_p
    except (OSError, AttributeError) as e:  # no libgomp on this machine; a LightGBM before 4.3
        raise ModelError(f"LightGBM's library cannot be used: {e}") from e
    return opened


class Booster:
    """One loaded model. The text must have been checked against its hash: damaged text kills the process."""

    def __init__(self, text: bytes, columns: int) -> None:
        self._handle: ctypes.c_void_p | None = None
        self._library = library()
        self._columns = columns
        handle, trees, width = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        self._call(
            self._library.LGBM_BoosterLoadModelFromString(
                ctypes.c_char_p(text), ctypes.byref(trees), ctypes.byref(handle)
            )
        )
        self._handle = handle
        self._call(self._library.LGBM_BoosterGetNumFeature(handle, ctypes.byref(width)))
        self.trees = trees.value
        if width.value != columns:
            self.close()
            raise ModelError(f"the model has {width.value} columns, the code makes {columns}")

    def predict(self, flat: array[float], rows: int) -> array[float]:
        """Outputs for `rows` rows of doubles, unchecked. Raises ModelError."""
        if self._handle is None or len(flat) != rows * self._columns:
            raise ModelError(f"{len(flat)} values are not {rows} rows of {self._columns} columns")
        out = array("d", bytes(8 * rows))
        length = ctypes.c_int64(rows)
        self._call(
            self._library.LGBM_BoosterPredictForMat(
                self._handle,
                ctypes.c_void_p(flat.buffer_info()[0]),
                ctypes.c_int(_FLOAT64),
                ctypes.c_int32(rows),
                ctypes.c_int32(self._columns),
                ctypes.c_int(_ROW_MAJOR),
                ctypes.c_int(_NORMAL),
                ctypes.c_int(0),
                ctypes.c_int(-1),
                ctypes.c_char_p(_PARAMETERS),
                ctypes.byref(length),
                ctypes.c_void_p(out.buffer_info()[0]),
            )
        )
        if length.value != rows:
            raise ModelError(f"the model gave {length.value} outputs for {rows} rows")
        return out

    def close(self) -> None:
        """Give the memory back; the booster cannot be used any more."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.LGBM_BoosterFree(handle)

    def _call(self, code: int) -> None:
        if code != 0:
            said = self._library.LGBM_GetLastError() or b""
            raise ModelError(f"LightGBM: {said.decode('utf-8', 'replace')[:200]}")


class Scorer:
    """Predicts mean durations for batches of jobs: model, else hierarchical mean, else None. Never raises.

    `chain` limits the mean to its first levels: 1 where the gate chose the mean per type. `fallbacks` counts
    by reason what was not answered by the rung that should have: columns, library, value, slow.
    """

    def __init__(
        self,
        columns: Columns,
        history: History,
        booster: Booster | None = None,
        *,
        chain: int | None = None,
        time: clock.Clock = clock.SYSTEM,
    ) -> None:
        self.columns = columns
        self.history = history
        self._chain = chain or columns.chain
        self.rung: Rung = "model" if booster is not None else "mean"  # lowered and raised by the watch
        self.scored = 0
        self.fallbacks: Counter[str] = Counter()
        self._booster = booster
        self._time = time
        self._slow_batches = 0
        self._closed_until_ns = 0  # the breaker

    def swap(
        self, columns: Columns, history: History, booster: Booster | None, *, chain: int | None = None
    ) -> None:
        """Take another model; the old one is freed. What was counted stays."""
        old = self._booster
        self.columns, self.history, self._booster = columns, history, booster
        self._chain = chain or columns.chain
        self.rung = "model" if booster is not None else "mean"
        self._slow_batches = self._closed_until_ns = 0
        if old is not None and old is not booster:
            old.close()

    def lower_to(self, rung: str) -> None:
        """Use this rung, or the best that there is below it."""
        if rung == "model":
            self.rung = "model" if self._booster is not None else "mean"
        else:
            self.rung = "mean" if rung == "mean" else "fifo"

    def score(self, jobs: Sequence[Facts]) -> list[float | None]:
        """Predicted mean duration of each job in seconds; None: nothing is known, the job keeps its FIFO
        place."""
        found: list[float | None] = []
        for start in range(0, len(jobs), BATCH_MAX):
            found += self._batch(jobs[start : start + BATCH_MAX])
        return found

    def rungs(self, job: Facts) -> tuple[float | None, float | None]:
        """What the model and what the hierarchical mean say of one job, whichever is in use."""
        if not self.history.jobs:
            return None, None
        began_ns = self._time.monotonic_ns()
        wants_model = self._booster is not None and began_ns >= self._closed_until_ns
        means, rows = self._rows([job], wants_model)
        if means[0] is None:
            return None, None
        greatest_s = self.history.greatest_s
        ratios = self._ratios(rows) if wants_model else None
        if wants_model:
            self._time_it(1, self._time.monotonic_ns() - began_ns)
        model_s = None if ratios is None else checked(means[0] * ratios[0], greatest_s)
        mean_s = self.history.hierarchical_mean(self.columns.keys(job), self._chain)
        return model_s, None if mean_s is None else checked(mean_s, greatest_s)

    def _batch(self, jobs: Sequence[Facts]) -> list[float | None]:
        if self.rung == "fifo" or not self.history.jobs:
            return [None] * len(jobs)
        began_ns = self._time.monotonic_ns()
        wants_model = self._booster is not None and self.rung == "model" and began_ns >= self._closed_until_ns
        means, rows = self._rows(jobs, wants_model)
        ratios = self._ratios(rows) if wants_model else None
        greatest_s = self.history.greatest_s
        found: list[float | None] = []
        for index, mean in enumerate(means):
            if mean is None:
                found.append(None)
                continue
            usable = checked(mean if ratios is None else mean * ratios[index], greatest_s)
            if usable is None:
                self.fallbacks["value"] += 1
            found.append(usable)
        self.scored += len(jobs)
        if wants_model:
            self._time_it(len(jobs), self._time.monotonic_ns() - began_ns)
        return found

    def _rows(
        self, jobs: Sequence[Facts], wants_rows: bool
    ) -> tuple[list[float | None], list[Sequence[float]]]:
        """Hierarchical means and rows. A job whose fields break the columns costs only itself its score."""
        columns, history = self.columns, self.history
        means: list[float | None] = []
        rows: list[Sequence[float]] = []
        for facts in jobs:
            try:
                keys = columns.keys(facts)
                if wants_rows:
                    mean, row = columns.row(facts, keys, history)
                    rows.append(row)
                    means.append(mean)
                else:
                    means.append(history.hierarchical_mean(keys, self._chain))
            except (TypeError, ValueError, AttributeError, ArithmeticError):
                self.fallbacks["columns"] += 1
                means.append(None)
                if wants_rows:
                    rows.append(_blank(columns.width))
        return means, rows

    def _ratios(self, rows: Sequence[Sequence[float]]) -> array[float] | None:
        assert self._booster is not None
        try:
            return self._booster.predict(self.columns.flat(rows), len(rows))
        except (ModelError, TypeError, ctypes.ArgumentError):
            self.fallbacks["library"] += len(rows)
            return None

    def _time_it(self, jobs: int, took_ns: int) -> None:
        if took_ns <= 1000 * min(BATCH_US_MAX, CALL_US + JOB_US_MAX * jobs):
            self._slow_batches = 0
            return
        self._slow_batches += 1
        # After the break the count still stands at its maximum: one slow trial closes it again.
        if self._slow_batches >= SLOW_BATCHES_MAX:
            self.fallbacks["slow"] += 1
            self._closed_until_ns = self._time.monotonic_ns() + BREAK_S * 1_000_000_000


@functools.lru_cache(maxsize=4)
def _blank(width: int) -> tuple[float, ...]:
    return (math.nan,) * width
