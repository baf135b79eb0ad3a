"""Measuring: `tqe bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from tqe import clock
from tqe.cli.output import duration, err, facts, out, show, table

REFRESH_NS: Final = 200_000_000
_VERDICTS: Final = {
    "result": "quiet machine, enough runs: this is a result",
    "noisy": "the machine was noisy: this is NOT a result; marks are judged by their own runs",
    "quick": "a quick look with small numbers: this is not a result",
    "few": "too few runs to be a result (five or more are)",
    "failed": "some runs failed: this is not a result",
}


@click.command()
@click.argument("scenarios", metavar="[SCENARIO]...", nargs=-1)
@click.option("--quick", is_flag=True, help="A tenth of the jobs and one run: a look, not a result.")
@click.option("--runs", type=click.IntRange(1, 100), metavar="N", help="Runs of each scenario.  [default: 5]")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result there."
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw it: .svg, .png or .pdf (needs the extra `bench`).",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the private Redis keeps its log.  [default: the folder for temporary files]",
)
@click.option("--list", "listed", is_flag=True, help="Say which scenarios there are.")
@click.pass_context
def bench(
    ctx: click.Context,
    scenarios: tuple[str, ...],
    quick: bool,
    runs: int | None,
    json_file: Path | None,
    plot_file: Path | None,
    folder: Path | None,
    listed: bool,
) -> None:
    """Measure the engine on this machine.

    Each run starts a Redis of its own (AOF everysec) and real worker processes; your jobs and your Redis are
    not touched. Without a SCENARIO the core ones run, `all` runs every one. Exit code 1 only if runs failed:
    a noisy machine is told in the table and in the JSON.

    \b
    Examples:
      tqe bench --quick                     what to expect here, in a minute or two
      tqe bench drain singles
      tqe bench all --json result.json --plot result.svg
    """
    from tqe.bench import plot, suite

    if listed:
        _list(suite.SCENARIOS)
        return
    if plot_file is not None:
        plot.check(plot_file)
    wanted = suite.chosen(scenarios)
    with _Bar() as bar:
        result = suite.run(
            wanted, runs=runs or (1 if quick else suite.RUNS), quick=quick, folder=folder, told=bar.told
        )
    _print(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot.draw(result, plot_file)
    ctx.exit(1 if result["verdict"] == "failed" else 0)


def _list(scenarios: Mapping[str, Any]) -> None:
    listing = table("scenario", "core", "what")
    for scenario in scenarios.values():
        listing.add_row(scenario.name, "yes" if scenario.core else "", scenario.what)
    show(listing)


class _Bar:
    """How far the session is, on stderr. No thread draws it: whoever forks must not have any."""

    def __init__(self) -> None:
        console = err()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=1.0)
        self._drawn_ns = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def told(self, done: int, of: int, what: str, part: float) -> None:
        now_ns = clock.monotonic_ns()
        if now_ns - self._drawn_ns < REFRESH_NS and part < 1.0:
            return
        self._drawn_ns = now_ns
        self._progress.update(self._task, completed=done + part * 0.9, total=of, description=what)
        self._progress.refresh()


# ------------------------------------------------------------------ the table


def _print(result: Mapping[str, Any]) -> None:
    machine, versions = result["machine"], result["versions"]
    load = ", ".join(f"{value:.2f}" for value in machine["load_average"])
    rows = [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_mb']:,} MB; load {load}"),
        ("system", f"{versions['os']}, {versions['kernel']}; AOF on {machine['file_system'] or 'unknown'}"),
        (
            "versions",
            f"tqe {versions['tqe']} ({versions['codec']} codec), {versions['python']},"
            f" Redis {versions['redis_server']}",
        ),
        ("settings", "; ".join(result["settings"].values())),
        ("method", f"{_method(result['runs'])}, {duration(result['seconds'])} in all"),
    ]
    show(facts(rows))
    out().print()
    show(_figures(result))
    for name, scenario in result["scenarios"].items():
        for failure in scenario["failures"]:
            out().print(Text(f"{name} failed: {failure}", style="red"))
    for reason in result["noise"]:
        out().print(Text(f"noise: {reason}", style="yellow"))
    clean = result["verdict"] == "result"
    out().print(Text(_VERDICTS[result["verdict"]], style="bold green" if clean else "bold yellow"))


def _method(runs: int) -> str:
    return "one run of each scenario" if runs == 1 else f"medians of {runs} runs in alternation"


def _figures(result: Mapping[str, Any]) -> Any:
    grid = table(
        "scenario", "figure", "median", "min", "max", "unit", "mark", "",
        right=("median", "min", "max", "mark"),
    )  # fmt: skip
    for name, scenario in result["scenarios"].items():
        first = name
        for figure in scenario["figures"].values():
            grid.add_row(
                first,
                figure["label"],
                Text(_number(figure["median"]), style="bold"),
                _number(figure["min"]),
                _number(figure["max"]),
                figure["unit"],
                _mark(figure),
                _judged(figure["judged"]),
            )
            first = ""
    return grid


def _mark(figure: Mapping[str, Any]) -> str:
    if figure["mark"] is None:
        return ""
    return ("≥ " if figure["better"] == "more" else "≤ ") + _number(figure["mark"])


def _judged(said: str | None) -> Text:
    return Text(said or "", style={"met": "green", "missed": "red"}.get(said or "", "yellow"))


def _number(value: float) -> str:
    if abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
