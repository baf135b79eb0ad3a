"""The whole queue at a glance: `tqe status`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from tqe import clock
from tqe.cli.options import json_option, with_settings
from tqe.cli.output import count, duration, emit, number, out, show, table
from tqe.client import Client
from tqe.settings import Settings
from tqe.store.reading import QueueStatus, WorkerStatus

_WORKERS_SHOWN: Final = 64


@click.command()
@click.option("--watch", is_flag=True, help="Go on showing it until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="With --watch, how often.",
)
@json_option
@with_settings
def status(settings: Settings, watch: bool, interval: float, as_json: bool) -> None:
    """Show lanes, totals and workers.

    Counts are jobs. What runs is published by the workers once a second; totals count since ever. --watch and
    --json together print a line of JSON each time.

    \b
    Examples:
      tqe status
      tqe status --watch
      tqe status --json | jq .lanes.high.queued
    """
    with Client(settings) as client:
        if not watch:
            found = client.status()
            if as_json:
                emit(found.as_dict())
            else:
                show(picture(found, None, None))
        elif as_json:
            _repeat(interval, lambda: emit(client.status().as_dict()))
        else:
            _watch(client, interval)


def _repeat(interval: float, act: Callable[[], None]) -> None:
    while True:
        act()
        time.sleep(interval)


def _watch(client: Client, interval: float) -> None:
    before: QueueStatus | None = None
    before_ns = 0
    with Live(console=out(), auto_refresh=False, screen=out().is_terminal) as live:

        def look() -> None:
            nonlocal before, before_ns
            now, now_ns = client.status(), clock.monotonic_ns()
            passed_s = (now_ns - before_ns) / 1e9 if before is not None else None
            live.update(picture(now, before, passed_s), refresh=True)
            before, before_ns = now, now_ns

        _repeat(interval, look)


def picture(found: QueueStatus, before: QueueStatus | None, passed_s: float | None) -> RenderableType:
    """The status as people see it; with an earlier one, also what happened in a second since then."""
    parts: list[RenderableType] = [_lanes(found), Text(), _totals(found, before, passed_s)]
    if found.quarantined_frames or found.parked_frames:
        parts.append(
            Text(
                f"{count(found.quarantined_frames, 'damaged frame')} in quarantine,"
                f" {number(found.parked_frames)} of another version parked: see `tqe doctor`",
                style="yellow",
            )
        )
    parts += [Text(), _workers(found), *_scaling(found)]
    return Group(*parts)


def _lanes(found: QueueStatus) -> RenderableType:
    rows = table("lane", "queued", "sorted", "", right=("queued", "sorted"))
    for name, lane in found.lanes.items():
        rows.add_row(name, number(lane.queued), number(lane.sorted), "paused" if lane.paused else "")
    return rows


def _totals(found: QueueStatus, before: QueueStatus | None, passed_s: float | None) -> RenderableType:
    now = f"running {number(found.running)}   scheduled {number(found.scheduled)}   dead {number(found.dead)}"
    rows = table("total", "jobs", "per second" if passed_s else "", right=("jobs", "per second"))
    for name in found.as_dict()["totals"]:
        rate = ""
        if before is not None and passed_s:
            rate = number(round((found.totals.get(name, 0) - before.totals.get(name, 0)) / passed_s))
        rows.add_row(name, number(found.totals.get(name, 0)), rate)
    return Group(Text(now), Text(), rows)


def _workers(found: QueueStatus) -> RenderableType:
    if not found.workers:
        return Text("no worker runs: start some with `tqe run`", style="yellow")
    rows = table("worker", "pid", "cpu", "state", "job", "type", "since", right=("worker", "pid", "cpu"))
    for worker in found.workers[:_WORKERS_SHOWN]:
        rows.add_row(*_worker(worker))
    if len(found.workers) > _WORKERS_SHOWN:
        return Group(rows, Text(f"… and {number(len(found.workers) - _WORKERS_SHOWN)} more workers"))
    return rows


def _scaling(found: QueueStatus) -> list[RenderableType]:
    return [
        Text(f"{host}: {told.workers} of {told.fewest} to {told.most} workers wanted: {told.text}")
        for host, told in found.scaling.items()
    ]


def _worker(worker: WorkerStatus) -> tuple[str, ...]:
    job = worker.jobs[0] if worker.jobs else None
    more = f" and {number(len(worker.jobs) - 1)} more" if len(worker.jobs) > 1 else ""
    return (
        str(worker.worker),
        str(worker.pid),
        "" if worker.cpu is None else str(worker.cpu),
        worker.state,
        f"{job.id}{more}" if job else "",
        job.type if job else "",
        duration(max(0.0, (clock.wall_ms() - job.since_ms) / 1000)) if job else "",
    )
