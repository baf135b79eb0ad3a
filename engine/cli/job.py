"""One job: `tqe job` shows it, `tqe cancel` asks for it not to run."""

from __future__ import annotations

import json
from datetime import datetime

import click

from tqe.cli.options import json_option, with_settings
from tqe.cli.output import about, duration, emit, facts, moment, show, shown
from tqe.client import Client
from tqe.job import JobStatus, split_job_id
from tqe.settings import Settings
from tqe.store.forecast import Forecast, forecast

_WORDS = {
    "cancelled": "cancelled: it will not run",
    "requested": "requested: a worker ends it, or drops it when its turn comes",
    "too_late": "too late: it has ended already",
    "unknown": "unknown: its record has expired, or it never was",
}


def check_id(name: str) -> str:
    """The id as it is written in Redis; a usage error if it cannot be one."""
    written = name.strip().upper()
    try:
        split_job_id(written)
    except ValueError:
        try:
            split_job_id(name)  # to be told of it as it was given
        except ValueError as e:
            raise click.UsageError(str(e)) from e
    return written


@click.command()
@click.argument("job_id", metavar="ID")
@json_option
@with_settings
@click.pass_context
def job(ctx: click.Context, settings: Settings, job_id: str, as_json: bool) -> None:
    """Show what is known of the job ID: status, times, result or error.

    Of a job that has not ended, also how long it will run and wait, by measured means, where there are any. A
    job's record is kept for an hour after its end (`result_ttl_s`). Exit code 1 if nothing is known.

    \b
    Examples:
      tqe job 01JD8Z3V7Q8K2M4N6P8R0T2W00.0
      tqe job 01JD8Z3V7Q8K2M4N6P8R0T2W00.0 --json | jq .result
    """
    name = check_id(job_id)
    with Client(settings) as client:
        found = client.job(name)
        expected = client.run(forecast(client.core.keys, settings.lanes, found))
    if as_json:
        emit(found.as_dict() | expected.as_dict())
    else:
        show(facts(_rows(found, expected)))
    if found.status == "unknown":
        ctx.exit(1)


def _rows(found: JobStatus, expected: Forecast) -> list[tuple[str, str | None]]:
    status = found.status
    if status == "unknown":
        status += ": its record has expired, or it never was"
    return [
        ("id", found.id),
        ("type", found.type),
        ("status", status),
        ("lane", found.lane),
        ("attempts", str(found.attempts) if found.status != "unknown" else None),
        ("submitted", moment(found.submitted_at)),
        ("starts in about", about(expected.predicted_wait_ms)),
        ("started", moment(found.started_at)),
        ("runs for about", about(expected.predicted_ms)),
        ("finished", _finished(found.started_at, found.finished_at)),
        ("result", _as_text(found.result) if found.status == "completed" else None),
        ("error", shown(found.error) if found.error else None),
    ]


def _finished(started: datetime | None, finished: datetime | None) -> str | None:
    text = moment(finished)
    if text is None or started is None or finished is None:
        return text
    return f"{text}, {duration(max(0.0, (finished - started).total_seconds()))} after its start"


def _as_text(value: object) -> str:
    return shown(json.dumps(value, ensure_ascii=False))


@click.command()
@click.argument("job_id", metavar="ID")
@json_option
@with_settings
@click.pass_context
def cancel(ctx: click.Context, settings: Settings, job_id: str, as_json: bool) -> None:
    """Ask for the job ID not to run, or to stop if it runs.

    A job that runs is interrupted where that is possible: at its next await, or in Python code. Exit code 1
    if it has ended already or is not known.

    \b
    Example:
      tqe cancel 01JD8Z3V7Q8K2M4N6P8R0T2W00.0
    """
    name = check_id(job_id)
    with Client(settings) as client:
        outcome = client.cancel(name)
    if as_json:
        emit({"id": name, "outcome": outcome})
    else:
        click.echo(_WORDS.get(outcome, outcome))
    if outcome not in ("cancelled", "requested"):
        ctx.exit(1)
