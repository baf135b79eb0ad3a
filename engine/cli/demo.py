"""The demo: workers on real input, live progress, a summary, and every result checked: `tqe demo`."""

from __future__ import annotations

import ctypes
import http.client
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

import click
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tqe import clock
from tqe import settings as settings_module
from tqe.cli import demo_app, demo_order
from tqe.cli.options import where_options
from tqe.cli.output import duration, number, out, show, table
from tqe.cli.percentiles import Percentiles, of_values, task_times
from tqe.client import Client, JobHandles
from tqe.job import JobStatus
from tqe.settings import Settings
from tqe.store import embedded, reading
from tqe.store.reading import QueueStatus

NAMESPACE: Final = "demo"
APP: Final = "tqe.cli.demo_app:app"
# The README's line; its type is one of examples/quickstart.py, which the project's own tqe.toml names.
CURL: Final = (
    "curl -s localhost:8080/api/v1/jobs -H 'Content-Type: application/json' -d "
    """'{"type": "EMAIL", "payload": "{\\"to\\":\\"test@example.com\\"}", "priority": "HIGH","""
    """ "idempotencyKey": "sample-001"}'"""
)
LANES: Final = ("high", "normal", "low")
LOOK_S: Final = 0.25
TELL_S: Final = 2.0  # between two lines where there is no terminal
STALL_S: Final = 120.0  # without any job that ends: something is broken
CHECK_S: Final = 8.0  # at most, for computing results again
START_S: Final = 30.0
STOP_S: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1


Records = Mapping[str, Sequence[JobStatus]]  # by task, in the order of the paths


@click.command()
@click.option(
    "--procs",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    metavar="N",
    help="Worker processes.",
)
@click.option("--files", type=click.IntRange(1), metavar="N", help="Use only N of the files.  [default: all]")
@click.option(
    "--order",
    "order_files",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what the order won there: .json, .svg, .png.",
)
@where_options
@click.pass_context
def demo(
    ctx: click.Context,
    procs: int,
    files: int | None,
    order_files: tuple[Path, ...],
    redis_url: str | None,
    namespace: str | None,
    data_dir: str | None,
) -> None:
    """Run thousands of real jobs: each source file of this Python's standard library is parsed, tokenized,
    compressed and hashed. Then learn how long they take, and run some of them again in another order.

    Starts `tqe run` in the background, shows what happens, compares the results with a direct computation and
    stops what it has started. Some of the files are broken on purpose: their jobs fail, are retried, and end
    in the dead-letter queue. The data stays, in the namespace `demo`.

    \b
    Examples:
      tqe demo
      tqe demo --procs 2 --files 200
      tqe status --namespace demo                what is left of it
      tqe dlq list --namespace demo
    """
    given = {
        "redis_url": redis_url,
        "data_dir": data_dir,
        "namespace": namespace or NAMESPACE,
        "procs": procs,
    }
    settings = replace(settings_module.load(cli=given), lanes=LANES, default_lane="normal")
    ctx.exit(0 if play(settings, files, order_files) else 1)


def play(settings: Settings, files: int | None, order_files: Sequence[Path] = ()) -> bool:
    """The whole demo; whether all went well."""
    paths, broken = demo_app.inputs()
    if files is not None:
        paths = sorted(random.Random(0).sample(paths, min(files, len(paths))))
    paths += broken
    if not paths:
        raise click.ClickException(f"there are no files in {demo_app.LIBRARY}")
    total = len(paths) * len(demo_app.TASKS)
    own = None if settings.redis_url else embedded.ensure(settings.data_dir)
    try:
        with Client(settings, registry=demo_app.app.registry) as client:
            click.echo(
                f"{number(total)} jobs: {len(demo_app.TASKS)} tasks for each of {number(len(paths))} files of"
                f" {demo_app.LIBRARY}"
            )
            with workers(settings) as run:
                began_ns = clock.monotonic_ns()
                before = client.status()
                handles = submit(client, paths)
                watch(client, before, total, run)
                took_s = (clock.monotonic_ns() - began_ns) / 1e9
                after = client.status()
                runs = run.task_times()
                records = read_all(client, handles, run)
                summarize(before, after, total, took_s, table_of(runs, records))
                compare_orders(client, settings, run, paths, records, total / took_s, order_files)
            good = check(records, paths)
            _tell_where(settings, own)
            return good
    finally:
        if own is not None:
            own.close()


def submit(client: Client, paths: Sequence[str]) -> dict[str, JobHandles]:
    """One job a file and task; the handles by task, in the order of the paths."""
    payloads = [{"path": path} for path in paths]
    return {task.name: client.submit_alike(task, payloads) for task in demo_app.TASKS}


# ------------------------------------------------------------------ the workers


