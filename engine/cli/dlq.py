"""The dead-letter queue: `tqe dlq list`, `show`, `replay`, `purge`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from typing import TypeVar

import click

from tqe.cli.job import check_id
from tqe.cli.options import json_option, with_settings
from tqe.cli.output import cut_error, emit, err, facts, moment, number, shown, table
from tqe.cli.output import show as display
from tqe.client import Client
from tqe.settings import Settings
from tqe.store.producing import Replayed
from tqe.store.reading import DeadJob

T = TypeVar("T")

_type = click.option("--type", "type_name", metavar="TYPE", help="Only jobs of this type.")
_reason = click.option(
    "--reason", metavar="TEXT", help="Only jobs whose reason begins so: failed, crash, arguments, …"
)
_all = click.option("--all", "everything", is_flag=True, help="All that match --type and --reason.")
_yes = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


@click.group()
def dlq() -> None:
    """Jobs that failed for good: list, show, replay, purge.

    \b
    Examples:
      tqe dlq list --type EMAIL
      tqe dlq show 01JD8Z3V7Q8K2M4N6P8R0T2W00.0
      tqe dlq replay 01JD8Z3V7Q8K2M4N6P8R0T2W00.0
      tqe dlq replay --all --type EMAIL
      tqe dlq purge --all --reason arguments --yes
    """


@dlq.command("list")
@_type
@_reason
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    metavar="N",
    help="At most N jobs (0: all).",
)
@json_option
@with_settings
def list_(settings: Settings, type_name: str | None, reason: str | None, limit: int, as_json: bool) -> None:
    """List dead jobs, the newest first.

    \b
    Examples:
      tqe dlq list
      tqe dlq list --reason crash --limit 0 --json
    """
    with Client(settings) as client:
        found = client.dead_jobs(type_name=type_name, reason=reason)
        jobs = list(islice(found, limit)) if limit else list(found)
        more = bool(limit) and next(found, None) is not None
    if as_json:
        emit([job.as_dict() for job in jobs])
        return
    rows = table("id", "type", "reason", "attempts", "died", "error", right=("attempts",))
    for job in jobs:
        rows.add_row(*_row(job))
    if jobs:
        display(rows)
    else:
        click.echo("no dead jobs" + (" that match" if type_name or reason else ""))
    if more:
        click.echo("… and more; --limit 0 lists all of them", err=True)


def _row(job: DeadJob) -> tuple[str, ...]:
    return (
        job.id,
        shown(job.type or "?"),
        shown(job.reason or "?"),
        str(job.attempts),
        moment(job.died_at) or "?",
        cut_error(job.error, 80),
    )


@dlq.command()
@click.argument("job_id", metavar="ID")
@json_option
@with_settings
def show(settings: Settings, job_id: str, as_json: bool) -> None:
    """Show one dead job with its payload and its last error.

    \b
    Example:
      tqe dlq show 01JD8Z3V7Q8K2M4N6P8R0T2W00.0
    """
    name = check_id(job_id)
    with Client(settings) as client:
        job = client.dead_job(name)
    if job is None:
        raise click.ClickException(f"{name} is not in the dead-letter queue")
    if as_json:
        emit(job.as_dict())
        return
    payload = None if job.payload is None else shown(json.dumps(job.payload, ensure_ascii=False))
    rows = [
        ("id", job.id),
        ("type", shown(job.type or "?")),
        ("lane", shown(job.lane or "?")),
        ("reason", shown(job.reason or "?")),
        ("attempts", str(job.attempts)),
        ("crashes", str(job.crashes)),
        ("died", moment(job.died_at)),
        ("payload", payload or "cannot be read"),
        ("error", shown(job.error.rstrip()) if job.error else None),
    ]
    display(facts(rows))


@dlq.command()
@click.argument("job_ids", metavar="[ID]...", nargs=-1)
@_type
@_reason
@_all
@_yes
@json_option
@with_settings
@click.pass_context
def replay(
    ctx: click.Context,
    settings: Settings,
    job_ids: tuple[str, ...],
    type_name: str | None,
    reason: str | None,
    everything: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Run dead jobs again, from their first attempt and under their old ids.

    Each is replayed at most once, however many people ask for it. Exit code 1 if one of the given ids was
    not there.

    \b
    Examples:
      tqe dlq replay 01JD8Z3V7Q8K2M4N6P8R0T2W00.0
      tqe dlq replay --all
      tqe dlq replay --all --type EMAIL --yes
    """
    names = _names(job_ids, everything, type_name, reason)
    with Client(settings) as client:
        if names:
            done = client.replay(*names)
        else:
            _ask("replay", type_name, reason, yes)
            done = _with_counter(
                "replayed",
                as_json,
                lambda tell: client.replay_all(type_name=type_name, reason=reason, progress=tell),
            )
    if as_json:
        emit(
            {
                "replayed": len(done.replayed),
                "missing": list(done.missing),
                "damaged": list(done.damaged),
                "unknown": list(done.unknown),
            }
        )
    else:
        _tell(done)
    if names and len(done.replayed) < len(set(names)):
        ctx.exit(1)


