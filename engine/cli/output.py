"""What commands print: tables and JSON on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

import click
from rich.console import Console, RenderableType
from rich.table import Table

from tqe import clock

PIPE_WIDTH: Final = 300  # a pipe has no width: nothing must be cut or wrapped there


def out() -> Console:
    """A console on stdout."""
    return _console(sys.stdout.isatty(), stderr=False)


def err() -> Console:
    """A console on stderr, for what is no result."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(terminal: bool, *, stderr: bool) -> Console:
    # Names and errors are texts of users: never markup.
    return Console(
        stderr=stderr, markup=False, highlight=False, emoji=False, width=None if terminal else PIPE_WIDTH
    )


def show(picture: RenderableType, *, stderr: bool = False) -> None:
    """Print a table or the like; without the blanks that fill up its lines where it is not for the eye."""
    console = err() if stderr else out()
    if console.is_terminal:
        console.print(picture)
        return
    with console.capture() as capture:
        console.print(picture)
    for line in capture.get().splitlines():
        click.echo(line.rstrip(), err=stderr)


def emit(value: Any) -> None:
    """One line of JSON on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, separators=(", ", ": ")))


def table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """A plain table: no frames, so that it survives copying and grep."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        made.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return made


def facts(rows: Iterable[tuple[str, str | None]]) -> Table:
    """Names and values, one a line; those without a value are left out."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            made.add_row(name, value)
    return made


def shown(text: str) -> str:
    """Somebody's text, without the control characters that could move the cursor or recolour the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def cut(text: str, limit: int) -> str:
    """The first line of a text, cut to a length."""
    line = shown(text).strip().partition("\n")[0]
    return line if len(line) <= limit else line[: limit - 1] + "…"


def cut_error(text: str | None, limit: int) -> str:
    """The last line of an error, where a traceback says what it was, cut to a length."""
    return cut((text or "").strip().rpartition("\n")[2], limit)


def number(value: int) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def count(value: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number(value)} {noun}" if value == 1 else f"{number(value)} {noun}s"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def about(ms: int | None) -> str | None:
    """A predicted span for people, None where nothing is predicted."""
    return None if ms is None else duration(ms / 1000)


def moment(time: datetime | None) -> str | None:
    """A time as people of this place read it, and how long ago it is."""
    if time is None:
        return None
    local = time.astimezone()
    ago_s = (datetime.fromtimestamp(clock.wall_ms() / 1000, UTC) - time).total_seconds()
    when = f"{duration(ago_s)} ago" if ago_s >= 0 else f"in {duration(-ago_s)}"
    return f"{local:%Y-%m-%d %H:%M:%S} ({when})"
