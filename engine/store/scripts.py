"""Loads the Lua scripts from the package, puts their includes in place and names each by its SHA-1."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Final

_INCLUDE: Final = re.compile(r"^--@include ([a-z_]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """One transition. EVALSHA takes `sha`; EVAL takes `text`, from which Redis computes the same SHA."""

    name: str
    text: str
    sha: str


@cache
def _file(path: str) -> str:
    return resources.files("tqe.lua").joinpath(path).read_text("utf-8")


def _load(name: str) -> Script:
    text = _INCLUDE.sub(lambda match: _file(f"include/{match[1]}.lua").rstrip("\n"), _file(f"{name}.lua"))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _load_all() -> dict[str, Script]:
    files = (entry.name for entry in resources.files("tqe.lua").iterdir())
    names = sorted(name.removesuffix(".lua") for name in files if name.endswith(".lua"))
    return {name: _load(name) for name in names}


SCRIPTS: Final[Mapping[str, Script]] = MappingProxyType(_load_all())
