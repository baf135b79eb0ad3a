"""Scoring in a worker: the library behind ctypes, and what happens when anything about it is wrong."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ml.conftest import Published
from tests.support.fake_clock import FakeClock
from tqe.ml import ModelError, model, score
from tqe.ml.dataset import Facts
from tqe.ml.features import Columns
from tqe.ml.score import BATCH_MAX, BREAK_S, SLOW_BATCHES_MAX, Booster, Scorer


class StandIn:
    """A booster whose outputs, faults and slowness a test decides."""

    def __init__(self, *ratios: float, clock: FakeClock | None = None) -> None:
        self.ratios, self.clock = ratios, clock
        self.calls = 0
        self.slow_ms = 0.0
        self.fault: Exception | None = None

    def predict(self, flat: array[float], rows: int) -> array[float]:
        self.calls += 1
        assert rows <= BATCH_MAX
        if self.fault is not None:
            raise self.fault
        if self.clock is not None:
            self.clock.advance(ms=self.slow_ms)
        return array("d", [self.ratios[i % len(self.ratios)] for i in range(rows)])

    def close(self) -> None:
        pass


def scorer(published: Published, booster: object, clock: FakeClock | None = None) -> Scorer:
    files = model.read(published.path)
    return Scorer(Columns(files.manifest.schema), files.history, booster, time=clock or FakeClock())  # type: ignore[arg-type]


# --- as it should be ---


def test_the_library_says_what_the_package_says(published: Published) -> None:
    """Through ctypes, in a batch and one by one, the same as through LightGBM's own Python."""
    import lightgbm
    import numpy

    text = (published.path / model.MODEL).read_bytes()
    rows = [list(row) for row in published.manifest.reference_rows]
    width = len(published.manifest.columns)
    booster = Booster(text, width)
    flat = Columns(published.manifest.schema).flat(rows)
    batch = list(booster.predict(flat, len(rows)))
    alone = [booster.predict(array("d", row), 1)[0] for row in rows]
    package = lightgbm.Booster(model_str=text.decode()).predict(numpy.array(rows), num_threads=1)
    assert batch == alone == list(package) == list(published.manifest.reference_ratios)
    assert 0 < booster.trees <= 100
    booster.close()
    with pytest.raises(ModelError):
        booster.predict(flat, len(rows))


def test_a_scorer_predicts_better_than_the_mean(published: Published) -> None:
    files = model.read(published.path)
    found = scorer(published, model.load(files))
    jobs = published.trace.facts[-700:]
    truth = published.trace.duration_s[-700:]

    def error(predicted: list[float | None]) -> float:
        return sum(abs(math.log((p or 1e-9) / s)) for p, s in zip(predicted, truth, strict=True)) / len(truth)

    by_model = found.score(jobs)
    found.rung = "mean"
    by_mean = found.score(jobs)
    found.rung = "fifo"
    assert found.score(jobs) == [None] * 700
    assert error(by_model) < 0.75 * error(by_mean)
    assert found.scored == 1400 and not found.fallbacks


def test_serving_needs_neither_numpy_nor_the_package(published: Published) -> None:
    code = f"""
import sys
from pathlib import Path
from tqe.ml import canary, model, order, watch
from tqe.ml.features import Columns
from tqe.ml.score import Scorer
files = canary.Gatekeeper(limit_s=30).admit(Path({str(published.path)!r}))
columns = Columns(files.manifest.schema)
from tqe.ml.dataset import Facts
jobs = [Facts("A", fields={{"user": "ann", "size": 2.0}})] * 3
found = Scorer(columns, files.history, model.load(files)).score(jobs)
assert all(p > 0 for p in found), found
bad = [m for m in ("numpy", "lightgbm", "scipy", "pandas", "matplotlib") if m in sys.modules]
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


def test_load_then_fork_then_predict_does_not_hang(published: Published) -> None:
    """OpenMP and fork hang for ever unless the thread limit comes first. Children score and swap models."""
    code = f"""
import os
from pathlib import Path
from tqe.ml import model
from tqe.ml.features import Columns
files = model.read(Path({str(published.path)!r}))
booster = model.load(files)
for _ in range(6):
    child = os.fork()
    if not child:
        model.check(files.manifest, booster)
        for _ in range(5):
            model.load(files).close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
model.check(files.manifest, booster)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr


# --- the library is not there ---


@pytest.fixture
def no_library_yet() -> Iterator[None]:
    score.library.cache_clear()
    yield
    score.library.cache_clear()


@pytest.mark.usefixtures("no_library_yet")
def test_without_lightgbm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'pip install "tqe\[ml\]"'):
        score.library()


