"""Access tokens of the REST API: `tqe token create`, `list`, `revoke`."""

from __future__ import annotations

from typing import get_args

import click

from tqe import clock
from tqe.cli.options import json_option, with_settings
from tqe.cli.output import emit, moment, show, shown, table
from tqe.client import Client
from tqe.job import to_datetime
from tqe.settings import Settings
from tqe.store import tokens
from tqe.store.tokens import SCOPES, Scope, Table

_MEANS = "submit (submit, cancel), read (everything but changes, /metrics), admin (all)"


@click.group()
def token() -> None:
    """Access tokens of the REST API (`tqe serve`): create, list, revoke.

    As long as there is none, a server takes anybody, and therefore listens on loopback only.

    \b
    Examples:
      tqe token create shop --scope submit
      curl -H "Authorization: Bearer $TOKEN" localhost:8080/api/v1/queues
      tqe token revoke shop
    """


@token.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(get_args(Scope)),
    multiple=True,
    default=("submit", "read"),
    show_default=True,
    help=f"What it is good for; give it several times: {_MEANS}.",
)
@json_option
@with_settings
def create(settings: Settings, name: str, scopes: tuple[Scope, ...], as_json: bool) -> None:
    """Create a token for the caller NAME and print it. It is shown this once: Redis keeps its hash only.

    \b
    Examples:
      TOKEN=$(tqe token create shop --scope submit)
      tqe token create prometheus --scope read --json
    """
    with Client(settings) as client:
        try:
            text = client.run(tokens.create(client.core.keys, name, scopes, clock.wall_ms()))
        except ValueError as e:
            raise click.UsageError(str(e)) from e
    if as_json:
        emit({"name": name, "scopes": [one for one in SCOPES if one in scopes], "token": text})
        return
    click.echo(f"token {name} may {', '.join(scopes)}; keep it now, it is not shown again:", err=True)
    click.echo(text)


@token.command("list")
@json_option
@with_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List tokens: whose they are, and what they may do.

    \b
    Example:
      tqe token list --json
    """
    with Client(settings) as client:
        found = _look(client)
    if as_json:
        emit([one.as_dict() for one in found.tokens.values()])
    elif not found.tokens:
        click.echo(_nobody(found))
    else:
        rows = table("name", "scopes", "created")
        for one in found.tokens.values():
            told = one.as_dict()
            rows.add_row(one.name, ", ".join(told["scopes"]), moment(to_datetime(one.created_ms)) or "-")
        show(rows)


@token.command()
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="All, so that servers on loopback take anybody again.")
@json_option
@with_settings
def revoke(settings: Settings, names: tuple[str, ...], all_: bool, as_json: bool) -> None:
    """Revoke tokens; servers refuse them within about a second.

    When the last one is revoked nobody can call any more, until another is created, or `--all` is given.

    \b
    Examples:
      tqe token revoke shop
      tqe token revoke --all
    """
    if all_ == bool(names):
        raise click.UsageError("give names of tokens, or --all")
    with Client(settings) as client:
        found = _look(client)
        known = [*found.tokens, *found.damaged]
        unknown = [shown(name) for name in names if name not in known]
        if unknown:
            raise click.UsageError(
                f"there is no token {', '.join(unknown)}; there are: {', '.join(known) or 'none'}"
            )
        keys = client.core.keys
        client.run(tokens.forget(keys) if all_ else tokens.revoke(keys, names))
        left = _look(client)
    gone = known if all_ else list(names)
    if as_json:
        emit({"revoked": gone})
        return
    click.echo(f"revoked: {', '.join(map(shown, gone)) or 'none'}")
    if not left.tokens:
        click.echo(_nobody(left))


def _look(client: Client) -> Table:
    found = client.run(tokens.look(client.core.keys))
    for name in found.damaged:
        click.echo(f"{shown(name)}: it cannot be read; revoke it and create another", err=True)
    return found


def _nobody(found: Table) -> str:
    if found.used:
        return (
            "no token is left, and nobody can call: create one, or let anybody in on loopback with"
            " `tqe token revoke --all`"
        )
    return "no tokens: `tqe serve` takes anybody, on loopback only; `tqe token create NAME` ends that"
