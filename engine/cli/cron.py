"""Schedules: `tqe cron list`, `next`, `run`, `pause`, `resume`, `remove`."""

from __future__ import annotations

from itertools import islice
from typing import Final

import click

from tqe.cli.options import json_option, with_settings
from tqe.cli.output import count, duration, emit, moment, shown, table
from tqe.cli.output import show as display
from tqe.client import Client
from tqe.job import to_datetime, to_iso
from tqe.schedule import Schedule, slot_text
from tqe.settings import Settings
from tqe.store import scheduling
from tqe.store.scheduling import Row, View

UPCOMING_MAX: Final = 10_000


@click.group()
def cron() -> None:
    """Schedules of the apps that run: list, next, run, pause, resume, remove.

    Schedules come from `@app.cron(…)` and from [[cron]] tables in tqe.toml; `tqe run` registers them.

    \b
    Examples:
      tqe cron list
      tqe cron next nightly -n 3
      tqe cron pause nightly
    """


@cron.command("list")
@json_option
@with_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List schedules: when each submits which job.

    \b
    Examples:
      tqe cron list
      tqe cron list --json | jq '.[] | select(.paused)'
    """
    with Client(settings) as client:
        view = _look(client)
    if as_json:
        emit([row.as_dict(view.now_ms) for row in view.rows.values()])
        return
    if not view.rows:
        click.echo("no schedules: `tqe run` registers those of its app when it starts")
        return
    rows = table("name", "type", "when", "missed", "last job", "next", "app")
    for row in view.rows.values():
        rows.add_row(*_cells(row, view.now_ms))
    display(rows)


def _cells(row: Row, now_ms: int) -> tuple[str, ...]:
    one = row.schedule
    coming = "paused" if row.paused else moment(to_datetime(row.next_ms(now_ms) or 0))
    return (one.name, one.type, _when(one), one.missed, row.last_job or "-", coming or "-", shown(row.app))


def _when(one: Schedule) -> str:
    when = f"every {duration(one.every_ms / 1000)}" if one.every_ms else f"{one.expression}  {one.tz}"
    return f"{when}, within {duration(one.jitter_ms / 1000)}" if one.jitter_ms else when


@cron.command("next")
@click.argument("name", metavar="[NAME]", required=False)
@click.option(
    "-n",
    "--count",
    "number",
    type=click.IntRange(1, UPCOMING_MAX),
    default=5,
    show_default=True,
    metavar="N",
    help="How many slots.",
)
@json_option
@with_settings
def next_(settings: Settings, name: str | None, number: int, as_json: bool) -> None:
    """Show the next slots of the schedule NAME, or of all of them in order.

    With a jitter window a job starts some time after its slot: `due` in --json.

    \b
    Examples:
      tqe cron next
      tqe cron next nightly -n 3 --json
    """
    with Client(settings) as client:
        view = _look(client)
    rows = [_row(view, name)] if name is not None else list(view.rows.values())
    found = sorted(
        (slot, row.schedule.name)
        for row in rows
        if not row.paused
        for slot in islice(row.schedule.after(view.now_ms), number)
    )[:number]
    schedules = {row.schedule.name: row.schedule for row in rows}
    if as_json:
        emit([_slot_record(schedules[one], slot) for slot, one in found])
        return
    if not found:
        click.echo("paused: it has no next slot" if name is not None else "nothing is scheduled")
    for slot, one in found:
        click.echo(f"{slot_text(slot, schedules[one].tz)}  {one}")


def _slot_record(one: Schedule, slot_ms: int) -> dict[str, str | None]:
    return {
        "name": one.name,
        "slot": to_iso(to_datetime(slot_ms)),
        "local": slot_text(slot_ms, one.tz),
        "due": to_iso(to_datetime(one.due_ms(slot_ms))),
    }


@cron.command()
@click.argument("name", metavar="NAME")
@json_option
@with_settings
def run(settings: Settings, name: str, as_json: bool) -> None:
    """Submit the job of the schedule NAME now, beside its slots.

    \b
    Example:
      tqe cron run nightly
    """
    with Client(settings) as client:
        view = _look(client)
        one = _row(view, name).schedule
        job = client.submit(one.type, one.payload_of(view.now_ms // 1000 * 1000), **one.options)
    if as_json:
        emit({"name": one.name, "id": job.id})
    else:
        click.echo(job.id)


@cron.command()
@click.argument("name", metavar="NAME")
@json_option
@with_settings
def pause(settings: Settings, name: str, as_json: bool) -> None:
    """Let the schedule NAME submit nothing until it is resumed. Jobs that it has submitted go on.

    \b
    Example:
      tqe cron pause nightly
    """
    with Client(settings) as client:
        _row(_look(client), name)
        client.run(scheduling.pause(client.core.keys, name))
    if as_json:
        emit({"name": name, "paused": True})
    else:
        click.echo(f"schedule {name} is paused; `tqe cron resume {name}` ends that")


@cron.command()
@click.argument("name", metavar="NAME")
@json_option
@with_settings
def resume(settings: Settings, name: str, as_json: bool) -> None:
    """Let the schedule NAME submit again. Slots of the pause are not made up for.

    \b
    Example:
      tqe cron resume nightly
    """
    with Client(settings) as client:
        view = _look(client)
        row = _row(view, name)
        if row.paused:
            client.run(scheduling.resume(client.core.keys, name, view.now_ms))
        coming = row._replace(paused=False).next_ms(view.now_ms)
    if as_json:
        emit({"name": name, "paused": False, "next": to_iso(to_datetime(coming or 0))})
    else:
        click.echo(f"schedule {name} runs; next: {moment(to_datetime(coming or 0)) or 'never'}")


@cron.command()
@click.argument("name", metavar="NAME")
@json_option
@with_settings
def remove(settings: Settings, name: str, as_json: bool) -> None:
    """Forget the schedule NAME of an app that is gone. One that its app still has comes back when the app is
    started anew: take it out of the code or tqe.toml, or pause it.

    \b
    Example:
      tqe cron remove nightly
    """
    with Client(settings) as client:
        _row(_look(client), name)
        client.run(scheduling.remove(client.core.keys, name))
    if as_json:
        emit({"name": name, "removed": True})
    else:
        click.echo(f"schedule {name} is removed")


def _look(client: Client) -> View:
    view = client.run(scheduling.look(client.core.keys))
    for name in view.damaged:
        click.echo(f"{shown(name)}: it cannot be read; start its app anew, or remove it", err=True)
    return view


def _row(view: View, name: str) -> Row:
    row = view.rows.get(name)
    if row is None:
        names = ", ".join(view.rows) or "none"
        raise click.UsageError(
            f"there is no schedule {name!r} ({count(len(view.rows), 'schedule')}: {names})"
        )
    return row
