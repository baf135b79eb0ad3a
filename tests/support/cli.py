"""The tqe command for tests: inside of this process for what ends by itself, as a program for the rest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from click.testing import CliRunner, Result

from tests.support.hands import Hands
from tests.support.waiting import wait_until
from tqe.cli.main import main

PROGRAM = [sys.executable, "-m", "tqe.cli.main"]


@dataclass
class Cli:
    """`cli("status", "--json")` in an environment of its own; never a traceback, whatever is asked."""

    env: dict[str, str]

    def __call__(self, *args: str, stdin: str | bytes | None = None, **env: str) -> Result:
        runner = CliRunner()
        with clean_environment(self.env | env):
            result = runner.invoke(main, list(args), input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.stderr
        return result

    def json(self, *args: str, **env: str) -> Any:
        """What a command that goes well prints with --json."""
        result = self(*args, "--json", **env)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def fails(self, code: int, *args: str, stdin: str | bytes | None = None, **env: str) -> str:
        """The one sentence on stderr of a command that ends with this code."""
        result = self(*args, stdin=stdin, **env)
        assert result.exit_code == code, (result.exit_code, result.output)
        found = re.findall(r"(?m)^Error: (.+)$", result.stderr)
        assert len(found) == 1 and result.stderr.endswith(f"Error: {found[0]}\n"), result.stderr
        return str(found[0])


def environment(env: dict[str, str]) -> dict[str, str]:
    """This process' environment with only these of our variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TQE_")} | env


@contextlib.contextmanager
def clean_environment(env: dict[str, str]) -> Iterator[None]:
    saved = dict(os.environ)
    wanted = environment(env)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


@dataclass
class Program:
    """One tqe command as a process of its own, its output in a file."""

    folder: Path
    env: dict[str, str]
    args: tuple[str, ...]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / f"{self.args[0]}-{len(list(self.folder.glob('*.log')))}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, *self.args],
                cwd=self.folder,
                env=environment(self.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def says(self, words: str, timeout: float = 30.0) -> str:
        """Wait until these words stand in the output, and return it."""

        def said() -> bool:
            if words in self.text():
                return True
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text()}"
            return False

        wait_until(said, timeout, f"{words!r} in the output")
        return self.text()

    def ended(self, timeout: float = 30.0) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.args} goes on after {timeout} s:\n{self.text()}") from None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def bury(client: redis.Redis, count: int = 1, message: str = "ValueError: no good") -> None:
    """Let what waits die: as many jobs as there are."""
    hands = Hands(client).fetch()
    assert len(hands.jobs()) == count
    hands.settle(lambda name: ("D", message))
