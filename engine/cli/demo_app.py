"""The app of the demo: what its workers do with each source file of Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import io
import sysconfig
import tokenize
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tqe.app import App

LIBRARY: Final = Path(sysconfig.get_paths()["stdlib"])

BROKEN: Final = 3

app = App("demo")


def _read(path: str) -> bytes:
    return (LIBRARY / path).read_bytes()


def _size(payload: dict[str, Any]) -> dict[str, Any]:
    """What tells how long a job takes: how large its file is."""
    return {"bytes": (LIBRARY / payload["path"]).stat().st_size}


@app.task("HASH", priority="high", max_retries=2, backoff=0.3, backoff_max=1, features=_size)
def digest(path: str) -> dict[str, Any]:
    """SHA-256 of a file: short, and so in the first lane."""
    data = _read(path)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@app.task("PARSE", max_retries=2, backoff=0.3, backoff_max=1, features=_size)
def parse(path: str) -> dict[str, Any]:
    """The syntax tree of a file, counted. Fails on what is no Python of this version."""
    data = _read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old code has strange escapes: no news here
        kinds = Counter(type(node).__name__ for node in ast.walk(ast.parse(data, path)))
    return {
        "nodes": kinds.total(),
        "functions": kinds["FunctionDef"] + kinds["AsyncFunctionDef"],
        "classes": kinds["ClassDef"],
        "calls": kinds["Call"],
    }


@app.task("TOKENIZE", max_retries=2, backoff=0.3, backoff_max=1, features=_size)
def split(path: str) -> dict[str, Any]:
    """The tokens of a file, counted. Fails on an encoding that does not exist or is not true."""
    kinds = Counter(token.type for token in tokenize.tokenize(io.BytesIO(_read(path)).readline))
    return {
        "tokens": kinds.total(),
        "names": kinds[tokenize.NAME],
        "texts": kinds[tokenize.STRING],
        "comments": kinds[tokenize.COMMENT],
    }


@app.task("COMPRESS", priority="low", max_retries=2, backoff=0.3, backoff_max=1, features=_size)
def compress(path: str) -> dict[str, Any]:
    """How much smaller a file becomes: the last lane, as nobody waits for it."""
    data = _read(path)
    return {"bytes": len(data), "compressed": len(zlib.compress(data, 9))}


TASKS: Final = (parse, split, compress, digest)


def inputs() -> tuple[list[str], list[str]]:
    """Paths below the library: its Python files, test data with wrong syntax and encodings among them; and a
    few texts that are no Python at all, so that something fails also where no test data is installed."""
    packages = {"site-packages", "dist-packages", "__pycache__"}
    found = [
        path.relative_to(LIBRARY)
        for path in sorted(LIBRARY.rglob("*"))
        if path.suffix in (".py", ".txt") and not packages & set(path.parts) and path.is_file()
    ]
    python = [str(path) for path in found if path.suffix == ".py"]
    return python, [str(path) for path in found if path.suffix == ".txt"][:BROKEN]
