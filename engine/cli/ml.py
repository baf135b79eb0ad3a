"""Learning from past jobs and judging it, from the command line: `tqe ml evaluate | train | simulate`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click

from tqe.cli import learning
from tqe.cli.options import json_option, with_settings
from tqe.cli.output import duration, emit, err, number, out, table
from tqe.settings import Settings
from tqe.store import housekeeping
from tqe.store import learning as stored
from tqe.store.model import SJF_BOUND_US

_TRACE = click.argument("trace", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
_SCHEMA = click.option(
    "--schema",
    "schema_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="schema.json that names the trace's columns.",
)

NICE: Final = 15  # of a training in the background: jobs come first
SERVERS: Final = 8
_SERVERS_SAID: Final = f"{SERVERS} for a TRACE, else the workers that live now"


def _numbers(
    least: float, greatest: float
) -> Callable[[click.Context, click.Parameter, str | None], tuple[float, ...]]:
    """A check for numbers with commas between them, each within limits."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
        if value is None:
            return ()
        try:
            found = tuple(float(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r} is no list of numbers with commas between them") from None
        for one in found:
            if not least <= one <= greatest:
                raise click.BadParameter(f"{one:g} is not between {least:g} and {greatest:g}")
        return tuple(dict.fromkeys(found))

    return convert


@click.group()
def ml() -> None:
    """Order jobs by predicted duration: learn from past runs, judge, publish, steer.

    evaluate, simulate and train learn from the runs that workers have captured, or from a TRACE file: a csv
    or csv.gz with a line a job: submit_s (seconds since the first), what was known at submission, duration_s.
    Its schema.json names the columns.

    \b
    Examples:
      tqe ml status
      tqe ml simulate --servers 4,8,16                      what if, from your own history
      tqe ml train                                          learn, judge, publish what wins
      tqe ml train --bound 30                               nobody is overtaken by what came 30 s later
      tqe ml mode low sjf
      tqe ml evaluate jobs.csv.gz --schema schema.json --servers 8
      tqe ml train jobs.csv.gz --schema schema.json --out models
    """


def _servers(settings: Settings, trace: Path | None) -> int:
    """How many workers a replay assumes where nobody said: those that live, if their runs are replayed."""
    if trace is None:
        with learning.opened(settings) as queue:
            leases = housekeeping.leases(queue.door, queue.keys)
        live = sum(end_ms > leases.now_ms for end_ms in leases.ends.values())
        if live:
            return live
    return SERVERS


def _read(settings: Settings, trace: Path | None, schema_path: Path | None) -> Any:
    """The trace of a file, or what workers have captured."""
    from tqe.ml import dataset, traces

    if trace is not None:
        if schema_path is None:
            raise click.UsageError("a trace file needs --schema, which names its columns")
        return dataset.read(trace, schema_path)
    with learning.opened(settings) as queue:
        runs = traces.parse(stored.traces(queue.door, queue.keys))
    return traces.trace_of("captured", runs)


for verb in (learning.status, learning.mode, learning.export, learning.rollback):
    ml.add_command(verb)


@ml.command()
@_TRACE
@_SCHEMA
@click.option(
    "--servers", type=click.IntRange(1, 100_000), metavar="N", help=f"Workers.  [default: {_SERVERS_SAID}]"
)
@click.option(
    "--loads",
    callback=_numbers(0.01, 10.0),
    default="0.7,0.8,0.9,0.95",
    show_default=True,
    metavar="LIST",
    help="Arrivals are stretched until the servers are busy for this share of the time.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw a picture (.png, .svg).")
@json_option
@with_settings
def evaluate(
    settings: Settings,
    trace: Path | None,
    schema_path: Path | None,
    servers: int | None,
    loads: tuple[float, ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay a trace, or what was captured, under every policy.

    Trains on the first 60 %, replays the last 40 %. Times are sojourn times, from submission to end. The
    share is that of the gain in the mean of an oracle that knows every duration.
    """
    from tqe.ml import evaluate as evaluation
    from tqe.ml import plots

    count = servers or _servers(settings, trace)
    with err().status("reading") as status:
        read = _read(settings, trace, schema_path)
        report, judged = evaluation.evaluate(
            read, servers=count, loads=loads, progress=lambda text: status.update(text)
        )
    if plot is not None:
        plots.draw([report], plot)
    if as_json:
        emit(report)
        return
    console = out()
    console.print(f"{report['trace']}: {number(len(read))} jobs, {count} servers")
    console.print(f"chosen: {report['chosen']} ({judged.verdict.reason})")
    for load, policies in report["loads"].items():
        console.print()
        console.print(f"load {load}")
        console.print(_policies(policies))


def _policies(policies: Mapping[str, Mapping[str, float]]) -> Any:
    columns = ("mean", "p50", "p95", "p99", "max", "slowdown", "mean vs FIFO", "p95", "p99", "max", "share")
    rows = table("policy", *columns, right=columns)
    for name, found in policies.items():
        rows.add_row(
            name,
            *(duration(found[f"{what}_s"]) for what in ("mean", "p50", "p95", "p99", "max")),
            f"{found['mean_slowdown']:.3g}",
            *(f"{found[f'{what}_vs_fifo']:+.1%}" for what in ("mean", "p95", "p99", "max")),
            f"{found['share_of_oracle']:.0%}",
        )
    return rows


@ml.command()
@_TRACE
@_SCHEMA
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of models to write the version to, instead of publishing it.",
)
@click.option(
    "--servers",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help=f"Workers that the gate's replays assume.  [default: {_SERVERS_SAID}]",
)
@click.option(
    "--bound",
    "bound_s",
    type=click.FloatRange(0, SJF_BOUND_US / 1e6),
    metavar="SECONDS",
    help="T: nobody is overtaken by a job that entered so much later.  [default: found by replays]",
)
@click.option("--background", is_flag=True, hidden=True, help="Give way to everything else.")
@json_option
@with_settings
def train(
    settings: Settings,
    trace: Path | None,
    schema_path: Path | None,
    folder: Path | None,
    servers: int | None,
    bound_s: float | None,
    background: bool,
    as_json: bool,
) -> None:
    """Train, pass the gate, publish a version.

    Learns from the captured runs, or from a TRACE. What wins in replays of the last jobs is published: the
    model, the hierarchical mean, or FIFO with the reason. All workers take it within seconds. With --out it
    is only written to that folder. The same trace gives the same model, byte for byte.

    How far the bounded mode may go, T, is found by replays too; --bound sets it by hand, until the next
    training.
    """
    from tqe.ml import model, trainer

    if background:
        os.nice(NICE)
    with err().status("training"), tempfile.TemporaryDirectory(prefix="tqe-model-") as made:
        read = _read(settings, trace, schema_path)
        count = servers or _servers(settings, trace)
        path, manifest = trainer.publish(
            read, folder or Path(made), servers=count, trained_at=model.now(), bound_s=bound_s
        )
        if folder is None:
            with learning.opened(settings) as queue:
                learning.publish(queue, path, manifest)
    if as_json:
        emit(
            {
                "version": manifest.version,
                "folder": str(path) if folder is not None else None,
                "chosen": manifest.chosen,
                "sha256": manifest.sha256 or None,
                "trained_at": manifest.trained_at,
                "bound_s": manifest.bound_s,
                "scale_s": manifest.scale_s,
                "gate": manifest.gate,
            }
        )
        return
    console = out()
    console.print(f"published {manifest.version}" if folder is None else f"wrote {path}")
    console.print(f"chosen: {manifest.chosen} ({manifest.gate['reason']})")
    if manifest.bound_s > 0:
        console.print(
            f"T = {duration(manifest.bound_s)}, m = {duration(manifest.scale_s)};"
            f" mean FIFO wait {manifest.gate['wait']}"
        )
    else:
        console.print(f"the bounded mode stays FIFO: {manifest.gate['bound'] or 'nothing was chosen'}")


@ml.command()
@_TRACE
@_SCHEMA
@click.option(
    "--servers", callback=_numbers(1, 100_000), metavar="LIST", help=f"Workers.  [default: {_SERVERS_SAID}]"
)
@click.option(
    "--modes",
    default="fifo,bounded,sjf",
    show_default=True,
    metavar="LIST",
    help="Of fifo, bounded, sjf.",
)
@click.option(
    "--bound", "bound_s", type=click.FloatRange(0), metavar="SECONDS", help="T.  [default: as the gate found]"
)
@json_option
@with_settings
def simulate(
    settings: Settings,
    trace: Path | None,
    schema_path: Path | None,
    servers: tuple[float, ...],
    modes: str,
    bound_s: float | None,
    as_json: bool,
) -> None:
    """What if: your jobs, at the times when they came, with other orders and numbers of workers.

    Learns from the first 60 % and replays the last 40 % with the predictor that the gate chooses.
    """
    from tqe.ml import evaluate as evaluation
    from tqe.ml.order import MODES

    wanted = tuple(dict.fromkeys(modes.split(",")))
    for mode in wanted:
        if mode not in MODES or mode == "shadow":
            raise click.BadParameter(f"{mode!r} is none of fifo, bounded, sjf", param_hint="--modes")
    with err().status("replaying"):
        found = evaluation.what_if(
            _read(settings, trace, schema_path),
            servers=[int(count) for count in servers] or [_servers(settings, trace)],
            modes=wanted,
            bound_s=bound_s,
        )
    if as_json:
        emit(found)
        return
    console = out()
    for answer in found["servers"]:
        console.print(
            f"{answer['servers']} servers, busy for {answer['load']:.0%} of the time,"
            f" predicted by {answer['predictor']}"
        )
        console.print(_modes(answer["modes"]))
        console.print()


def _modes(modes: Mapping[str, Mapping[str, float]]) -> Any:
    columns = ("mean", "p50", "p95", "p99", "max", "slowdown", "mean wait")
    rows = table("mode", *columns, right=columns)
    for name, found in modes.items():
        rows.add_row(
            name,
            *(duration(found[f"{what}_s"]) for what in ("mean", "p50", "p95", "p99", "max")),
            f"{found['mean_slowdown']:.3g}",
            duration(found["mean_wait_s"]),
        )
    return rows
