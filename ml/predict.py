"""Owns predictors that learn while a replay goes: each hears of completions and predicts what arrives.

A prediction may use only what has completed in this very replay, so that an order that delays long jobs also
learns of them late, as it would in production.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from heapq import heapify, heappop
from typing import Any, Protocol

from tqe.ml.dataset import Trace
from tqe.ml.features import Columns
from tqe.ml.history import History
from tqe.ml.order import Bound, Mode, boost_s, checked


class Batch(Protocol):
    """What turns rows into ratios to the hierarchical mean: a booster, or a stand-in of a test."""

    def predict(self, flat: array[float], rows: int) -> array[float]: ...


class Walk:
    """A trace walked once in the order of submission. Each job completes when it had ended in truth: behind a
    backlog that is long after its submission, and whoever came meanwhile could not know how long it took.

    `means`, `type_means` and `rows` are what was known of each job at its submission; `history` and `types`
    are what is known when the last job has been submitted, and `late` what has not completed by then.
    """

    __slots__ = ("columns", "history", "late", "means", "rows", "type_means", "types")

    def __init__(self, trace: Trace, columns: Columns, *, rows: bool = True) -> None:
        self.columns = columns
        self.history = History(columns.schema.levels)
        self.types = TypeMeans()
        self.means: list[float] = []
        self.type_means: list[float] = []
        self.rows: list[list[float]] = []
        keys = [columns.keys(facts) for facts in trace.facts]
        ends = sorted(range(len(trace)), key=lambda job: (trace.end_s[job], job))
        done = 0
        for job, submit_s in enumerate(trace.submit_s):
            while trace.end_s[ends[done]] <= submit_s:
                self._completed(trace, keys, ends[done])
                done += 1
            self._submitted(trace, keys[job], job, rows)
        origin_s = trace.submit_s[-1]
        self.late = [(trace.end_s[job] - origin_s, keys[job], trace.duration_s[job]) for job in ends[done:]]

    def whole_history(self) -> History:
        """What is known when the last of them has ended: this is what a version starts from."""
        history = self.history.copy()
        for _, keys, duration_s in self.late:
            history.completed(keys, duration_s)
        return history

    def _completed(self, trace: Trace, keys: Sequence[list[Any]], job: int) -> None:
        self.history.completed(keys[job], trace.duration_s[job])
        self.types.completed(keys[job][0], trace.duration_s[job])

    def _submitted(self, trace: Trace, keys: list[Any], job: int, rows: bool) -> None:
        history = self.history
        self.type_means.append(self.types.mean_s(keys[0]) if history.jobs else 1.0)
        if not history.jobs:  # nobody knows anything yet: these rows are no examples
            self.means.append(1.0)
            if rows:
                self.rows.append([math.nan] * self.columns.width)
        elif rows:
            mean, row = self.columns.row(trace.facts[job], keys, history)
            self.means.append(mean)
            self.rows.append(row)
        else:
            self.means.append(history.hierarchical_mean(keys, self.columns.chain) or 1.0)


class TypeMeans:
    """The plain running mean of each type, the baseline of all baselines."""

    __slots__ = ("_all", "_types")

    def __init__(self) -> None:
        self._types: dict[str, list[float]] = {}
        self._all = [0.0, 0.0]

    def completed(self, kind: str, duration_s: float) -> None:
        for entry in (self._all, self._types.setdefault(kind, [0.0, 0.0])):
            entry[0] += 1.0
            entry[1] += (duration_s - entry[1]) / entry[0]

    def mean_s(self, kind: str) -> float:
        return self._types.get(kind, self._all)[1]

    def copy(self) -> TypeMeans:
        made = TypeMeans()
        made._all = self._all[:]
        made._types = {kind: entry[:] for kind, entry in self._types.items()}
        return made


class Learner:
    """Predicts the jobs of a part of a trace as a replay of it goes.

    Starts from what a walk over the part before knew; jobs of that part which had not completed at its end
    complete during the replay. `kind` is type_mean, hierarchical_mean or model.
    """

    def __init__(
        self, trace: Trace, keys: Sequence[list[Any]], before: Walk, kind: str, booster: Batch | None = None
    ) -> None:
        self._trace, self._keys = trace, keys
        self._columns = before.columns
        self._booster = booster
        self._types = before.types.copy() if kind == "type_mean" else None
        self._history = before.history.copy() if kind != "type_mean" else None
        self._late = [(end_s, index) for index, (end_s, _, _) in enumerate(before.late)]
        heapify(self._late)
        self._late_jobs = before.late
        self._kind = kind
        self._mean_s = 0.0

    def completed(self, job: int) -> None:
        self._learn(self._keys[job], self._trace.duration_s[job])

    def predict(self, job: int, now_s: float) -> float | None:
        while self._late and self._late[0][0] <= now_s:
            _, keys, duration_s = self._late_jobs[heappop(self._late)[1]]
            self._learn(keys, duration_s)
        keys = self._keys[job]
        if self._types is not None:
            self._mean_s = self._types.mean_s(keys[0])
            return self._mean_s
        history = self._history
        if history is None or not history.jobs:
            return None
        if self._kind == "hierarchical_mean" or self._booster is None:
            self._mean_s = history.hierarchical_mean(keys, self._columns.chain) or 0.0
            return checked(self._mean_s, history.greatest_s)
        self._mean_s, row = self._columns.row(self._trace.facts[job], keys, history)
        ratio = self._booster.predict(array("d", row), 1)[0]
        return checked(self._mean_s * ratio, history.greatest_s)

    def work(self, job: int) -> float:
        """What the backlog grew by with the job that was predicted last: an observed mean."""
        return self._mean_s

    def _learn(self, keys: list[Any], duration_s: float) -> None:
        if self._types is not None:
            self._types.completed(keys[0], duration_s)
        elif self._history is not None:
            self._history.completed(keys, duration_s)


class Ordered:
    """A policy for `replay`: the engine's rule over a predictor. With a bound it keeps T up to date.

    `work` sizes the backlog for T. It should come from observed means and not from the model: a poisoned
    model that calls everything long would raise its own bound.
    """

    def __init__(
        self,
        predict: Callable[[int, float], float | None],
        *,
        mode: Mode,
        scale_s: float,
        servers: int,
        bound: Bound | None = None,
        work: Callable[[int], float] | None = None,
        on_completed: Callable[[int], None] | None = None,
    ) -> None:
        self._predict = predict
        self._mode: Mode = mode
        self._scale_s = scale_s
        self._servers = servers
        self._bound = bound
        self._work = work
        self._on_completed = on_completed
        self._waiting_s: dict[int, float] = {}
        self._backlog_s = 0.0

    def score(self, job: int, now_s: float) -> float:
        predicted_s = self._predict(job, now_s)
        bound_s = 0.0
        if self._bound is not None:
            bound_s = self._bound.arrived(self._backlog_s / self._servers)
            work_s = self._work(job) if self._work is not None else predicted_s or 0.0
            self._waiting_s[job] = work_s
            self._backlog_s += work_s
        return now_s - boost_s(self._mode, predicted_s, scale_s=self._scale_s, bound_s=bound_s)

    def started(self, job: int, now_s: float) -> None:
        work_s = self._waiting_s.pop(job, None)
        if work_s is not None:
            self._backlog_s = self._backlog_s - work_s if self._waiting_s else 0.0

    def completed(self, job: int, now_s: float) -> None:
        if self._on_completed is not None:
            self._on_completed(job)
