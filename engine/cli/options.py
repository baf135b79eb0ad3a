"""Options that verbs share: which Redis, which namespace, which folder; they arrive as one Settings."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from tqe import settings
from tqe.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

_WHERE = (
    click.option(
        "--redis",
        "redis_url",
        metavar="URL",
        help="redis://, rediss:// or unix:// address.  [default: TQE_REDIS_URL, else the embedded Redis]",
    ),
    click.option(
        "--namespace", metavar="NAME", help="Prefix of all keys in Redis.  [default: TQE_NAMESPACE or tq]"
    ),
    click.option(
        "--data-dir",
        metavar="FOLDER",
        help="Data of the embedded Redis.  [default: TQE_DATA_DIR or ~/.local/share/tqe]",
    ),
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def where_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add --redis, --namespace and --data-dir."""
    for option in reversed(_WHERE):
        function = option(function)
    return function


def with_settings(function: Callable[Concatenate[Settings, P], R]) -> Callable[..., R]:
    """Add the options that say where, and hand the merged settings in as the first argument."""

    @where_options
    @functools.wraps(function)
    def command(*args: Any, **rest: Any) -> R:
        given = {name: rest.pop(name) for name in ("redis_url", "namespace", "data_dir")}
        return function(settings.load(cli=given), *args, **rest)

    return command


def seconds_as_ms(given: Mapping[str, float | None]) -> dict[str, int | None]:
    """Durations of the command line, which are seconds, as the settings' milliseconds."""
    for value in given.values():
        if value is not None and not math.isfinite(value):
            raise click.UsageError(f"{value} is no number of seconds")
    return {name: None if value is None else round(value * 1000) for name, value in given.items()}
