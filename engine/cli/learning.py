"""The duration model that Redis holds: publishing it, and the verbs that show and steer it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from tqe.cli.options import json_option, with_settings
from tqe.cli.output import count, duration, emit, facts, number, out, show, table
from tqe.errors import UnknownLane
from tqe.settings import Settings
from tqe.store import learning
from tqe.store.call import SyncDoor
from tqe.store.keys import Keys
from tqe.store.learning import Files, ModelState, Published
from tqe.store.link import SyncLink
from tqe.store.model import MODES, RUNG_OF


class Queue(NamedTuple):
    """One queue's Redis, open for a moment."""

    door: SyncDoor
    keys: Keys


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Queue]:
    """The Redis of these settings."""
    link = SyncLink(settings)
    try:
        yield Queue(link.door(), Keys(settings.namespace))
    finally:
        link.close()


def publish(queue: Queue, folder: Path, manifest: Any) -> None:
    """Give a version to all hosts: its files go into Redis, from where each steward takes them."""
    from tqe.ml import model

    text = folder / model.MODEL
    learning.publish(
        queue.door,
        queue.keys,
        Published(
            version=manifest.version,
            sha256=manifest.sha256,
            bound_us=int(manifest.bound_s * 1e6),
            mean_us=int(manifest.mean_s * 1e6),
            trained_at=manifest.trained_at,
            chosen=manifest.chosen,
            rung=RUNG_OF.get(manifest.chosen, "fifo"),
        ),
        Files(
            manifest=(folder / model.MANIFEST).read_bytes(),
            history=(folder / model.HISTORY).read_bytes(),
            model=text.read_bytes() if text.exists() else None,
        ),
    )


# ------------------------------------------------------------------ verbs


@click.command()
@click.argument("trace", type=click.Path(dir_okay=False, path_type=Path), metavar="TRACE.csv.gz")
@click.option(
    "--schema",
    "schema_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the schema goes.  [default: schema.json beside the trace]",
)
@click.option("--all", "everything", is_flag=True, help="Failed runs too; the column outcome tells them.")
@json_option
@with_settings
def export(
    settings: Settings, trace: Path, schema_path: Path | None, everything: bool, as_json: bool
) -> None:
    """Write the captured runs to a TRACE file, which evaluate, train and simulate read.

    Workers capture some of their runs, up to 50 a second each; Redis keeps the last 50,000 (`traces_max`).

    \b
    Example:
      tqe ml export jobs.csv.gz && tqe ml evaluate jobs.csv.gz --schema schema.json
    """
    from tqe.ml import traces

    schema_path = schema_path or trace.with_name("schema.json")
    with opened(settings) as queue:
        runs = traces.parse(learning.traces(queue.door, queue.keys), counted=not everything)
    traces.write(trace, schema_path, runs)
    if as_json:
        emit({"trace": str(trace), "schema": str(schema_path), "runs": len(runs)})
    else:
        click.echo(f"wrote {count(len(runs), 'run')} to {trace}, the schema to {schema_path}")


@click.command()
@click.argument("lane", required=False)
@click.argument("mode", required=False, type=click.Choice(MODES))
@json_option
@with_settings
def mode(settings: Settings, lane: str | None, mode: str | None, as_json: bool) -> None:
    """Show or set how LANE is ordered: fifo, shadow, bounded or sjf.

    fifo: as submitted. bounded (the default): short jobs first, but nobody is overtaken by what came more
    than T later. sjf: short jobs first; the longest pay. shadow: as submitted, but predicted, to look before
    switching. Workers follow within seconds. Without MODE: show; without LANE: all lanes.

    \b
    Examples:
      tqe ml mode
      tqe ml mode low sjf
    """
    with opened(settings) as queue:
        lane = None if lane is None else lane.lower()
        if lane is not None and mode is not None:
            if lane not in settings.lanes:
                raise UnknownLane(f"there is no lane {lane}; there are: {', '.join(settings.lanes)}")
            learning.set_mode(queue.door, queue.keys, [lane], mode)
        found = _modes(settings, learning.state(queue.door, queue.keys))
    if lane is not None:
        found = {name: one for name, one in found.items() if name == lane}
    if as_json:
        emit(found)
        return
    for name, one in found.items():
        click.echo(f"{name}: {one}")


def _modes(settings: Settings, state: ModelState) -> dict[str, str]:
    return {lane: state.mode(lane) for lane in dict.fromkeys([*settings.lanes, *state.modes])}


@click.command()
@json_option
@with_settings
def status(settings: Settings, as_json: bool) -> None:
    """Show what orders the lanes: modes, model, how often it was asked and could not answer.

    The rung says what predicts: the model, the hierarchical mean, or nothing (fifo), which is also where an
    order ends up that no longer pays.

    \b
    Example:
      tqe ml status --json | jq .rung
    """
    with opened(settings) as queue:
        state = learning.state(queue.door, queue.keys)
        held = learning.traces_held(queue.door, queue.keys)
    modes = _modes(settings, state)
    if as_json:
        emit(_as_dict(state, modes))
        return
    rows = table("lane", "mode")
    for lane, one in modes.items():
        rows.add_row(lane, one)
    show(rows)
    click.echo()
    show(
        facts(
            [
                ("rung", state.rung),
                ("version", f"{state.version} ({state.chosen})" if state.version else "none was published"),
                ("trained", state.trained_at or None),
                ("previous", state.previous or None),
                ("T", duration(state.bound_us / 1e6) if state.bound_us else None),
                ("traces", number(held)),
                ("scored", number(state.scored)),
                *(
                    (f"fell back: {reason}", number(times))
                    for reason, times in sorted(state.fallbacks.items())
                ),
                *((f"refused {sha256[:12]}", reason) for sha256, reason in state.refused.items()),
            ]
        )
    )


def _as_dict(state: ModelState, modes: dict[str, str]) -> dict[str, Any]:
    # Scripts of others rely on these names, and on no more of them.
    return {
        "mode": modes,
        "rung": state.rung,
        "model": {
            "version": state.version,
            "sha256": state.sha256 or None,
            "trained_at": state.trained_at,
        }
        if state.version
        else None,
        "scored": state.scored,
        "fallbacks": dict(state.fallbacks),
    }


@click.command()
@json_option
@with_settings
@click.pass_context
def rollback(ctx: click.Context, settings: Settings, as_json: bool) -> None:
    """Go back to the version before the one in use. A second rollback undoes the first.

    Exit code 1 if there is none.
    """
    with opened(settings) as queue:
        done = learning.rollback(queue.door, queue.keys)
    if as_json:
        emit(None if done is None else {"from": done[0], "to": done[1]})
    elif done is None:
        out().print("there is no version to go back to")
    else:
        out().print(f"back from {done[0]} to {done[1]}; workers follow within seconds")
    if done is None:
        ctx.exit(1)
