"""The predictor that `tqe run` hands to its workers: published versions of `tqe.ml`, by way of a folder."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqe.ml import ModelError, model, order, score
from tqe.ml.dataset import Facts
from tqe.ml.features import Columns, pick
from tqe.ml.score import Booster, Scorer
from tqe.settings import Settings
from tqe.store.model import Mode
from tqe.telemetry import logs
from tqe.worker.ordering import NotHere, Waiting

_log = logs.get("model")


def folder_of(settings: Settings) -> Path:
    """Where this host keeps the versions that its steward took from Redis."""
    return settings.data_dir / "models" / settings.namespace


def open_library() -> bool:
    """Open LightGBM's library in this process, and say once if it cannot be used.

    Called before the fork: workers then share its pages, and it is told to use one thread before anything
    else, without which OpenMP and fork together hang.
    """
    try:
        score.library()
    except ModelError as e:
        _log.info(f"durations are predicted by means of past jobs, not by a model: {e}")
        return False
    return True


class ModelPredictor:
    """One worker's predictor. Made before the fork; each worker goes on with its own copy."""

    def __init__(self, folder: Path, *, library: bool) -> None:
        self._folder = folder
        self._library = library
        self._version = ""
        self._scorer: Scorer | None = None
        self._own: Counter[str] = Counter()

    @property
    def fallbacks(self) -> Mapping[str, int]:
        if self._scorer is None:
            return self._own
        return self._own + self._scorer.fallbacks

    def preload(self, version: str) -> None:
        """Load before the fork what workers will ask for, so that they share its pages; or leave it to
        them."""
        with contextlib.suppress(ModelError, NotHere):
            self.load(version)

    def load(self, version: str) -> None:
        """Raises NotHere, ModelError; what was loaded before stays then."""
        if version == self._version:
            return
        if not version:
            self._take(None, None)
            self._version = ""
            return
        if not (self._folder / version / model.MANIFEST).is_file():
            raise NotHere(version)
        # Checked against its hashes again: the steward's canary has survived these bytes, and no others.
        files = model.read(self._folder / version)
        booster = None
        if files.model is not None:
            if self._library:
                booster = model.load(files)
            else:
                self._own["library"] += 1
        self._take(files, booster)
        self._version = version

    def _take(self, files: model.Files | None, booster: Booster | None) -> None:
        if files is None:
            if self._scorer is not None:
                self._own += self._scorer.fallbacks
            self._scorer = None
            return
        columns = Columns(files.manifest.schema)
        chain = 1 if files.manifest.chosen == "type_mean" else None
        if self._scorer is None:
            self._scorer = Scorer(columns, files.history, booster, chain=chain)
        else:
            self._scorer.swap(columns, files.history, booster, chain=chain)

    def use(self, rung: str) -> None:
        if self._scorer is not None:
            self._scorer.lower_to(rung)

    def score(self, jobs: Sequence[Waiting]) -> Sequence[float | None]:
        if self._scorer is None:
            return [None] * len(jobs)
        known = [job for job in jobs if job.fields is not None]
        if len(known) == len(jobs):
            return self._scorer.score([self._facts(job) for job in jobs])
        self._own["columns"] += len(jobs) - len(known)
        found = iter(self._scorer.score([self._facts(job) for job in known]))
        return [None if job.fields is None else next(found) for job in jobs]

    def rungs(self, job: Waiting) -> tuple[float | None, float | None]:
        if self._scorer is None or job.fields is None:
            return None, None
        return self._scorer.rungs(self._facts(job))

    def completed(self, job: Waiting, run_s: float) -> None:
        if self._scorer is not None and job.fields is not None:
            self._scorer.history.completed(self._scorer.columns.keys(self._facts(job)), run_s)

    def boost_us(self, mode: Mode, predicted_s: float | None, *, scale_s: float, bound_s: float) -> int:
        return order.boost_us(mode, predicted_s, scale_s=scale_s, bound_s=bound_s)

    def _facts(self, job: Waiting) -> Facts:
        assert self._scorer is not None
        schema = self._scorer.columns.schema
        return Facts(
            job.type,
            job.lane,
            float(job.payload_bytes),
            job.attempt + 1,
            job.enqueued_us / 1e6,
            pick(job.fields or {}, schema.numeric, schema.categorical),
        )
