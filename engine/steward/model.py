"""Brings published models to this host's workers, takes bad ones back, watches whether the order still pays,
and trains.

A version is vetted by a child of its own before any worker hears of it; whatever goes wrong, the last good
one orders on, else the mean, else nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, Protocol

import msgspec

from tqe.board import layout
from tqe.board.board import SlotView
from tqe.errors import RedisUnavailable
from tqe.steward.context import Context
from tqe.store import housekeeping, learning
from tqe.store.learning import DEATHS_MAX, Files, ModelState
from tqe.telemetry import logs

_log = logs.get("steward")

PERIOD_S: Final = 0.5
INSTALLING_S: Final = 0.05
RETRY_NS: Final = 60_000_000_000
LEARNER_TTL_MS: Final = 10_000
TRACES_MAX: Final = 2_000  # that are looked at in one run
AGE_MAX_S: Final = 30 * 86_400.0  # what was learnt a month ago is no better than a mean
TEACHES: Final = ("done", "timeout")
_FALLBACKS: Final = tuple(name for name in layout.COUNTERS if name.startswith("fallback_"))
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


class Report(Protocol):
    """What a watch says at the end of a window."""

    @property
    def rung(self) -> str: ...
    @property
    def changed(self) -> bool: ...
    @property
    def rank_correlation(self) -> float: ...
    @property
    def regret(self) -> float: ...


class Watch(Protocol):
    """Judges predictions by what came of them."""

    def completed(
        self, *, model_s: float | None, mean_s: float | None, duration_s: float
    ) -> Report | None: ...


# Whose fault it is that a version cannot be used: this host's alone; the version's, whose files do not fit
# each other; its model's, whose bytes are as they should be and end or hang whatever loads them.
Fault = Literal["", "host", "version", "model"]


class Models(Protocol):
    """What the composition root hands in: the folder of vetted versions, the watch, trainings."""

    def has(self, version: str) -> bool: ...
    def install(self, version: str, files: Files) -> Future[tuple[str, Fault]]:
        """Vet a version; in the end (reason why not or '', whose fault that is)."""

    def watch(self, version: str, rung: str) -> Watch | None: ...
    def train(self, *, servers: int) -> None: ...
    def trained(self) -> str | None:
        """None: no training has ended since the last answer; '': a version was published; else why not."""

    @property
    def training(self) -> bool: ...
    def close(self) -> None: ...


@dataclass
class ModelReport:
    """What one run did."""

    installed: str = ""
    refused: str = ""  # a reason
    told: bool = False  # workers are to look again
    rung: str = ""  # what orders from now on, if that changed
    trains: bool = False


@dataclass(slots=True)
class _Installing:
    version: str
    sha256: str
    future: Future[tuple[str, Fault]]


@dataclass
class ModelDuty:
    """The model duty of one steward."""

    context: Context
    models: Models
    name: str = "model"
    period_s: float = PERIOD_S
    next_in_s: float | None = None
    _installing: _Installing | None = None
    # Versions that this host cannot use, for its own reasons → when they are tried again, what was said.
    _unusable: dict[str, tuple[int, str]] = field(default_factory=dict)
    _told: tuple[object, ...] | None = None
    _seen: dict[int, tuple[int, dict[str, int]]] = field(default_factory=dict)  # slot → pid, its counters
    _watch: Watch | None = None
    _watched: str = ""
    _after: bytes | None = None  # the last trace that was looked at
    _new_traces: int = 0
    _trained_ns: int | None = None

    def run_once(self) -> ModelReport:
        context = self.context
        report = ModelReport()
        self.next_in_s = None
        self._count()
        self._judge_deaths()
        state = learning.state(context.door, context.keys)
        if state.version and state.refusal:
            self._withdraw(state, report)
            return report
        ready = self._install(state, report)
        self._tell(state, ready, report)
        who = f"{context.host}:{context.board.get(layout.H_SUPERVISOR_PID)}"
        if learning.hold_learner(context.door, context.keys, who, LEARNER_TTL_MS):
            self._look_at_traces(state, report)
            self._learn(state, report)
        return report

    # -- versions

    def _install(self, state: ModelState, report: ModelReport) -> bool:
        """Whether workers may be sent to what is published now."""
        if self._installing is not None:
            if not self._installing.future.done():
                self.next_in_s = INSTALLING_S
                return False
            done, self._installing = self._installing, None
            self._installed(done, report)
            if report.refused:
                return False
        if not state.version or self.models.has(state.version):
            return True
        if self.context.now_ns() < self._unusable.get(state.version, (0, ""))[0]:
            return True
        files = learning.files(self.context.door, self.context.keys, state.version)
        if files is None:
            self._cannot_use(state.version, "it is published, but its files are not in Redis")
            return True
        future = self.models.install(state.version, files)
        self._installing = _Installing(state.version, state.sha256, future)
        self.next_in_s = INSTALLING_S
        return False

    def _installed(self, done: _Installing, report: ModelReport) -> None:
        reason, fault = done.future.result()
        if not reason:
            report.installed = done.version
            _log.info(f"model {done.version} is installed")
            return
        report.refused = reason
        if fault == "host":
            self._cannot_use(done.version, reason)
            return
        _log.error(f"model {done.version} is refused, and will not be tried again: {reason}")
        what = done.sha256 if fault == "model" else done.version
        learning.refuse(self.context.door, self.context.keys, what, reason)
        self.next_in_s = INSTALLING_S

    def _cannot_use(self, version: str, reason: str) -> None:
        """Leave it to the others, and try again in a minute: what this host lacked (memory, a disk) may be
        there."""
        if self._unusable.get(version, (0, ""))[1] != reason:
            _log.warning(f"model {version} cannot be used on this host: {reason}")
        self._unusable = {version: (self.context.now_ns() + RETRY_NS, reason)}

    def _withdraw(self, state: ModelState, report: ModelReport) -> None:
        report.refused = state.refusal
        learning.withdraw(self.context.door, self.context.keys, state.version)
        self.next_in_s = INSTALLING_S

    def _tell(self, state: ModelState, ready: bool, report: ModelReport) -> None:
        """Raise the word that makes workers read `p model` again."""
        now = (state.version, state.bound_us, state.mean_us, state.rung, sorted(state.modes.items()))
        if not ready or now == self._told:
            return
        self._told = now
        board = self.context.board
        board.set(layout.H_MODEL, board.get(layout.H_MODEL) + 1)
        report.told = True

    # -- what workers say

    def _judge_deaths(self) -> None:
        """Workers that died while they scored count against the model; the second death bans it."""
        context = self.context
        words = context.scoring_deaths
        if not words:
            return
        state = learning.state(context.door, context.keys)
        while words:
            word = words.pop()
            if not state.sha256.startswith(f"{word:08x}"):
                continue
            try:
                deaths = learning.add_death(context.door, context.keys, state.sha256)
            except RedisUnavailable as e:
                if e.applied is False:
                    words.append(word)  # else it may count already, and one death must not be two
                raise
            _log.error(f"a worker died while it scored with model {state.version} (death {deaths})")
            if deaths >= DEATHS_MAX:
                learning.refuse(
                    context.door,
                    context.keys,
                    state.sha256,
                    f"{deaths} workers died while they scored with it",
                )

    def _count(self) -> None:
        """Add what this host's workers have scored since the last run to the totals."""
        scored, fallbacks = 0, dict.fromkeys(_FALLBACKS, 0)
        seen = {}
        for slot in self.context.live_slots():
            counters = slot.counters()
            before = self._before(slot)
            seen[slot.number] = (slot.get(layout.C_PID), counters)
            scored += max(0, counters["scored"] - before.get("scored", 0))
            for name in _FALLBACKS:
                fallbacks[name] += max(0, counters[name] - before.get(name, 0))
        learning.count_scored(
            self.context.door,
            self.context.keys,
            scored,
            {name.removeprefix("fallback_"): count for name, count in fallbacks.items()},
        )
        self._seen = seen

    def _before(self, slot: SlotView) -> dict[str, int]:
        pid, counters = self._seen.get(slot.number, (0, {}))
        return counters if pid == slot.get(layout.C_PID) else {}

    # -- does it still pay?

    def _look_at_traces(self, state: ModelState, report: ModelReport) -> None:
        context = self.context
        if self._after is None:
            self._after = learning.last_trace(context.door, context.keys)
            self._new_traces = learning.traces_held(context.door, context.keys)
        if state.version != self._watched:
            self._watch_over(state)
        for name, line in learning.entries(context.door, context.keys, self._after, TRACES_MAX):
            self._after = name
            self._new_traces += 1
            self._judge(state, line, report)
        if state.rung == "model" and not report.rung and self._too_old(state):
            self._step_to(state, "mean", "it was trained a month ago", report)

    def _watch_over(self, state: ModelState) -> None:
        """Begin to watch another version, as soon as this host has it: its floor stands in the manifest."""
        self._watch = None
        if state.version and state.chosen != "fifo":
            if not self.models.has(state.version):
                return
            self._watch = self.models.watch(state.version, state.rung)
        self._watched = state.version

    def _judge(self, state: ModelState, line: bytes, report: ModelReport) -> None:
        if self._watch is None:
            return
        try:
            run = _decode(line)
            if run.get("version") != state.version or run.get("outcome") not in TEACHES:
                return
            found = self._watch.completed(
                model_s=run.get("model_s"), mean_s=run.get("mean_s"), duration_s=float(run["run_us"]) / 1e6
            )
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            return
        if found is not None and found.changed:
            why = f"regret {found.regret:.2f}, rank correlation {found.rank_correlation:.2f}"
            self._step_to(state, found.rung, why, report)

    def _step_to(self, state: ModelState, rung: str, why: str, report: ModelReport) -> None:
        if learning.set_rung(self.context.door, self.context.keys, state.version, rung):
            report.rung = rung
            self.next_in_s = INSTALLING_S
            _log.warning(f"order by predicted duration: now by {rung} ({why})")

    def _too_old(self, state: ModelState) -> bool:
        try:
            trained_s = datetime.fromisoformat(state.trained_at).timestamp()
        except ValueError:
            return False
        return self.context.clock.wall_ms() / 1000 - trained_s > AGE_MAX_S

    # -- training

    def _learn(self, state: ModelState, report: ModelReport) -> None:
        context, settings = self.context, self.context.settings
        ended = self.models.trained()
        if ended is not None:
            if ended:
                _log.warning(f"the training in the background has failed: {ended}")
            else:
                _log.info("a version was trained in the background and published")
        if not settings.learn or self.models.training or self._new_traces < settings.learn_jobs:
            return
        now_ns = context.now_ns()
        if self._trained_ns is not None and now_ns - self._trained_ns < settings.learn_every_s * 1e9:
            return
        self._trained_ns, self._new_traces = now_ns, 0
        workers: Sequence[str] = list(housekeeping.leases(context.door, context.keys).ends)
        self.models.train(servers=max(1, len(workers)))
        report.trains = True
        _log.info(f"training in the background on what {len(workers)} workers have captured")
