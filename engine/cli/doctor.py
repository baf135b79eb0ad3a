"""Whether everything is as it should be: `tqe doctor`."""

import click


@click.command()
def doctor() -> None: ...
