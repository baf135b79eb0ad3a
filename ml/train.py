"""Owns training: LightGBM on the ratio of a job's duration to its hierarchical mean.

The target of an order without preemption is the mean (jobs of least expected duration first), so the loss is
Tweedie's, whose minimum is the mean, and not a squared error of logarithms, whose minimum is nearer to the
median. The same input gives the same bytes: one thread, fixed seed, splits by time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tqe.ml import need
from tqe.ml.dataset import Trace
from tqe.ml.features import Columns, schema_of
from tqe.ml.predict import Walk

JOBS_MIN: Final = 500  # below it the hierarchical mean has to do
EXAMPLES_MIN: Final = 100
ROUNDS_MAX: Final = 100
PATIENCE_ROUNDS: Final = 15
# One job that ran a thousand times longer than its like must not own a leaf.
RATIO_MAX: Final = 50.0
FIT_SHARE: Final = 0.6
STOP_SHARE: Final = 0.2  # then early stopping; the rest is the gate's

PARAMETERS: Final[dict[str, Any]] = {
    "objective": "tweedie",
    "tweedie_variance_power": 1.5,
    "learning_rate": 0.08,
    "num_leaves": 24,
    "min_data_in_leaf": 50,
    "lambda_l2": 5.0,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "cat_smooth": 20.0,
    "max_cat_threshold": 16,
    "seed": 20,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Job numbers at which the parts begin: fit before `stop`, early stopping before `gate`, the gate's
    after."""

    stop: int
    gate: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What training made of a trace."""

    columns: Columns
    walk: Walk
    split: Split
    model: bytes | None  # text of the model; None: too few jobs, or no tree was worth keeping
    rounds: int
    reason: str  # why there is no model, else empty


def split_by_time(jobs: int) -> Split:
    """60 / 20 / 20 in the order of submission."""
    return Split(stop=int(jobs * FIT_SHARE), gate=int(jobs * (FIT_SHARE + STOP_SHARE)), end=jobs)


def fit(trace: Trace) -> Fitted:
    """Learn from a whole trace; the last fifth is not touched by the trees, only by the history."""
    split = split_by_time(len(trace))
    # The schema too is found in what the trees may see, or the gate would judge what it had helped to make.
    columns = Columns(schema_of(trace.part(0, max(1, split.gate))))
    walk = Walk(trace, columns)
    if len(trace) < JOBS_MIN:
        reason = f"{len(trace)} jobs are too few for a model: it takes {JOBS_MIN}"
        return Fitted(columns=columns, walk=walk, split=split, model=None, rounds=0, reason=reason)
    text, rounds = boost(walk.rows, walk.means, trace.duration_s, columns, stop=split.stop, end=split.gate)
    reason = "" if rounds else "no tree made the predictions better than the hierarchical mean"
    return Fitted(
        columns=columns, walk=walk, split=split, model=text if rounds else None, rounds=rounds, reason=reason
    )


def boost(
    rows: Sequence[Sequence[float]],
    means: Sequence[float],
    duration_s: Sequence[float],
    columns: Columns,
    *,
    stop: int,
    end: int,
) -> tuple[bytes, int]:
    """(model text, rounds). Trees on the jobs before `stop`, early stopping on those before `end`. Rows may
    come from a walk or from what was captured when jobs were scored."""
    lightgbm, numpy = need("lightgbm"), need("numpy")
    width = columns.width
    flat = array("d")
    for row in rows[:end]:
        flat.extend(row)
    matrix = numpy.frombuffer(flat, dtype="f8").reshape(end, width)
    ratios = numpy.minimum(numpy.asarray(duration_s[:end]) / numpy.asarray(means[:end]), RATIO_MAX)
    known = ~numpy.isnan(matrix[:, 0])  # before the first completion there is no mean to be a ratio of
    fitting = numpy.arange(end) < stop
    if min((known & fitting).sum(), (known & ~fitting).sum()) < EXAMPLES_MIN:
        return b"", 0
    codes = list(range(width - columns.schema.categorical_columns, width))
    names = [name.replace(" ", "_") for name in _plain(columns.schema.columns)]
    data = lightgbm.Dataset(
        matrix[known & fitting], ratios[known & fitting], feature_name=names, categorical_feature=codes
    )
    held = data.create_valid(matrix[known & ~fitting], ratios[known & ~fitting])
    # Starting from a ratio of 1 everywhere, which is the hierarchical mean itself, would be the fairest zero;
    # the mean of the ratios is LightGBM's, and near enough.
    booster = lightgbm.train(
        PARAMETERS,
        data,
        ROUNDS_MAX,
        valid_sets=[held],
        callbacks=[lightgbm.early_stopping(PATIENCE_ROUNDS, verbose=False)],
    )
    rounds = booster.best_iteration or booster.current_iteration()
    return booster.model_to_string(num_iteration=rounds).encode(), rounds


def _plain(names: Sequence[str]) -> list[str]:
    """Names that LightGBM takes: it refuses JSON's special characters. Numbered, so that they stay unique."""
    return [
        f"{index}_" + "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        for index, name in enumerate(names)
    ]
