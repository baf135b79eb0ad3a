"""The entry point of the tqe command."""

import click

from tqe import __version__


@click.group()
@click.version_option(__version__, prog_name="tqe")
def main() -> None:
    """A distributed task-queue engine for Python on Redis."""
