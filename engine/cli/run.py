"""Running workers: `tqe run`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import click

from tqe import __version__, clock
from tqe import app as app_module
from tqe import settings as settings_module
from tqe.app import App
from tqe.cli.options import Seconds, seconds_as_ms, where_options
from tqe.cli.output import count, facts, show
from tqe.cli.predictor import ModelPredictor, folder_of, open_library
from tqe.cli.server import Meeting, Met
from tqe.cli.vault import Vault
from tqe.schedule import Timetable
from tqe.settings import Settings
from tqe.store import learning
from tqe.store.keys import Keys
from tqe.telemetry import logs

TASKS_SHOWN: Final = 8


@click.command()
@click.argument("app", metavar="[APP]", required=False)
@click.option(
    "--procs",
    metavar="N",
    help="Worker processes, or auto: the CPUs that we may use, by affinity and quota.  [default: auto]",
)
@click.option(
    "--autoscale",
    metavar="MIN,MAX",
    help="As many workers, from MIN to MAX (which may be auto), as the work that waits needs.",
)
@click.option(
    "--drain-target",
    type=Seconds(),
    metavar="SECONDS",
    help="With --autoscale: in which time what waits is to be finished.  [default: 30s]",
)
@click.option("--lanes", metavar="A,B,C", help="Lanes, highest rank first.  [default: high,normal,low]")
@click.option(
    "--lane-weights", metavar="N,N,N", help="Shares of time, one for each lane.  [default: strict, by rank]"
)
@click.option("--concurrency", metavar="N", help="Async jobs that a worker runs at once.  [default: 100]")
@click.option(
    "--lease", type=Seconds(), metavar="SECONDS", help="When an unrenewed lease ends.  [default: 15]"
)
@click.option(
    "--grace", type=Seconds(), metavar="SECONDS", help="What running jobs get at a stop.  [default: 30]"
)
@click.option("--burst", is_flag=True, default=None, help="Stop when no job is left.")
@click.option("--pin/--no-pin", default=None, help="Whether to give each worker a CPU.  [default: pin]")
@click.option(
    "--preload/--no-preload",
    default=None,
    help="Whether to import the app once before the fork; with --no-preload SIGHUP picks up new code.",
)
@click.option(
    "--learn", is_flag=True, default=None, help="Train on what ran, and order by what was learnt, by itself."
)
@click.option("--metrics-host", metavar="ADDRESS", help="Where metrics are served (127.0.0.1).")
@click.option("--metrics-port", metavar="PORT", help="Serve Prometheus metrics there (0: any free port).")
@where_options
@click.pass_context
def run(
    ctx: click.Context,
    /,
    app: str | None,
    lease: float | None,
    grace: float | None,
    drain_target: float | None,
    **given: Any,
) -> None:
    """Run workers for APP, given as module:attribute.

    Ctrl-C or SIGTERM drains: no new jobs, running ones get --grace to end, the rest goes back to the queue
    uncharged, exit code 0. A second one stops at once. SIGHUP replaces the workers one by one.

    Without APP, the setting `app` counts (tqe.toml or TQE_APP).

    \b
    Examples:
      tqe run tasks:app --procs 8
      tqe run tasks:app --redis redis://10.0.0.5:6379/0 --lanes high,normal
      tqe run tasks:app --autoscale 1,8 --drain-target 30s
      tqe run tasks:app --burst                        run what is there, then stop
      tqe run tasks:app --metrics-port 9100
      tqe run tasks:app --learn                        see `tqe ml status`
    """
    if given["procs"] is not None and given["autoscale"] is not None:
        raise click.UsageError(
            "--procs is a fixed number of workers, --autoscale a changing one: give one of them"
        )
    times = {"lease_ms": lease, "grace_ms": grace, "drain_target_ms": drain_target}
    command_line = {"app": app, **seconds_as_ms(times), **given}
    first = settings_module.load(cli=command_line)
    if first.app is None:
        raise click.UsageError("give the APP to run as module:attribute, for example: tqe run tasks:app")
    # Before anything of the app's is imported, which may make metrics.
    from tqe.telemetry import user_metrics

    with user_metrics.shared_folder():
        code = serve(first.app, first, command_line)
    ctx.exit(code)


def serve(path: str, first: Settings, command_line: Mapping[str, Any]) -> int:
    """Import the app, meet Redis, say what runs where, and supervise until the end; the exit code."""
    from tqe.supervisor import affinity, lifecycle

    logs.configure(level=first.log_level, style=first.log_format)
    loaded, code, timetable = _load(path, command_line, preload=first.preload)
    settings = settings_module.load(code=code, cli=command_line)
    logs.configure(level=settings.log_level, style=settings.log_format)
    if settings.metrics_port is not None:
        port = lifecycle.check_port(settings.metrics_host, settings.metrics_port)
        settings = replace(settings, metrics_port=port)
    library = open_library()
    predictor = ModelPredictor(folder_of(settings), library=library)
    with Meeting(settings) as meeting:
        met = meeting.met
        state = learning.state(meeting.door, Keys(settings.namespace))
    try:
        pins = affinity.plan(settings.procs, pin=settings.pin)
        _introduce(path, loaded, settings, met, pins.reason, timetable)
        models = Vault(settings, met.url, library=library)
        if not state.refusal and models.has(state.version):
            predictor.preload(state.version)
        return lifecycle.run(
            path,
            # An app that was not imported by now is imported by each worker.
            replace(settings, preload=loaded is not None),
            _loader(loaded, settings),
            redis_url=met.url,
            pins=pins,
            revive=None if met.own is None else met.own.revive,
            # Who only works off what is there is not who keeps the times.
            timetable=None if settings.burst else timetable,
            predictor=predictor,
            models=models,
        )
    finally:
        if met.own is not None:
            met.own.close()


# ------------------------------------------------------------------ the app


def _load(
    path: str, command_line: Mapping[str, Any], *, preload: bool
) -> tuple[App | None, dict[str, Any], Timetable]:
    """The app, if it may be imported before the fork; the settings that its code gives; its schedules."""
    from tqe.supervisor import preload as preloading

    born_ms = clock.wall_ms()
    if preload:
        loaded = preloading.load(path, app_module.load_app)
        if loaded is not None:
            return loaded, loaded.code_settings, _timetable(path, loaded, command_line, born_ms)
    return None, *_ask_code(path, command_line, born_ms)


def _timetable(path: str, app: App, command_line: Mapping[str, Any], born_ms: int) -> Timetable:
    settings = settings_module.load(code=app.code_settings, cli=command_line)
    return app.timetable(path, settings, born_ms=born_ms)


def _ask_code(path: str, command_line: Mapping[str, Any], born_ms: int) -> tuple[dict[str, Any], Timetable]:
    """What the code of an app says that must not be imported here: asked in a child, which then ends."""
    from tqe.supervisor import process

    def look() -> bytes:
        app = app_module.load_app(path)
        timetable = _timetable(path, app, command_line, born_ms).as_dict()
        return json.dumps({"settings": app.code_settings, "timetable": timetable}, default=str).encode()

    answer = process.probe(look)
    # If it failed there, then the same here, to say what is wrong.
    found: dict[str, Any] = json.loads(look() if answer is None else answer)
    return found["settings"], Timetable.from_dict(found["timetable"])


def _loader(loaded: App | None, settings: Settings) -> Callable[[str], App]:
    """How a worker gets at the app, with the settings of this run: a task that submits meets the same
    Redis."""

    def load(path: str) -> App:
        app = app_module.load_app(path) if loaded is None else loaded
        app.configure(settings)
        return app

    return load


# ------------------------------------------------------------------ what people see first


def _introduce(
    path: str, loaded: App | None, settings: Settings, met: Met, pinning: str, timetable: Timetable
) -> None:
    """One block that says what runs where; for machines, the same as an event."""
    host = f"[{settings.metrics_host}]" if ":" in settings.metrics_host else settings.metrics_host
    rows = {
        "app": _tasks(path, loaded),
        "redis": met.place,
        "data": str(settings.data_dir) if met.own is not None else None,
        "lanes": _lanes(settings),
        "workers": _workers(settings, pinning),
        "cron": _schedules(timetable, settings),
        "metrics": f"http://{host}:{settings.metrics_port}/metrics" if settings.metrics_port else None,
        "stop": f"Ctrl-C; running jobs then have {settings.grace_ms / 1000:g} s",
    }
    log = logs.get("cli")
    if settings.log_format == "json":
        log.info("starting", **{name: value for name, value in rows.items() if value is not None})
    else:
        click.secho(f"tqe {__version__}", bold=True, err=True)
        show(facts([(f"  {name}", value) for name, value in rows.items()]), stderr=True)
    for finding in met.findings:
        if finding.level == "warning":
            log.warning(finding.text)


def _tasks(path: str, loaded: App | None) -> str:
    if loaded is None:
        return f"{path}, imported by each worker"
    names = sorted(task.name for task in loaded.registry)
    if not names:
        return f"{path}, which has no tasks: jobs will wait"
    more = f", … ({len(names)} tasks)" if len(names) > TASKS_SHOWN else ""
    return f"{path}: {', '.join(names[:TASKS_SHOWN])}{more}"


def _schedules(timetable: Timetable, settings: Settings) -> str | None:
    if not timetable.schedules:
        return None
    if settings.burst:
        return "nothing is scheduled with --burst"
    return f"{count(len(timetable.schedules), 'schedule')}; `tqe cron list` shows them"


def _lanes(settings: Settings) -> str:
    if not settings.lane_weights:
        return " > ".join(settings.lanes)
    shares = zip(settings.lanes, settings.lane_weights, strict=True)
    return "shares of time: " + ", ".join(f"{lane} {weight}" for lane, weight in shares)


def _workers(settings: Settings, pinning: str) -> str:
    until = ", until no job is left" if settings.burst else ""
    if settings.autoscale is None:
        return f"{settings.procs} processes{until}; {pinning}"
    fewest, most = settings.autoscale
    target_s = settings.drain_target_ms / 1000
    return f"{fewest} to {most} processes, as many as finish what waits in {target_s:g} s{until}; {pinning}"
