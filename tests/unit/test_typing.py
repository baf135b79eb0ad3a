"""The types of what users hold in their hands, as mypy and pyright see them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tqe import job, registry

USES = Path(__file__).resolve().parents[1] / "typing" / "uses.py"
MARK = re.compile(r"# wrong: ([\w-]+), (\w+)$")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def marks(which: int) -> dict[int, str]:
    """Line → what the checker is to say there."""
    lines = enumerate(USES.read_text("utf-8").splitlines(), 1)
    return {number: found[which] for number, line in lines if (found := MARK.search(line))}


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command, str(USES)], capture_output=True, text=True, cwd=USES.parents[2]
    )
    return done.stdout


def test_mypy_refuses_exactly_the_wrong_uses() -> None:
    said = run("mypy", "--strict", "--no-error-summary", "--hide-error-context")
    found = re.findall(r"uses\.py:(\d+): error: .*\[([\w-]+)\]$", said, re.M)
    assert {int(number): code for number, code in found} == marks(1), said


def test_pyright_refuses_exactly_the_wrong_uses(tmp_path: Path) -> None:
    # The rules of pyright itself: basedpyright is that, with a Node of its own, and stricter ones by default.
    config = {"typeCheckingMode": "standard", "include": [str(USES)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    said = {one["range"]["start"]["line"] + 1: one.get("rule", "") for one in found}
    assert said == marks(2), json.dumps(found, indent=1)


def test_the_types_of_options_are_the_options() -> None:
    assert set(job.Options.__annotations__) == set(job.OPTION_NAMES)
    assert {"priority", "delay", "track"} <= set(job.OPTION_NAMES)
    assert {"retry_on", "features"} <= set(registry.OPTION_NAMES)
