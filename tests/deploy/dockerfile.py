"""Reads a Dockerfile into its stages and steps: as much of its grammar as ours uses."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = frozenset({"RUN", "COPY", "WORKDIR", "ENV", "USER", "ENTRYPOINT", "CMD"})


@dataclass
class Stage:
    """From one FROM to the next."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, verb: str) -> str:
        """The argument of the last step of this kind, '' if there is none."""
        return next((text for one, text in reversed(self.steps) if one == verb), "")

    def words(self, verb: str) -> list[str]:
        """The same in its JSON form, which starts no shell."""
        words: list[str] = json.loads(self.last(verb))
        return words


def read(path: Path) -> list[Stage]:
    """The stages of a Dockerfile."""
    text = re.sub(r"(?m)^\s*#.*\n", "", path.read_text())
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        verb, _, rest = line.strip().partition(" ")
        if not verb:
            continue
        if verb == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        else:
            assert verb in KNOWN, f"{verb} is not checked by these tests"
            stages[-1].steps.append((verb, rest.strip()))
    return stages


def kept(ignore: Path, name: str) -> bool:
    """Whether a file of the context gets into it: `*` keeps all out, `!name` lets one in again."""
    lines = [line for line in ignore.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    top = name.split("/")[0]
    return f"!{top}" in lines
