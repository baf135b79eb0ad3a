"""Builds the wheel: maps engine/, ml/ and lua/ onto the one top-level name `tqe` and compiles its fast
path."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOTS = {"tqe": "engine", "tqe.ml": "ml", "tqe.lua": "lua"}


def packages() -> list[str]:
    """Every folder with an __init__.py below the roots, so that a new sub-package needs no edit here."""
    found = []
    for name, root in ROOTS.items():
        for init in sorted(Path(root).rglob("__init__.py")):
            inner = init.parent.relative_to(root).parts
            found.append(".".join((name, *inner)))
    return found


def extensions() -> list[Extension]:
    parts = [str(p) for p in sorted(Path("engine").glob("*.px[id]"))]
    # TQE_BUILD_SANITIZE=1 gives a debug build under the address and undefined-behaviour sanitizers.
    if os.environ.get("TQE_BUILD_SANITIZE") == "1":
        flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
        link = ["-fsanitize=address,undefined"]
    else:
        # TQE_BUILD_OPTIMIZE=0 compiles in half the time, for who only wants to see that it compiles.
        flags, link = [f"-O{os.environ.get('TQE_BUILD_OPTIMIZE', '3')}"], []
    return [
        Extension(
            "tqe._fast",
            sources=["engine/_fast.pyx"],
            depends=parts,
            extra_compile_args=flags,
            extra_link_args=link,
        )
    ]


class BuildExtension(build_ext):
    """Says in one sentence what is missing: without its fast path the engine is not installed at all."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as e:
            raise SystemExit(
                f"tqe: the extension {ext.name} could not be compiled ({e}).\n"
                "tqe: a C compiler and Python's headers are needed; on Debian and Ubuntu:"
                " apt-get install gcc python3-dev"
            ) from e


setup(
    cmdclass={"build_ext": BuildExtension},
    packages=packages(),
    package_dir=ROOTS,
    # build_dir keeps the generated C out of the tree, and so out of the sdist and the wheel.
    ext_modules=cythonize(
        extensions(),
        build_dir="build/cython",
        compiler_directives={"language_level": "3"},
    ),
)