@dataclass
class Run:
    """The `tqe run` of the demo."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    def must_live(self) -> None:
        if self.process.poll() is not None:
            raise click.ClickException(
                f"`tqe run` ended with {self.process.returncode}; its last words:\n{self.last_words()}"
            )

    def last_words(self) -> str:
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return "\n".join(lines[-12:])

    def task_times(self) -> dict[str, Percentiles]:
        """Run times by task, from the workers' own histograms; nothing if they cannot be had."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/metrics")
            return task_times(connection.getresponse().read().decode())
        except (OSError, http.client.HTTPException, ValueError):
            return {}
        finally:
            connection.close()


@contextmanager
def workers(settings: Settings) -> Iterator[Run]:
    """`tqe run` in the background, ready; stopped at the end, whatever happens in between."""
    from tqe.supervisor.lifecycle import check_port

    folder = settings.data_dir.expanduser().resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    log, port = folder / "demo.log", check_port("127.0.0.1", 0)
    with log.open("wb") as stream:
        process = _start(settings, folder, stream, port)
    run = Run(process, log, port)
    try:
        with Client(settings) as client:
            deadline_ns = clock.monotonic_ns() + int(START_S * 1e9)
            while len(client.workers()) < settings.procs and clock.monotonic_ns() < deadline_ns:
                run.must_live()
                time.sleep(0.05)
        click.echo(f"{settings.procs} workers run as pid {process.pid}; they log to {log}")
        yield run
    except KeyboardInterrupt:
        click.echo("stopping the workers", err=True)
        raise
    finally:
        _stop(process)