def _tell(done: Replayed) -> None:
    click.echo(f"{number(len(done.replayed))} replayed")
    for what, ids in (
        ("not in the dead-letter queue", done.missing),
        ("damaged, left where it is", done.damaged),
        ("the answer was lost; it is not dead any more", done.unknown),
    ):
        for name in ids:
            click.echo(f"{name}: {what}", err=True)


@dlq.command()
@click.argument("job_ids", metavar="[ID]...", nargs=-1)
@_type
@_reason
@_all
@_yes
@json_option
@with_settings
@click.pass_context
def purge(
    ctx: click.Context,
    settings: Settings,
    job_ids: tuple[str, ...],
    type_name: str | None,
    reason: str | None,
    everything: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete dead jobs for good. Exit code 1 if one of the given ids was not there.

    \b
    Examples:
      tqe dlq purge 01JD8Z3V7Q8K2M4N6P8R0T2W00.0
      tqe dlq purge --all --reason arguments --yes
    """
    names = _names(job_ids, everything, type_name, reason)
    with Client(settings) as client:
        if names:
            count = client.purge(*names)
        else:
            _ask("delete", type_name, reason, yes)
            count = _with_counter(
                "purged",
                as_json,
                lambda tell: client.purge_all(type_name=type_name, reason=reason, progress=tell),
            )
    if as_json:
        emit({"purged": count})
    else:
        click.echo(f"{number(count)} purged")
    if names and count < len(set(names)):
        ctx.exit(1)


def _names(
    job_ids: tuple[str, ...], everything: bool, type_name: str | None, reason: str | None
) -> tuple[str, ...]:
    """The ids that were given, none for all that match; a usage error for anything in between."""
    if job_ids and (everything or type_name or reason):
        raise click.UsageError("give ids, or --all with --type and --reason, not both")
    if not job_ids and not everything:
        raise click.UsageError("give the ids of dead jobs, or --all (with --type or --reason to narrow it)")
    return tuple(check_id(one) for one in job_ids)


def _ask(verb: str, type_name: str | None, reason: str | None, yes: bool) -> None:
    if yes:
        return
    what = f"all dead jobs{f' of type {type_name}' if type_name else ''}"
    what += f" whose reason begins with {reason!r}" if reason else ""
    if not sys.stdin.isatty():
        raise click.UsageError(f"this would {verb} {what}: add --yes if it should")
    click.confirm(f"{verb} {what}?", abort=True, err=True)


def _with_counter(what: str, as_json: bool, act: Callable[[Callable[[int], None]], T]) -> T:
    """Do it with a count of what is done on a terminal."""
    if as_json or not sys.stderr.isatty():
        return act(lambda done: None)
    with err().status(f"0 {what}") as spinner:
        return act(lambda done: spinner.update(f"{number(done)} {what}"))
