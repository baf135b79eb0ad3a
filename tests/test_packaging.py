"""The wheel: built from a copy of the tree, and used far away from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("engine", "ml", "lua", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, in a folder that knows nothing of the source tree."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(path, source / part)
    wheels = tmp_path_factory.mktemp("wheels")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source],
        check=True,
        capture_output=True,
        env={**os.environ, "TQE_BUILD_OPTIMIZE": "0"},
    )
    target = tmp_path_factory.mktemp("site")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_one_top_level_name(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"tqe"}


def test_every_source_file_is_in_its_place(unpacked: Path) -> None:
    expected = {
        ("tqe" if folder == "engine" else f"tqe/{folder}") + "/" + str(path.relative_to(ROOT / folder))
        for folder in ("engine", "ml", "lua")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".lua") or path.name == "py.typed" or path.parent.name == "assets"
    }
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert expected - packed == set()


def test_no_generated_c_and_no_cython_source_travels_along(unpacked: Path) -> None:
    assert [path for path in unpacked.rglob("*") if path.suffix in (".c", ".pyx", ".pxi")] == []


def test_it_works_away_from_the_source_tree(unpacked: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "import tqe, tqe._fast, tqe.errors, tqe.settings\n"
        "from importlib.metadata import version\n"
        "print(tqe.__file__); print(tqe._fast.__file__); print(version('tqe') == tqe.__version__)\n"
    )
    # The dependencies are needed, so a development install stays on the path behind it.
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.startswith(str(unpacked)) for line in said[:2]] == [True, True]
    assert said[2] == "True"
