"""The tqe command as a whole: its verbs, and how errors become one sentence and an exit code."""

from __future__ import annotations

from typing import Any, Final

import click

from tqe import __version__
from tqe.cli.bench import bench
from tqe.cli.cron import cron
from tqe.cli.demo import demo
from tqe.cli.dlq import dlq
from tqe.cli.doctor import doctor
from tqe.cli.job import cancel, job
from tqe.cli.lanes import pause, resume
from tqe.cli.ml import ml
from tqe.cli.output import shown
from tqe.cli.run import run
from tqe.cli.serve import serve
from tqe.cli.status import status
from tqe.cli.submit import submit
from tqe.cli.tokens import token
from tqe.errors import (
    AppNotFound,
    ArgumentsError,
    InvalidOption,
    InvalidPayload,
    JobFailed,
    PayloadTooLarge,
    SettingsError,
    TQEError,
    UnknownLane,
)

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130  # what shells say of a program that Ctrl-C ended

# The command line itself is wrong: nothing was tried, and trying again changes nothing.
_USAGE: Final = (
    AppNotFound,
    SettingsError,
    InvalidOption,
    UnknownLane,
    InvalidPayload,
    ArgumentsError,
    PayloadTooLarge,
)


class Failure(click.ClickException):
    """An error of ours on its way out: its text on stderr, and the exit code of its kind."""

    def __init__(self, error: TQEError) -> None:
        super().__init__(_sentence(error))
        self._code = EXIT_USAGE if isinstance(error, _USAGE) else EXIT_FAILED

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return self._code


def _sentence(error: TQEError) -> str:
    if isinstance(error, JobFailed):
        last = error.error.strip().rpartition("\n")[2]
        return shown(f"job {error.job_id} failed: {last} (`tqe job {error.job_id}` tells more)")
    return shown(" ".join(str(error).split())) or type(error).__name__


class Verbs(click.Group):
    """The group: verbs in the order in which one meets them; users see sentences, never a traceback of
    ours."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TQEError as e:
            raise Failure(e) from e
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tqe")
def main() -> None:
    """A distributed task-queue engine for Python on Redis.

    Without --redis (or TQE_REDIS_URL) every command shares one private Redis that starts by itself and keeps
    its data in your home folder.

    \b
    Examples:
      tqe demo                                  see it work on real input
      tqe run tasks:app --procs 8               run workers for the App `app` in tasks.py
      tqe submit GREET '{"name": "Ann"}'        submit one job
      tqe status                                lanes, totals, workers
      tqe doctor                                is everything as it should be?

    Settings come from the code, tqe.toml, TQE_* variables and options, the later ones winning. Exit codes:
    0 done, 1 failed, 2 wrong usage.
    """


for verb in (
    *(run, submit, status, job, cancel, dlq, cron, pause, resume),
    *(serve, token, doctor, ml, demo, bench),
):
    main.add_command(verb)

if __name__ == "__main__":
    main()