def _start(settings: Settings, folder: Path, log: IO[bytes], port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tqe.cli.main", "run", APP]
    command += ["--procs", str(settings.procs), "--lanes", ",".join(LANES), "--grace", "5"]
    command += ["--namespace", settings.namespace, "--metrics-port", str(port)]
    command += ["--data-dir", str(folder)]
    if settings.redis_url is not None:
        command += ["--redis", settings.redis_url]
    libc = ctypes.CDLL(None)

    def with_us() -> None:
        # If we are killed, nobody else would stop it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    # In a session of its own: Ctrl-C reaches us alone, and we stop it. Its folder is one without a tqe.toml.
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=with_us,
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Drain; after some patience stop at once; after more kill."""
    for number_, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        if process.poll() is not None:
            return
        process.send_signal(number_)
        try:
            process.wait(patience_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue


# ------------------------------------------------------------------ watching


def watch(client: Client, before: QueueStatus, total: int, run: Run) -> None:
    """Show how the jobs end, until all have."""
    console = out()
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]} jobs/s"), TimeElapsedColumn()
    )
    line = bar.add_task("", total=total, rate="-")
    if not console.is_terminal:
        _until_done(client, before, total, run, _teller(total))
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def tell(now: QueueStatus, done: int, passed_s: float) -> None:
            rate = number(round(done / passed_s)) if passed_s else "-"
            bar.update(line, completed=done, rate=rate)
            live.update(Group(bar, Text(_now(before, now), style="dim")), refresh=True)

        _until_done(client, before, total, run, tell)


Tell = Callable[[QueueStatus, int, float], None]


def _until_done(client: Client, before: QueueStatus, total: int, run: Run, tell: Tell) -> None:
    began_ns = moved_ns = clock.monotonic_ns()
    done = 0
    while done < total:
        run.must_live()
        now, now_ns = client.status(), clock.monotonic_ns()
        ended = _ended(now) - _ended(before)
        if ended > done:
            done, moved_ns = ended, now_ns
        tell(now, min(done, total), (now_ns - began_ns) / 1e9)
        if now_ns - moved_ns > STALL_S * 1e9:
            raise click.ClickException(f"no job has ended for {STALL_S:.0f} s; {run.log} may say why")
        if done < total:
            time.sleep(LOOK_S)


def _teller(total: int) -> Tell:
    """A line now and then, for what is no terminal."""
    told_s = 0.0

    def tell(now: QueueStatus, done: int, passed_s: float) -> None:
        nonlocal told_s
        if passed_s - told_s >= TELL_S or done >= total:
            told_s = passed_s
            click.echo(f"{passed_s:5.1f} s  {number(done)} of {number(total)} jobs have ended")

    return tell


def _ended(status: QueueStatus) -> int:
    return sum(status.totals.get(name, 0) for name in ("completed", "dead", "cancelled"))


def _now(before: QueueStatus, now: QueueStatus) -> str:
    waiting = "  ".join(f"{name} {number(lane.queued)}" for name, lane in now.lanes.items())
    busy = sum(1 for worker in now.workers if worker.jobs)
    retried = now.totals.get("retried", 0) - before.totals.get("retried", 0)
    return (
        f"waiting: {waiting}   busy workers: {busy} of {len(now.workers)}"
        f"   retries: {number(retried)}   dead: {number(now.dead)}"
    )


# ------------------------------------------------------------------ what came of it


def read_all(client: Client, handles: Mapping[str, JobHandles], run: Run) -> Records:
    """The record of each job; jobs that an earlier, interrupted demo has left may have ended before ours."""
    found = {}
    for name, jobs in handles.items():
        wanted = [(job.frame_id, job.index) for job in jobs]
        while True:
            records = client.run(reading.job_records(client.core.keys, wanted))
            if all(record.status.ended for record in records):
                break
            run.must_live()
            time.sleep(LOOK_S)
        found[name] = [record.status for record in records]
    return found


def table_of(runs: Mapping[str, Percentiles], records: Records) -> Table:
    """Run times as the workers measured them, waits as the records tell them."""
    headings = ("run p50", "p95", "p99", "wait p50", "p95 ", "p99 ")
    rows = table("task", "jobs", *headings, right=("jobs", *headings))
    for name, jobs in sorted(records.items()):
        spans = sorted(
            max(0.0, (job.started_at - job.submitted_at).total_seconds())
            for job in jobs
            if job.attempts == 1 and job.started_at is not None and job.submitted_at is not None
        )
        waits = of_values(spans)
        run = runs.get(name)
        cells = [duration(value) for value in (run.p50, run.p95, run.p99)] if run else ["?"] * 3
        cells += [duration(value) for value in (waits.p50, waits.p95, waits.p99)]
        rows.add_row(name, number(len(jobs)), *cells)
    return rows


def summarize(before: QueueStatus, after: QueueStatus, total: int, took_s: float, times: Table) -> None:
    """Numbers for people."""

    def since(name: str) -> str:
        return number(after.totals.get(name, 0) - before.totals.get(name, 0))

    click.echo(
        f"\n{number(total)} jobs in {took_s:.1f} s: {number(round(total / took_s))} jobs/s"
        f" by {len(after.workers)} workers on {len(os.sched_getaffinity(0))} CPUs\n"
    )
    show(times)
    click.echo("(run times from histograms whose buckets double; waits of jobs that needed no retry)\n")
    click.echo(
        f"{since('completed')} completed, {since('retried')} retries, {since('dead')} dead:"
        " files with broken syntax or encoding"
    )


def check(records: Records, paths: Sequence[str]) -> bool:
    """Compute results again, here, and compare; in random order and as many as fit into the time."""
    places = [(task, at) for task in demo_app.TASKS for at in range(len(paths))]
    random.Random(1).shuffle(places)
    deadline_ns = clock.monotonic_ns() + int(CHECK_S * 1e9)
    compared, wrong = 0, []
    with _checking(len(places)) as advance:
        for task, at in places:
            job = records[task.name][at]
            if not agrees(task.func, paths[at], job):
                wrong.append(f"{task.name} {paths[at]} ({job.id}): {job.status} {job.result}")
            compared += 1
            advance(compared)
            if clock.monotonic_ns() > deadline_ns:
                break
    for line in wrong[:10]:
        click.echo(f"wrong: {line}", err=True)
    outcome = "all agree" if not wrong else f"{number(len(wrong))} DIFFER"
    click.echo(f"{number(compared)} of {number(len(places))} outcomes computed again, directly: {outcome}")
    return not wrong


def agrees(func: Callable[..., Any], path: str, job: JobStatus) -> bool:
    """Whether a job ended as its function does here and now."""
    try:
        expected = func(path)
    except Exception as e:  # what any file may raise in a parser is the very thing that is compared
        return job.status == "dead" and type(e).__name__ in (job.error or "")
    return job.status == "completed" and bool(job.result == expected)


def compare_orders(
    client: Client,
    settings: Settings,
    run: Run,
    paths: Sequence[str],
    records: Records,
    per_s: float,
    files: Sequence[Path],
) -> None:
    """The second part."""
    failed = {
        path
        for jobs in records.values()
        for path, job in zip(paths, jobs, strict=True)
        if job.status != "completed"
    }
    jobs = demo_order.sample(paths, failed, per_s)
    found = demo_order.compare(client, settings, jobs, per_s=per_s, log=run.log, alive=run.must_live)
    if found is None:
        return
    demo_order.tell(found)
    for file in files:
        demo_order.write(found, file)


@contextmanager
def _checking(total: int) -> Iterator[Callable[[int], None]]:
    if not out().is_terminal:
        yield lambda done: None
        return
    with Progress(TextColumn("checking"), BarColumn(), MofNCompleteColumn(), transient=True) as bar:
        line = bar.add_task("", total=total)
        yield lambda done: bar.update(line, completed=done)


def _tell_where(settings: Settings, own: embedded.EmbeddedServer | None) -> None:
    where = "in your Redis" if own is None else f"in {settings.data_dir} (embedded Redis {own.version})"
    click.echo(f"The data stays {where}, namespace {settings.namespace}. Look at it:")
    space = f"--namespace {settings.namespace}"
    for verb in ("status", "dlq list"):
        click.echo(f"  tqe {verb} {space}")
    click.echo(f"  tqe serve {space}   the dashboard, at http://127.0.0.1:8080/")
    # The demo's workers have stopped: what is submitted now waits for others.
    click.echo("To submit over HTTP and see it run, start workers in a second terminal, and in a third:")
    click.echo(f"  tqe run {settings.app or 'tasks:app'} {space}")
    click.echo(f"  {CURL}")