@pytest.mark.usefixtures("no_library_yet")
def test_a_library_that_cannot_be_opened_is_a_model_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a missing libgomp looks like."""
    broken = tmp_path / "lib_lightgbm.so"
    broken.write_bytes(b"\x7fELF")
    monkeypatch.setattr(score, "library_path", lambda: broken)
    with pytest.raises(ModelError, match="cannot be used"):
        score.library()


@pytest.mark.usefixtures("no_library_yet")
def test_a_library_too_old_for_the_thread_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __init__(self, path: str) -> None:
            pass

        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    monkeypatch.setattr(ctypes, "CDLL", Old)
    with pytest.raises(ModelError, match="LGBM_SetMaxThreads"):
        score.library()


def test_need_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqe import ml

    with pytest.raises(ModelError, match=r'pip install "tqe\[ml\]"'):
        monkeypatch.setitem(sys.modules, "lightgbm", None)
        ml.need("lightgbm")


# --- the model is wrong ---


def test_another_number_of_columns_is_refused(published: Published) -> None:
    text = (published.path / model.MODEL).read_bytes()
    width = len(published.manifest.columns)
    with pytest.raises(ModelError, match="columns"):
        Booster(text, width + 1)
    booster = Booster(text, width)
    for flat, rows in ((array("d", [0.0] * (width - 1)), 1), (array("d", [0.0] * width), 2)):
        with pytest.raises(ModelError, match="columns"):
            booster.predict(flat, rows)
    booster.close()


@pytest.mark.parametrize("text", [b"", b"\x00", b"hello", b"tree\nversion=v9\n"])
def test_foreign_text_is_a_model_error(text: bytes) -> None:
    with pytest.raises(ModelError):
        Booster(text, 3)


# --- outputs ---


def test_each_output_is_checked_and_clamped(published: Published) -> None:
    found = scorer(published, StandIn(math.nan, math.inf, -1.0, 1e300, 0.0, 1.0))
    jobs = [published.trace.facts[-1]] * 6
    values = found.score(jobs)
    greatest = found.history.greatest_s
    assert values[:3] == [None, None, None]
    assert values[3] == 100 * greatest and values[4] == 0.001
    found.rung = "mean"
    assert values[5] == found.score(jobs[:1])[0]
    assert found.fallbacks == {"value": 3}


def test_a_job_that_breaks_the_columns_costs_only_its_own_score(published: Published) -> None:
    found = scorer(published, StandIn(1.0))
    good = published.trace.facts[-1]
    bad = Facts("A", fields={"user": ["no", "key"], "size": 1.0})  # type: ignore[dict-item]
    worse = Facts("A", fields=None)  # type: ignore[arg-type]
    values = found.score([good, bad, worse, good])
    assert values[1] is None and values[2] is None and values[0] == values[3] is not None
    assert found.fallbacks["columns"] == 2
    found.rung = "mean"
    assert [v is None for v in found.score([good, bad, worse])] == [False, True, True]


@pytest.mark.parametrize("fault", [ModelError("no"), ctypes.ArgumentError("no"), TypeError("no")])
def test_a_predict_call_that_fails_falls_to_the_mean(published: Published, fault: Exception) -> None:
    stand_in = StandIn(5.0)
    stand_in.fault = fault
    found = scorer(published, stand_in)
    jobs = published.trace.facts[-3:]
    values = found.score(jobs)
    assert found.fallbacks["library"] == 3
    found.rung = "mean"
    assert values == found.score(jobs)


def test_a_value_that_is_no_number_in_a_column_falls_to_the_mean(published: Published) -> None:
    found = scorer(published, StandIn(2.0))
    values = found.score([Facts("A", fields={"user": "ann", "size": "large"})])
    assert values[0] is not None and found.fallbacks["library"] == 1


def test_the_mean_per_type_is_a_chain_of_one(published: Published) -> None:
    files = model.read(published.path)
    columns = Columns(files.manifest.schema)
    whole = Scorer(columns, files.history, time=FakeClock())
    short = Scorer(columns, files.history, chain=1, time=FakeClock())
    same, other = (Facts("A", fields={"user": user, "size": 1.0}) for user in ("ann", "bob"))
    assert whole.score([same]) != whole.score([other])
    assert short.score([same]) == short.score([other]) == [files.history.hierarchical_mean(["A"], 1)]


def test_an_empty_history_knows_nothing(published: Published) -> None:
    from tqe.ml.history import History

    columns = Columns(published.manifest.schema)
    found = Scorer(columns, History(columns.schema.levels), None, time=FakeClock())
    assert found.score(published.trace.facts[:4]) == [None] * 4


# --- the breaker ---


def test_a_slow_model_is_left_alone_for_a_minute_then_tried_once(published: Published) -> None:
    clock = FakeClock()
    stand_in = StandIn(2.0, clock=clock)
    found = scorer(published, stand_in, clock)
    jobs = published.trace.facts[-BATCH_MAX:]
    fast = found.score(jobs)
    stand_in.slow_ms = 6.0
    for _ in range(SLOW_BATCHES_MAX):
        assert found.score(jobs) == fast
    calls = stand_in.calls
    mean = found.score(jobs)
    assert mean != fast and stand_in.calls == calls and found.fallbacks["slow"] == 1
    clock.advance(ms=BREAK_S * 1000 - 100)
    assert found.score(jobs) == mean
    clock.advance(ms=200)
    assert found.score(jobs) == fast  # one trial, still slow
    assert found.score(jobs) == mean and found.fallbacks["slow"] == 2
    clock.advance(ms=BREAK_S * 1000)
    stand_in.slow_ms = 0.1
    for _ in range(2 * SLOW_BATCHES_MAX):
        assert found.score(jobs) == fast


def test_one_preempted_batch_is_no_slow_model(published: Published) -> None:
    clock = FakeClock()
    stand_in = StandIn(2.0, clock=clock)
    found = scorer(published, stand_in, clock)
    jobs = published.trace.facts[-64:]
    for turn in range(20):
        stand_in.slow_ms = 0.1 if turn % SLOW_BATCHES_MAX == 3 else 50.0
        found.score(jobs)
    assert stand_in.calls == 20 and not found.fallbacks


def test_a_swap_frees_the_old_model_and_opens_the_breaker(published: Published) -> None:
    files = model.read(published.path)
    first, second = model.load(files), model.load(files)
    found = scorer(published, first)
    found.swap(Columns(files.manifest.schema), files.history, second)
    assert first is not None and first._handle is None
    assert found.score(published.trace.facts[-3:]) != [None] * 3
    found.swap(Columns(files.manifest.schema), files.history, None)
    assert found.rung == "mean" and second is not None and second._handle is None
