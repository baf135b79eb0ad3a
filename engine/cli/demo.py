"""The demo: `tqe demo`."""

import click


@click.command()
def demo() -> None: ...
