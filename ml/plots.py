"""Owns the pictures of orders compared; needs matplotlib, which nothing else here does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tqe.ml import need

_COLOURS: Final[Mapping[str, str]] = {
    "sjf_oracle": "#999999",
    "sjf_model": "#1b9e77",
    "sjf_hierarchical_mean": "#7570b3",
    "sjf_type_mean": "#66a61e",
    "bounded": "#d95f02",
    "bounded_chosen": "#e7298a",
    "bounded_fixed": "#666666",
}
_FIGURES: Final = (("mean_vs_fifo", "mean"), ("p95_vs_fifo", "p95"), ("p99_vs_fifo", "p99"))


def draw(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row a trace: change against FIFO of mean, p95 and p99 over the load, a line a policy. Raises
    ModelError without matplotlib."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(reports), len(_FIGURES), figsize=(12, 3.2 * len(reports)), squeeze=False, layout="constrained"
    )
    for row, report in zip(axes, reports, strict=True):
        loads = list(report["loads"])
        for axis, (name, label) in zip(row, _FIGURES, strict=True):
            for policy, colour in _COLOURS.items():
                values = [100 * report["loads"][load][policy][name] for load in loads]
                style = "--" if policy == "sjf_oracle" else "-"
                axis.plot(
                    [float(load) for load in loads], values, style, marker="o", color=colour, label=policy
                )
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_title(f"{report['trace']}: {label}, change against FIFO in %", fontsize=9)
            axis.set_xlabel("load", fontsize=8)
            axis.tick_params(labelsize=8)
    axes[0][0].legend(fontsize=7)
    _save(pyplot, figure, path)


def draw_order(modes: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Completion times by mode: which share of the jobs had ended after how long. `percentiles_s` has 0 to
    100. Raises ModelError without matplotlib."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for (name, mode), colour in zip(modes.items(), ("#666666", "#d95f02", "#7570b3"), strict=False):
        label = f"{name}: mean {mode['mean_s']:.2f} s, p99 {mode['p99_s']:.2f} s"
        axis.plot(mode["percentiles_s"], range(101), color=colour, label=label)
    axis.set_xlabel("seconds from submission to end")
    axis.set_ylabel("% of the jobs")
    axis.set_xlim(left=0)
    axis.legend(fontsize=8)
    _save(pyplot, figure, path)


def _pyplot() -> Any:
    matplotlib = need("matplotlib")
    matplotlib.use("Agg")
    # The same report gives the same picture: no dates, and ids from a fixed salt.
    matplotlib.rcParams["svg.hashsalt"] = "tqe"
    return need("matplotlib.pyplot")


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    pyplot.close(figure)
