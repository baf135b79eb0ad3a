"""The picture of a result file: throughput, CPU a job, latencies. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tqe.errors import SettingsError

SUFFIXES: Final = (".svg", ".png", ".pdf")
_CPU: Final = (("worker_cpu", "worker"), ("redis_cpu", "Redis"), ("producer_cpu", "producer"))
_TIMES: Final = (("p50", "p50"), ("p99", "p99"))


def check(path: Path) -> None:
    """Refuse before the measurement what could only fail after it."""
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"--plot {path}: it draws {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise SettingsError("--plot needs matplotlib: pip install 'tqe[bench]'") from e


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Three panels; bars are medians, whiskers the range of the runs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(9, 11), layout="constrained")
    scenarios = result["scenarios"]
    rates = {name: one["figures"]["rate"] for name, one in scenarios.items() if "rate" in one["figures"]}
    _bars(axes[0], "Throughput, jobs a second", [("jobs/s", rates)])
    _bars(axes[1], "CPU, µs a job", _series(scenarios, _CPU, "µs/job"), log=True)
    _bars(axes[2], "Submission to start, ms", _series(scenarios, _TIMES, "ms"), log=True)
    machine, versions = result["machine"], result["versions"]
    figure.suptitle(
        f"tqe {versions['tqe']} on {machine['cpu']}, {machine['cores']} cores\n"
        f"{versions['python']}, Redis {versions['redis_server']}, {result['taken'][:10]},"
        f" verdict: {result['verdict']}",
        fontsize=10,
    )
    figure.savefig(path)
    pyplot.close(figure)


def _series(
    scenarios: Mapping[str, Any], names: tuple[tuple[str, str], ...], unit: str
) -> list[tuple[str, dict[str, Any]]]:
    """(label, scenario → figure) for each figure name, where it has this unit."""
    found = []
    for name, label in names:
        figures = {
            scenario: one["figures"][name]
            for scenario, one in scenarios.items()
            if name in one["figures"] and one["figures"][name]["unit"] == unit
        }
        if figures:
            found.append((label, figures))
    return found


def _bars(axis: Any, title: str, series: list[tuple[str, dict[str, Any]]], *, log: bool = False) -> None:
    names = list(dict.fromkeys(name for _, figures in series for name in figures))
    height = 0.8 / max(1, len(series))
    for number, (label, figures) in enumerate(series):
        places = [names.index(name) + number * height for name in figures]
        medians = [one["median"] for one in figures.values()]
        low = [one["median"] - one["min"] for one in figures.values()]
        high = [one["max"] - one["median"] for one in figures.values()]
        axis.barh(places, medians, height=height * 0.9, xerr=[low, high], label=label, capsize=2)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_yticks([at + height * (len(series) - 1) / 2 for at in range(len(names))], names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    if log and series:
        axis.set_xscale("log")
    if len(series) > 1:
        axis.legend(fontsize=8)
