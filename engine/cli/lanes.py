"""Pausing and resuming a lane: `tqe pause`, `tqe resume`."""

from __future__ import annotations

import click

from tqe.cli.options import with_settings
from tqe.client import Client
from tqe.settings import Settings


@click.command()
@click.argument("lane")
@with_settings
def pause(settings: Settings, lane: str) -> None:
    """Let workers take nothing more from LANE until it is resumed.

    Jobs that run already go on, and new ones can still be submitted.

    \b
    Example:
      tqe pause low
    """
    with Client(settings) as client:
        client.pause(lane)
    click.echo(f"lane {lane.lower()} is paused; `tqe resume {lane.lower()}` ends that")


@click.command()
@click.argument("lane")
@with_settings
def resume(settings: Settings, lane: str) -> None:
    """Let workers take jobs from LANE again.

    \b
    Example:
      tqe resume low
    """
    with Client(settings) as client:
        client.resume(lane)
    click.echo(f"lane {lane.lower()} runs")
