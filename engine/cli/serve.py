"""Serving the REST API and the dashboard: `tqe serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tqe import __version__
from tqe import app as app_module
from tqe import settings as settings_module
from tqe.cli.options import where_options
from tqe.cli.output import count, facts, show
from tqe.cli.server import Meeting
from tqe.client import Client
from tqe.errors import SettingsError
from tqe.registry import Registry
from tqe.settings import Settings
from tqe.store import tokens
from tqe.store.tokens import Table
from tqe.telemetry import logs

if TYPE_CHECKING:
    from tqe.api.service import ServeOptions


@click.command()
@click.argument("app", metavar="[APP]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8080, show_default=True, help="0: any free port."
)
@click.option(
    "--procs", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N", help="Server processes."
)
@where_options
@click.pass_context
def serve(ctx: click.Context, /, app: str | None, host: str, port: int, procs: int, **where: Any) -> None:
    """Serve the REST API and the dashboard: submit jobs from any language, watch and operate the queue.

    With APP (module:attribute, or the setting `app`) types and arguments are checked as that App has them;
    without, any job is taken. As long as there are no access tokens (`tqe token`) it serves loopback only.
    Ctrl-C or SIGTERM drains: no new connections, open requests get 10 s.

    \b
    Examples:
      tqe serve
      tqe serve tasks:app --port 8080 --procs 2
      curl -s localhost:8080/api/v1/jobs -H 'Content-Type: application/json' \\
        -d '{"type": "GREET", "payload": {"name": "Ann"}}'
    """
    settings, registry = _settings(app, where)
    try:
        from tqe.api import processes
        from tqe.api.service import ServeOptions
    except ModuleNotFoundError as e:
        raise SettingsError(f"{e.name} is missing: install the extra http (pip install 'tqe[http]')") from e
    logs.configure(level=settings.log_level, style=settings.log_format)
    options = ServeOptions(host=host, port=port, procs=procs)
    with Meeting(settings) as meeting:
        met = meeting.met
        with Client(settings) as client:
            table = client.run(tokens.look(client.core.keys))
    try:
        if not (options.loopback or table.tokens):
            raise SettingsError(
                f"there are no access tokens, so whoever reaches {host} could submit, read and delete jobs:"
                " create one with `tqe token create NAME`, or serve 127.0.0.1"
            )
        with processes.listen(options) as listener:
            _introduce(options, listener.getsockname()[1], met.place, settings.app, access=_access(table))
            code = processes.Servers(listener, settings, registry, options).run()
    finally:
        if met.own is not None:
            met.own.close()
    ctx.exit(code)


def _settings(app: str | None, where: dict[str, Any]) -> tuple[Settings, Registry | None]:
    """The settings, and the tasks if there is an app; what its code says counts less than all else."""
    given = {"app": app, **where}
    first = settings_module.load(cli=given)
    if first.app is None:
        return first, None
    loaded = app_module.load_app(first.app)
    return settings_module.load(code=loaded.code_settings, cli=given), loaded.registry


def _access(table: Table) -> str:
    if not table.used:
        return "anybody on this machine, as there are no tokens; `tqe token create NAME` ends that"
    return count(len(table.tokens), "token")


def _introduce(options: ServeOptions, port: int, place: str, app: str | None, *, access: str) -> None:
    host = options.host
    at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    click.secho(f"tqe {__version__}", bold=True, err=True)
    rows = [
        ("  serving", at),
        ("  dashboard", f"{at}/"),
        ("  app", app or "none given: any job is taken"),
        ("  redis", place),
        ("  access", access),
        ("  processes", str(options.procs)),
        ("  stop", "Ctrl-C"),
    ]
    show(facts(rows), stderr=True)
