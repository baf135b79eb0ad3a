"""A session of benchmarks: which scenarios, in which order, and what is made of their runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

from tqe import clock
from tqe.bench import drains, latencies, machine, overheads, storms, submits, tasks
from tqe.bench.lab import Lab, RunFailed
from tqe.bench.ledger import Ledger
from tqe.bench.scenario import Figure, Figures, Scenario
from tqe.errors import SettingsError

SCHEMA: Final = 2  # of the result file; bench/README.md describes it
RUNS: Final = 5
QUICK_SCALE: Final = 0.1
ALL: Final = "all"

# Above these a session is called noisy. A mark is judged by its own runs all the same: see `judged`.
SPREAD_MAX: Final = 0.15  # (max - min) / median of a steady figure that has a mark
FOREIGN_MAX: Final = 0.10  # of the machine, used by others (or by the kernel for its own ends) during a run
LOAD_MAX: Final = 0.5  # load average of the last minute a core, before the first run

SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for module in (drains, submits, latencies, storms, overheads)
    for scenario in module.SCENARIOS
}

Told = Callable[[int, int, str, float], None]


@dataclass
class Collected:
    """The runs of one scenario so far."""

    scenario: Scenario
    runs: list[Figures] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def chosen(names: Sequence[str]) -> list[Scenario]:
    """Scenarios by name; those of the core when none is named, `all` for every one."""
    if not names:
        return [scenario for scenario in SCENARIOS.values() if scenario.core]
    if ALL in names:
        return list(SCENARIOS.values())
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise SettingsError(
            f"there is no scenario {', '.join(unknown)}; there are: {', '.join(SCENARIOS)}, and all"
        )
    return [SCENARIOS[name] for name in dict.fromkeys(names)]


def run(
    scenarios: Sequence[Scenario],
    *,
    runs: int = RUNS,
    quick: bool = False,
    folder: Path | None = None,
    told: Told = lambda done, of, what, part: None,
) -> dict[str, Any]:
    """Carry out the session and answer with the content of a result file.

    Runs alternate: each round plays every scenario once, so that a machine that changes in the course of the
    session changes for all of them. `told(done, of, what, part)` is called again and again meanwhile.
    """
    load = os.getloadavg()[0]
    ledger = Ledger()
    steps = runs * len(scenarios)
    at: list[Any] = [0, ""]
    begun_ns = clock.monotonic_ns()
    with tempfile.TemporaryDirectory(prefix="tqe-bench-", dir=folder, ignore_cleanup_errors=True) as place:
        lab = Lab(
            Path(place),
            app=tasks.make_app(ledger),
            ledger=ledger,
            scale=QUICK_SCALE if quick else 1.0,
            pulse=lambda part: told(at[0], steps, at[1], part),
        )
        found = [Collected(scenario) for scenario in scenarios]
        fingerprint = machine.machine(Path(place))
        for turn in range(runs):
            for collected in found:
                at[1] = f"{collected.scenario.name} ({turn + 1} of {runs})"
                told(at[0], steps, at[1], 0.0)
                _play(lab, collected)
                at[0] += 1
    told(steps, steps, "", 1.0)
    noise = _noise(found, load, len(lab.cpus))
    return {
        "schema": SCHEMA,
        "tool": "tqe bench",
        "taken": datetime.fromtimestamp(clock.wall_ms() / 1000, UTC).isoformat(timespec="seconds"),
        "seconds": round((clock.monotonic_ns() - begun_ns) / 1e9, 1),
        "quick": quick,
        "runs": runs,
        "verdict": _verdict(found, noise, quick=quick, runs=runs),
        "noise": noise,
        "machine": fingerprint,
        "versions": machine.versions(lab.redis_version),
        "settings": {
            "redis": "a private server on a unix socket; appendonly yes, appendfsync everysec, noeviction",
            "snapshots": "kept for every job",
            "workers": "as tqe run starts them, pinned where CPUs allow",
        },
        "scenarios": {collected.scenario.name: _told(collected, quick=quick) for collected in found},
    }


def _play(lab: Lab, collected: Collected) -> None:
    lab.foreign = []
    try:
        collected.runs.append(collected.scenario.play(lab))
    except RunFailed as e:
        collected.failures.append(str(e))
    collected.foreign.append(max(lab.foreign, default=0.0))


# ------------------------------------------------------------------ what is made of the runs


def _told(collected: Collected, *, quick: bool) -> dict[str, Any]:
    scenario = collected.scenario
    figures = {
        figure.name: _summary(figure, values)
        for figure in scenario.figures
        if (values := [run[figure.name] for run in collected.runs if figure.name in run])
    }
    for figure in figures.values():
        figure["judged"] = judged(figure, collected.foreign, quick=quick)
    return {
        "what": scenario.what,
        "foreign": collected.foreign,
        "failures": collected.failures,
        "figures": figures,
    }


def judged(figure: Mapping[str, Any], foreign: Sequence[float], *, quick: bool) -> str | None:
    """What the runs say of a mark, from a figure as result files hold it: `met` if each of them meets it,
    `missed` if none does, else `met by 3 of 5`; `not judged: …` where they cannot say; None without a mark.

    The worst run counts too, so noise cannot make a mark met, and noise elsewhere in the session takes
    nothing away from it. `foreign`: part of the machine that others used, for each run of the scenario.
    """
    mark, values = figure["mark"], figure["values"]
    if mark is None:
        return None
    if quick:
        return "not judged: quick"
    if len(values) < RUNS:
        return f"not judged: {len(values)} of {RUNS} runs"
    if max(foreign, default=0.0) > FOREIGN_MAX:
        return f"not judged: {max(foreign):.0%} foreign use"
    good = sum(value >= mark if figure["better"] == "more" else value <= mark for value in values)
    if good == len(values):
        return "met"
    return f"met by {good} of {len(values)}" if good else "missed"


def _summary(figure: Figure, values: list[float]) -> dict[str, Any]:
    middle = median(values)
    return {
        "label": figure.label,
        "unit": figure.unit,
        "better": "more" if figure.more else "less",
        "mark": figure.mark,
        "stretch": figure.stretch,
        "median": _short(middle),
        "min": _short(min(values)),
        "max": _short(max(values)),
        "spread": round(_spread(values), 4),
        "values": [_short(value) for value in values],
    }


def _short(value: float) -> float:
    """Six significant digits: more were never measured."""
    return float(f"{value:.6g}")


def _spread(values: list[float]) -> float:
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def _noise(found: Sequence[Collected], load: float, cores: int) -> list[str]:
    """Why this is no result, if it is none."""
    reasons = []
    if load > LOAD_MAX * cores:
        reasons.append(f"the load average was {load:.1f} on {cores} cores before the first run")
    shared = {one.scenario.name: max(one.foreign, default=0.0) for one in found}
    disturbed = [name for name, share in shared.items() if share > FOREIGN_MAX]
    if disturbed:
        most = max(shared.values())
        reasons.append(
            f"other programs used up to {most:.0%} of the machine during runs of {', '.join(disturbed)}"
        )
    for collected in found:
        name = collected.scenario.name
        for figure in collected.scenario.figures:
            values = [run[figure.name] for run in collected.runs if figure.name in run]
            counts = figure.steady and figure.mark is not None and len(values) > 1
            if counts and _spread(values) > SPREAD_MAX:
                reasons.append(f"{name}: {figure.label} spreads over {_spread(values):.0%}")
                break
    return reasons


def _verdict(found: Sequence[Collected], noise: list[str], *, quick: bool, runs: int) -> str:
    """`result`, or why it may not be called one: failed, quick, few (runs), noisy."""
    if any(collected.failures for collected in found):
        return "failed"
    if noise:
        return "noisy"
    if quick:
        return "quick"
    return "result" if runs >= RUNS else "few"
