"""Options that verbs share: which Redis, which namespace, which folder; they arrive as one Settings."""

from __future__ import annotations

import functools
import re
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


class Seconds(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs of some versions only
    """A duration as people write it: 30, 0.5, 30s, 500ms, 5m, 1h. The value is in seconds."""

    name = "seconds"
    _units: Mapping[str, float] = {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuses what is no duration."""
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h|)", value.strip())
        if found is None:
            self.fail(
                f"{value!r} is no duration: it takes seconds, or a number with ms, s, m or h", param, ctx
            )
        return float(found[1]) * self._units[found[2]]


def seconds_as_ms(given: Mapping[str, float | None]) -> dict[str, int | None]:
    """Durations of the command line, which are seconds, as the settings' milliseconds."""
    return {name: None if value is None else round(value * 1000) for name, value in given.items()}
