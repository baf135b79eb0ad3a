"""The whole queue at a glance: `tqe status`."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from tqe import clock
from tqe.cli.options import json_option, with_settings
from tqe.cli.output import count, cut_error, duration, emit, number, out, show, shown, table
from tqe.cli.percentiles import Bucket, percentiles
from tqe.client import Client
from tqe.settings import Settings
from tqe.store import backlog, reading, scheduling
from tqe.store.reading import DeadJob, QueueStatus, WorkerStatus
from tqe.telemetry.metrics import TaskSample, buckets

_WORKERS_SHOWN: Final = 64
_TASKS_SHOWN: Final = 32
_ERRORS_SHOWN: Final = 5
_SCHEDULES_SHOWN: Final = 8


class Seen(NamedTuple):
    """The queue at one moment, as people are shown it. `oldest`: since when a lane's oldest job waits, in ms
    since 1970. `work`: how long one worker would be busy with what waits. `tasks`: what they did so far.
    `died`: the newest dead letters, a page of them."""

    status: QueueStatus
    oldest: Mapping[str, int]
    work: Mapping[str, backlog.LaneWork]
    tasks: Mapping[str, TaskSample]
    died: Sequence[DeadJob]
    schedules: scheduling.View
    at_ns: int


def see(client: Client) -> Seen:
    """Look once."""
    found, keys = client.status(), client.core.keys
    lanes = list(found.lanes)
    found = replace(found, workers=client.run(reading.name_jobs(keys, found.workers, 1)))
    return Seen(
        found,
        client.run(reading.oldest_waiting(keys, lanes)),
        client.run(backlog.look(keys, lanes)).lanes,
        client.run(reading.tasks(keys, found.workers)),
        client.dead_page().jobs if found.dead else (),
        client.run(scheduling.look(keys)),
        clock.monotonic_ns(),
    )


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
    """Show lanes, totals, tasks, dead letters by error, schedules and workers.

    Counts are jobs. Work is how long one worker would be busy with what waits. What runs is published by the
    workers once a second; totals count since ever, tasks since their supervisors began. --watch and --json
    together print a line of JSON each time. `tqe serve` shows the same in a browser.

    \b
    Examples:
      tqe status
      tqe status --watch
      tqe status --json | jq .lanes.high.queued
    """
    with Client(settings) as client:
        if not watch:
            if as_json:
                emit(client.status().as_dict())
            else:
                show(picture(see(client)))
        elif as_json:
            _repeat(interval, lambda: emit(client.status().as_dict()))
        else:
            _watch(client, interval)


def _repeat(interval: float, act: Callable[[], None]) -> None:
    while True:
        act()
        time.sleep(interval)


def _watch(client: Client, interval: float) -> None:
    before: Seen | None = None
    with Live(console=out(), auto_refresh=False, screen=out().is_terminal) as live:

        def look() -> None:
            nonlocal before
            now = see(client)
            live.update(picture(now, before), refresh=True)
            before = now

        _repeat(interval, look)


def picture(seen: Seen, before: Seen | None = None) -> RenderableType:
    """The status as people see it; with an earlier one, also what happened in a second since then."""
    found = seen.status
    parts: list[RenderableType] = [_lanes(seen), Text(), _totals(seen, before)]
    if found.quarantined_frames or found.parked_frames:
        parts.append(
            Text(
                f"{count(found.quarantined_frames, 'damaged frame')} in quarantine,"
                f" {number(found.parked_frames)} of another version parked: see `tqe doctor`",
                style="yellow",
            )
        )
    if seen.tasks:
        parts += [Text(), _tasks(seen, before)]
    if seen.died:
        parts += [Text(), _dead(seen)]
    if seen.schedules.rows:
        parts += [Text(), _schedules(seen.schedules)]
    parts += [Text(), _workers(found), *_scaling(found)]
    return Group(*parts)


def _dead(seen: Seen) -> RenderableType:
    """The newest dead letters by type and error, the most frequent first."""
    groups = Counter((job.type or "", job.reason or "", cut_error(job.error, 60)) for job in seen.died)
    among = "dead" if len(seen.died) >= seen.status.dead else f"of the last {number(len(seen.died))}"
    rows = table(among, "type", "reason", "error", right=(among,))
    for (kind, reason, error), jobs in groups.most_common(_ERRORS_SHOWN):
        rows.add_row(number(jobs), shown(kind), shown(reason), shown(error))
    if len(groups) > _ERRORS_SHOWN:
        return Group(rows, Text(f"… and {count(len(groups) - _ERRORS_SHOWN, 'more kind')}: `tqe dlq list`"))
    return rows


def _schedules(view: scheduling.View) -> RenderableType:
    """When each submits next, the soonest first."""
    found = sorted(
        (row.paused, row.next_ms(view.now_ms) or math.inf, name) for name, row in view.rows.items()
    )
    rows = table("schedule", "type", "next")
    for paused, next_ms, name in found[:_SCHEDULES_SHOWN]:
        wait = "-" if math.isinf(next_ms) else f"in {duration(max(0.0, next_ms - view.now_ms) / 1000)}"
        rows.add_row(shown(name), shown(view.rows[name].schedule.type), "paused" if paused else wait)
    if len(found) > _SCHEDULES_SHOWN:
        return Group(rows, Text(f"… and {number(len(found) - _SCHEDULES_SHOWN)} more: `tqe cron list`"))
    return rows


def _lanes(seen: Seen) -> RenderableType:
    right = ("queued", "sorted", "work", "oldest")
    rows = table("lane", *right, "", right=right)
    for name, lane in seen.status.lanes.items():
        since_ms = seen.oldest.get(name)
        rows.add_row(
            shown(name),
            number(lane.queued),
            number(lane.sorted),
            duration(seen.work[name].seconds) if lane.queued else "-",
            "-" if since_ms is None else duration(max(0, clock.wall_ms() - since_ms) / 1000),
            "paused" if lane.paused else "",
        )
    return rows


def _tasks(seen: Seen, before: Seen | None) -> RenderableType:
    """Run times and waits of the tasks; the percentiles are those of all runs so far."""
    numbers = ("per second" if before else "", "runs", "failed", "p50", "p95", "p99", "wait p95")
    rows = table("task", *numbers, right=numbers)
    for name, task in sorted(seen.tasks.items())[:_TASKS_SHOWN]:
        rate, earlier = "", before.tasks.get(name) if before is not None else None
        if before is not None and earlier is not None:
            rate = number(round((_runs(task) - _runs(earlier)) / (seen.at_ns - before.at_ns) * 1e9))
        run, wait = percentiles(_bounds(task.run_bins)), percentiles(_bounds(task.wait_bins))
        times = [duration(at) if run.count else "-" for at in (run.p50, run.p95, run.p99)]
        rows.add_row(
            shown(name),
            rate,
            number(_runs(task)),
            number(task.outcomes.get("failed", 0)),
            *times,
            duration(wait.p95) if wait.count else "-",
        )
    if len(seen.tasks) > _TASKS_SHOWN:
        return Group(rows, Text(f"… and {number(len(seen.tasks) - _TASKS_SHOWN)} more tasks"))
    return rows


def _runs(task: TaskSample) -> int:
    return task.outcomes.get("completed", 0) + task.outcomes.get("failed", 0)


def _bounds(bins: Sequence[int]) -> list[Bucket]:
    return [(float(le), upto) for le, upto in buckets(bins)]


def _totals(seen: Seen, before: Seen | None) -> RenderableType:
    found = seen.status
    passed_s = (seen.at_ns - before.at_ns) / 1e9 if before is not None else None
    now = f"running {number(found.running)}   scheduled {number(found.scheduled)}   dead {number(found.dead)}"
    rows = table("total", "jobs", "per second" if passed_s else "", right=("jobs", "per second"))
    for name in found.as_dict()["totals"]:
        rate = ""
        if before is not None and passed_s:
            rate = number(round((found.totals.get(name, 0) - before.status.totals.get(name, 0)) / passed_s))
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
        shown(worker.state),
        shown(f"{job.id}{more}") if job else "",
        shown(job.type) if job else "",
        duration(max(0.0, (clock.wall_ms() - job.since_ms) / 1000)) if job else "",
    )
