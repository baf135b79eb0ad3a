"""Submitting from the command line: `tqe submit`, one job or a stream of NDJSON lines."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, cast

import click

from tqe import settings as settings_module
from tqe.app import load_app
from tqe.cli.options import json_option, where_options
from tqe.cli.output import about, emit, err, number, shown
from tqe.client import Client, JobHandle, submission_from_json
from tqe.codec.payload import parse_json
from tqe.errors import PartialSubmit, PayloadTooLarge, ResultTimeout, SubmitError, TQEError
from tqe.registry import Registry
from tqe.settings import Settings
from tqe.store.forecast import Forecast

LINES_AT_ONCE: Final = 10_000  # bounds what is remembered of a stream of any length
SHOWN_MAX: Final = 20  # bad lines that people are shown
TOLD_MAX: Final = 1_000  # bad lines that --json lists
_LINE_EXTRA_BYTES: Final = 65_536  # a line may be longer than its payload by its type and options
_WAIT_FOREVER: Final = math.inf


@click.command()
@click.argument("type_name", metavar="[TYPE]", required=False)
@click.argument("payload", metavar="[PAYLOAD]", required=False)
@click.option(
    "--file", "source", metavar="FILE", help="Submit the lines of an NDJSON file ('-': standard input)."
)
@click.option("--priority", metavar="LANE", help="The lane: high, normal, low, or what you configured.")
@click.option("--idempotency-key", metavar="KEY", help="A second submission with KEY finds the first job.")
@click.option("--delay", type=float, metavar="SECONDS", help="Run it that much later.")
@click.option("--run-at", metavar="TIME", help="Run it at an ISO 8601 time (local, unless it names a zone).")
@click.option("--timeout", type=float, metavar="SECONDS", help="Stop a run that takes longer.")
@click.option("--max-retries", type=int, metavar="N", help="Retries after the first try.")
@click.option("--expires", type=float, metavar="SECONDS", help="Drop it if it has not started by then.")
@click.option(
    "--wait",
    is_flag=False,
    flag_value=_WAIT_FOREVER,
    type=click.FloatRange(0),
    metavar="[SECONDS]",
    help="Wait for the result and print it; --wait=5 gives up after 5 s.",
)
@click.option("--predict", is_flag=True, help="Tell how long it will wait and run, by measured means.")
@click.option("--app", metavar="MODULE:APP", help="Check types and arguments as this App has them.")
@json_option
@where_options
@click.pass_context
def submit(
    ctx: click.Context,
    type_name: str | None,
    payload: str | None,
    source: str | None,
    priority: str | None,
    idempotency_key: str | None,
    delay: float | None,
    run_at: str | None,
    timeout: float | None,
    max_retries: int | None,
    expires: float | None,
    wait: float | None,
    predict: bool,
    app: str | None,
    as_json: bool,
    redis_url: str | None,
    namespace: str | None,
    data_dir: str | None,
) -> None:
    """Submit one job of TYPE with PAYLOAD, a JSON object ('-' reads it from standard input; {} by default).

    With --file, submit one job a line: {"type", "payload", "priority", "idempotencyKey", "delay", "timeout",
    "maxRetries", "expires"}, all but the type optional. Good lines go in, ten thousand at a time; bad ones
    are reported by their number, and the exit code is 1 if there were any.

    \b
    Examples:
      tqe submit EMAIL '{"to": "a@example.com"}'
      tqe submit EMAIL '{"to": "a@example.com"}' --priority high --delay 60
      tqe submit EMAIL - --idempotency-key order-17 < payload.json
      tqe submit ADD '{"a": 1, "b": 2}' --wait=10
      tqe submit ADD '{"a": 1, "b": 2}' --predict --json | jq .predicted_wait_ms
      tqe submit --file jobs.ndjson
      zcat jobs.ndjson.gz | tqe submit --file -
    """
    if (source is None) == (type_name is None):
        raise click.UsageError("give the TYPE of a job, or --file with many")
    if source is not None and (wait is not None or idempotency_key is not None or predict):
        raise click.UsageError("--wait, --predict and --idempotency-key are for a single job, not for a file")
    where = {"redis_url": redis_url, "namespace": namespace, "data_dir": data_dir}
    options = {
        "priority": priority,
        "idempotency_key": idempotency_key,
        "delay": delay,
        "run_at": None if run_at is None else _time(run_at),
        "timeout": timeout,
        "max_retries": max_retries,
        "expires": expires,
    }
    options = {name: value for name, value in options.items() if value is not None}
    settings, registry = _with_app(app, where)
    with Client(settings, registry=registry) as client:
        if type_name is not None:
            body = _payload(payload, settings)
            handle = client.submit(type_name, body, **options)
            expected = handle.forecast() if predict else None
            if wait is None:
                _tell(handle, expected, as_json=as_json)
            else:
                _await(handle, expected, wait, as_json=as_json)
        elif source is not None and not _submit_stream(client, source, options, as_json=as_json):
            ctx.exit(1)


def _with_app(app: str | None, given: Mapping[str, object]) -> tuple[Settings, Registry | None]:
    """The settings, and the tasks if an app was named; what its code says counts less than all else."""
    if app is None:
        return settings_module.load(cli=given), None
    loaded = load_app(app)
    return settings_module.load(code=loaded.code_settings, cli=given), loaded.registry


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as e:
        raise click.BadParameter(
            f"{text!r} is no ISO 8601 time, such as 2030-01-31T08:00 or 2030-01-31T08:00:00Z",
            param_hint="--run-at",
        ) from e


# ------------------------------------------------------------------ one job


def _payload(text: str | None, settings: Settings) -> dict[str, Any]:
    limit = settings.payload_max_bytes
    if text is None:
        return {}
    if text != "-":
        return parse_json(text, payload_max_bytes=limit)
    raw = sys.stdin.buffer.read(limit + _LINE_EXTRA_BYTES)
    return parse_json(raw, payload_max_bytes=limit + _LINE_EXTRA_BYTES)


def _tell(handle: JobHandle, expected: Forecast | None, *, as_json: bool) -> None:
    if as_json:
        emit(_answer(handle, expected))
        return
    click.echo(handle.id)
    _foretell(expected)
    if not handle.created:
        click.echo("this is the job that holds the idempotency key; no new one was created", err=True)


def _await(handle: JobHandle, expected: Forecast | None, wait: float, *, as_json: bool) -> None:
    if not as_json:
        click.echo(handle.id, err=True)
        _foretell(expected)
    try:
        result = handle.result(None if wait == _WAIT_FOREVER else wait)
    except TQEError as e:
        if as_json:
            status = "timeout" if isinstance(e, ResultTimeout) else handle.status()
            emit(_answer(handle, expected) | {"status": status, "error": str(e)})
        raise
    emit(_answer(handle, expected) | {"status": "completed", "result": result} if as_json else result)


def _answer(handle: JobHandle, expected: Forecast | None) -> dict[str, Any]:
    told = {"id": handle.id, "created": handle.created}
    return told if expected is None else told | expected.as_dict()


def _foretell(expected: Forecast | None) -> None:
    """For people, beside the output: that is the id or the result alone."""
    if expected is not None:
        wait, run = about(expected.predicted_wait_ms), about(expected.predicted_ms)
        click.echo(f"starts in about {wait or '?'}, runs for about {run or '?'}", err=True)


# ------------------------------------------------------------------ many jobs


@dataclass
class Tally:
    """What became of the lines of a stream."""

    created: int = 0
    duplicate: int = 0
    rejected: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)

    def reject(self, line: int, error: BaseException) -> None:
        self.rejected += 1
        if len(self.errors) < TOLD_MAX:
            self.errors.append((line, str(error)))


def _submit_stream(client: Client, source: str, options: Mapping[str, Any], *, as_json: bool) -> bool:
    """Submit all lines; whether all of them were good."""
    # Options that count for all lines are the command line's own mistakes, not those of each line.
    client.core.options(None, options)
    tally = Tally()
    with _open(source) as stream:
        size = _size(stream)
        with _progress(size, show=not as_json) as progress:
            lines = Lines(stream, client.core.settings.payload_max_bytes, tally)
            try:
                while chunk := list(islice(lines, LINES_AT_ONCE)):
                    _submit_chunk(client, chunk, options, tally, progress, lines)
            except TQEError as e:
                _report(tally, as_json=as_json)
                raise e
    _report(tally, as_json=as_json)
    return tally.rejected == 0


Submission = tuple[str, dict[str, Any], dict[str, Any]]


class Lines(Iterator[tuple[int, Submission]]):
    """The good submissions of a stream with the numbers of their lines; the bad ones go to the tally."""

    def __init__(self, stream: IO[bytes], payload_max_bytes: int, tally: Tally) -> None:
        self.bytes_read = 0
        self._stream = stream
        self._payload_max_bytes = payload_max_bytes
        self._line_max_bytes = payload_max_bytes + _LINE_EXTRA_BYTES
        self._tally = tally
        self._line = 0

    def __next__(self) -> tuple[int, Submission]:
        while True:
            raw = self._read()
            if self._line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # what some editors put first
            if not raw.strip():
                continue
            try:
                if len(raw) > self._line_max_bytes:
                    raise PayloadTooLarge(len(raw), self._payload_max_bytes)
                submission = submission_from_json(
                    raw.strip(), payload_max_bytes=self._payload_max_bytes + _LINE_EXTRA_BYTES
                )
            except SubmitError as e:
                self._tally.reject(self._line, e)
                continue
            return self._line, submission

    def _read(self) -> bytes:
        """The next line; of one that is too long only as much as shows it."""
        raw = self._stream.readline(self._line_max_bytes + 2)
        if not raw:
            raise StopIteration
        self._line += 1
        self.bytes_read += len(raw)
        rest = raw
        while len(rest) > self._line_max_bytes and not rest.endswith(b"\n"):
            rest = self._stream.readline(self._line_max_bytes + 2)
            self.bytes_read += len(rest)
        return raw


def _submit_chunk(
    client: Client,
    chunk: list[tuple[int, Submission]],
    options: Mapping[str, Any],
    tally: Tally,
    progress: Progress,
    lines: Lines,
) -> None:
    numbers = array("Q", [line for line, _ in chunk])
    # Without options of their own the items are pairs: those of one type are packed all at once.
    items = [submission if submission[2] else submission[:2] for _, submission in chunk]
    before = tally.created + tally.duplicate + tally.rejected

    def tell(done: int) -> None:
        progress.jobs(before + done, lines.bytes_read)

    try:
        handles = client.submit_many(items, collect=True, progress=tell, **options)
    except PartialSubmit as e:
        created = sum(handle.created for handle in e.handles)
        tally.created += created
        tally.duplicate += len(e.handles) - created
        raise
    tally.created += handles.created
    tally.duplicate += handles.duplicates
    for position, error in handles.refused.items():
        tally.reject(numbers[position], error)


def _report(tally: Tally, *, as_json: bool) -> None:
    tally.errors.sort()
    if as_json:
        emit(
            {
                "created": tally.created,
                "duplicate": tally.duplicate,
                "rejected": tally.rejected,
                "errors": [{"line": line, "error": error} for line, error in tally.errors],
            }
        )
        return
    for line, error in tally.errors[:SHOWN_MAX]:
        click.echo(f"line {line}: {shown(error)}", err=True)
    if tally.rejected > SHOWN_MAX:
        click.echo(f"… and {number(tally.rejected - SHOWN_MAX)} more bad lines", err=True)
    click.echo(
        f"{number(tally.created)} created, {number(tally.duplicate)} duplicate,"
        f" {number(tally.rejected)} rejected"
    )


def _open(source: str) -> AbstractContextManager[IO[bytes]]:
    if source == "-":
        return nullcontext(cast(IO[bytes], sys.stdin.buffer))
    try:
        return Path(source).open("rb")
    except OSError as e:
        raise click.FileError(source, e.strerror or str(e)) from e


def _size(stream: IO[bytes]) -> int | None:
    """Bytes that are to be read, None for what has no end that could be known."""
    if not stream.seekable():
        return None
    here = stream.tell()
    end = stream.seek(0, 2)
    stream.seek(here)
    return end - here


class Progress:
    """A bar over the bytes of the file with the number of jobs beside it; silent where nobody looks."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar = bar
        self._task = task

    def jobs(self, done: int, bytes_done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=bytes_done, jobs=number(done))


class _progress(AbstractContextManager[Progress]):
    """The bar while the block runs, if stderr is a terminal."""

    def __init__(self, size: int | None, *, show: bool) -> None:
        self._size = size
        self._show = show and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not self._show:
            return Progress()
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("submitting"),
            BarColumn(),
            TextColumn("{task.fields[jobs]} jobs"),
            TimeElapsedColumn(),
            console=err(),
            transient=True,
        )
        self._bar.start()
        return Progress(self._bar, self._bar.add_task("", total=self._size, jobs="0"))

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
