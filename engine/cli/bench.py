"""The hook of `tqe bench`."""

from __future__ import annotations

import click


@click.command(hidden=True)
def bench() -> None:
    """Measure the engine on this machine."""
    raise click.ClickException("there are no benchmarks in this version")
