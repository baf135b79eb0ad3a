"""The rules of the house, run over the project; below each rule, samples that show that it can fail."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import house

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for folder in ("engine", "ml", "lua")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".pyi", ".pyx", ".pxi", ".lua") and "__pycache__" not in path.parts
}
CODE = {path: text for path, text in SOURCES.items() if path.endswith((".py", ".pyx", ".pxi"))}
PYTHON = {path: text for path, text in CODE.items() if path.endswith(".py")}
SCRIPTS = {
    Path(path).stem: text for path, text in SOURCES.items() if path.endswith(".lua") and path.count("/") == 1
}


def tracked() -> dict[str, str]:
    """Text files of the project: what git tracks, or everything where there is no git (an unpacked sdist)."""
    said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = said.stdout.split("\0") if said.returncode == 0 else list(SOURCES)
    found = {}
    for name in names:
        path = ROOT / name
        if name and path.is_file():
            data = path.read_bytes()
            if b"\0" not in data[:8192]:
                found[name] = data.decode("utf-8", "replace")
    return found


def all_of(rule, sources) -> list[str]:  # type: ignore[no-untyped-def]
    return [finding for path, text in sources.items() for finding in rule(path, text)]


def nothing(findings: list[str]) -> None:
    assert not findings, "\n" + "\n".join(findings)


# --- the project ---


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) >= 15


def test_every_file_opens_with_a_sentence() -> None:
    nothing(all_of(house.opening_sentence, {p: t for p, t in SOURCES.items() if not p.endswith(".lua")}))


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    nothing(house.stdlib_names(SOURCES))


def test_imports_point_down() -> None:
    nothing(all_of(house.layers, CODE))


def test_owners_own() -> None:
    nothing(all_of(house.owners, {p: t for p, t in CODE.items() if p.startswith(("engine/", "ml/"))}))


def test_no_function_grows_quietly_past_a_screen() -> None:
    long: dict[str, int] = {}
    for path, text in SOURCES.items():
        if not path.endswith(".pyi"):
            long |= house.long_functions(path, text)
    listed = tomllib.loads((ROOT / "tests" / "ratchet.toml").read_text())["long_functions"]
    nothing(house.ratchet(long, listed))


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_script_header_is_its_contract(name: str) -> None:
    nothing(house.lua_header(name, SCRIPTS[name]))


def test_no_script_or_caller_runs_keys_or_script_load() -> None:
    nothing(all_of(house.forbidden_commands, SOURCES))


def test_no_file_is_dead() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = [*project["scripts"].values(), *project["entry-points"]["pytest11"].values()]
    # `tqe.otel` is what users import.
    entries = [*(target.partition(":")[0] for target in targets), "tqe.otel"]
    nothing(house.dead_files(SOURCES, entries))


def test_no_path_of_a_machine_stands_in_the_project() -> None:
    nothing(all_of(house.forbidden_words, tracked()))


def test_the_compiled_fast_path_is_there() -> None:
    fast = importlib.import_module("tqe._fast")
    assert fast.__file__ is not None and fast.__file__.endswith(".so")


def test_only_one_top_level_name_is_installed(tmp_path: Path) -> None:
    """In an interpreter of its own: pytest puts folders of ours on the path of this one."""
    ask = "import importlib.util as u; print([n for n in ('engine', 'ml', 'lua', 'tqe') if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-I", "-c", ask], cwd=tmp_path, capture_output=True, check=True)
    assert found.stdout.decode().strip() == "['tqe']"


# --- each rule can fail ---


@pytest.mark.parametrize(
    ("path", "text", "part"),
    [
        ("engine/a.py", "import os\n", "no docstring"),
        ("engine/a.py", '"""helpers"""\n', "not open with a sentence"),
        ("engine/a.py", '"""What it\nowns\n\nMore text.\n"""\n', "not open with a sentence"),
        ("engine/a.pxi", "cdef int x\n", "no docstring"),
        ("engine/a.pyx", "# cython: x=1\n\nimport os\n", "no docstring"),
        ("engine/a.py", f'"""A{"a" * 300}."""\n', "characters"),
    ],
)
def test_a_bad_opening_is_found(path: str, text: str, part: str) -> None:
    assert part in house.opening_sentence(path, text)[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("engine/a.py", '"""Owns a thing."""\n'),
        ("engine/a.pyx", '# cython: x=1\n"""Owns a thing."""\n'),
        ("engine/a.pxi", "# Owns a thing.\n#\n# And more\n\ncdef int x\n"),
    ],
)
def test_a_good_opening_passes(path: str, text: str) -> None:
    assert house.opening_sentence(path, text) == []


def test_a_name_of_the_standard_library_is_found() -> None:
    assert (
        len(house.stdlib_names(["engine/store/queue.py", "engine/signal.pyx", "engine/store/keys.py"])) == 2
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("engine/board/a.py", "from tqe.store import keys\n"),
        ("engine/store/a.py", "import tqe.worker.loop\n"),
        ("engine/worker/a.py", "from tqe.steward import reaper\n"),
        ("engine/steward/a.py", "from ..worker import loop\n"),
        ("engine/client.py", "from .worker import loop\n"),
        ("engine/supervisor/a.py", "from tqe.app import App\n"),
        ("engine/errors.py", "def f():\n    from tqe import job\n"),
        ("engine/store/a.py", "from tqe import App\n"),
        ("engine/worker/a.py", "import tqe.ml.model\n"),
        ("ml/a.py", "from tqe.store import keys\n"),
        ("engine/store/a.py", "import engine.settings\n"),
        ("engine/newcomer.py", "import os\n"),
        ("engine/_fast.pyx", "from tqe.board import layout\n"),
        ("engine/_frame.pxi", "    import tqe.store\n"),
    ],
)
def test_an_import_that_points_up_is_found(path: str, text: str) -> None:
    assert house.layers(path, text) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "engine/cli/a.py",
            "from tqe import App, __version__\nfrom tqe.ml import model\nimport tqe.store.keys\n",
        ),
        ("engine/supervisor/a.py", "from tqe.worker import loop\nfrom tqe import errors\n"),
        (
            "engine/worker/a.py",
            "from . import fetcher\nfrom .runner import Runner\nfrom ..store import working\n",
        ),
        ("ml/a.py", "from tqe.job import Job\nfrom . import features\n"),
        ("engine/_fast.pyx", "from tqe.errors import DamagedFrame\nfrom libc.string cimport memcpy\n"),
        ("engine/__init__.py", "from tqe.app import App\n"),
    ],
)
def test_an_import_that_points_down_passes(path: str, text: str) -> None:
    assert house.layers(path, text) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("engine/worker/a.py", "import redis\n"),
        ("engine/worker/a.py", "from redis.asyncio import Redis\n"),
        ("engine/worker/a.py", "import os\nx = os.environ['A']\n"),
        ("engine/worker/a.py", "from os import environ\n"),
        ("engine/worker/a.py", "import os as o\nx = o.getenv('A')\n"),
        ("engine/worker/a.py", "import time\nx = time.time()\n"),
        ("engine/worker/a.py", "from time import monotonic as m\nx = m()\n"),
        ("engine/worker/a.py", "from datetime import datetime\nx = datetime.now()\n"),
        ("engine/worker/a.py", "import datetime\nx = datetime.datetime.now()\n"),
        ("engine/worker/a.py", "import os\nos.fork()\n"),
        ("engine/steward/a.py", "import signal\nsignal.signal(2, f)\n"),
        ("engine/steward/a.py", "import multiprocessing.shared_memory\n"),
        ("engine/steward/a.py", "import subprocess\n"),
        ("engine/steward/a.py", "print('x')\n"),
        ("engine/steward/a.py", "import sys\nsys.stdout.write('x')\n"),
        ("engine/cli/a.py", "import pickle\n"),
        ("engine/cli/a.py", "x = eval('1')\n"),
        ("engine/cli/a.py", "import yaml\nyaml.load(f)\n"),
        ("ml/a.py", "from pickle import loads\n"),
        ("engine/_fast.pyx", "import redis\n"),
        ("engine/_a.pxi", "    x = time.time()\n"),
        ("engine/_a.pxi", "    print(x)\n"),
    ],
)
def test_a_trespasser_is_found(path: str, text: str) -> None:
    assert house.owners(path, text) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("engine/store/call.py", "import redis\n"),
        ("engine/settings.py", "import os\nx = os.environ\n"),
        ("engine/clock.py", "import time\nx = time.time_ns()\n"),
        ("engine/supervisor/process.py", "import os, signal\nos.fork()\nsignal.signal(2, f)\n"),
        ("engine/cli/run.py", "print('x')\nimport subprocess\n"),
        (
            "engine/worker/a.py",
            "import signal\nx = signal.SIGTERM\nimport time\ntime.sleep(1)\nloop.time()\n",
        ),
        ("engine/worker/a.py", "self.redis.print()\nmodel.eval()\n"),
        ("engine/_a.pxi", "    # print(x) and time.time() are words here\n    s = 'os.environ'\n"),
    ],
)
def test_an_owner_passes(path: str, text: str) -> None:
    assert house.owners(path, text) == []


def test_long_functions_are_found_in_each_language() -> None:
    body = "    x = 1\n" * 70
    assert house.long_functions("engine/a.py", f"class A:\n  def f(self):\n{body}\n") == {
        "engine/a.py:A.f": 71
    }
    assert house.long_functions("engine/a.py", f"def f():\n{body[:-10]}\n") == {}
    cython = (
        f"cdef class A:\n    cdef int x\n\ncdef int f(int a,\n    int b) except -1:\n{body}\ncdef int y\n"
    )
    assert house.long_functions("engine/a.pyx", cython) == {"engine/a.pyx:f": 72}
    lua = f"local function f(a)\n{body}end\n\nlocal x = 1\n"
    assert house.long_functions("lua/a.lua", lua) == {"lua/a.lua:f": 72}


def test_ratchet_only_turns_one_way() -> None:
    assert house.ratchet({"a": 80}, {"a": 80}) == []
    assert "80 lines" in house.ratchet({"a": 80}, {})[0]
    assert "81 lines" in house.ratchet({"a": 81}, {"a": 80})[0]
    assert "lower it" in house.ratchet({"a": 75}, {"a": 80})[0]
    assert "lower it" in house.ratchet({}, {"a": 80})[0]


GOOD_SCRIPT = """\
-- take: lease jobs to one worker.
--
-- KEYS[1]    processing  hash of this incarnation
-- KEYS[2..]  queues      a list per lane
-- ARGV[1]    incarnation str
-- moves      queued -> running
-- returns    frames, {} when empty
-- cost       O(frames)
-- oom:       runs
redis.call('DEL', KEYS[1])
for i = 2, #KEYS do redis.call('LPOP', KEYS[i]) end
return ARGV[1]
"""


def test_a_good_script_header_passes() -> None:
    assert house.lua_header("take", GOOD_SCRIPT) == []


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("-- take:", "-- give:", "first line"),
        ("-- moves ", "-- shifts ", "`-- moves"),
        ("-- returns ", "-- gives ", "`-- returns"),
        ("-- cost ", "-- price ", "`-- cost"),
        ("-- oom:       runs", "-- oom:       perhaps", "`-- oom"),
        ("redis.call('DEL', KEYS[1])", "", "never uses"),
        ("return ARGV[1]", "return 1 -- ARGV[1]", "never uses"),
        ("return ARGV[1]", "return ARGV[1] .. ARGV[2]", "does not declare"),
        ("-- KEYS[1]    processing  hash of this incarnation\n", "", "does not declare"),
        ("-- KEYS[2..]  queues      a list per lane\n", "", "computes an index"),
        ("for i = 2, #KEYS do redis.call('LPOP', KEYS[i]) end\n", "", "never uses"),
        ("-- KEYS[2..]", "-- KEYS[3..]", "gap"),
    ],
)
def test_a_broken_script_header_is_found(old: str, new: str, part: str) -> None:
    assert old in GOOD_SCRIPT
    assert part in " ".join(house.lua_header("take", GOOD_SCRIPT.replace(old, new)))


@pytest.mark.parametrize(
    "text",
    [
        "redis.call('KEYS', 'tq:*')",
        "client.script_load(text)",
        "execute_command('SCRIPT', 'LOAD', t)",
        'b"SCRIPT LOAD"',
    ],
)
def test_a_forbidden_command_is_found(text: str) -> None:
    assert house.forbidden_commands("a", text) != []


def test_a_script_that_uses_its_keys_table_passes() -> None:
    assert house.forbidden_commands("a", "redis.call('DEL', KEYS[1])\nd.keys()\n# SCRIPT LOAD\n") == []


def test_dead_files_are_found() -> None:
    files = {
        "engine/used.py": "",
        "engine/dead.py": "",
        "engine/store/call.py": "from tqe import used, _fast\nx = 'fetch'\ny = \"tqe.store.keeper\"\n",
        "engine/store/keeper.py": "import tqe.store.call\n",
        "engine/_fast.pyx": 'include "_a.pxi"\n',
        "engine/_a.pxi": "",
        "engine/_b.pxi": "",
        "lua/fetch.lua": "--@include frame\n",
        "lua/stray.lua": "",
        "lua/include/frame.lua": "",
        "lua/include/lost.lua": "",
    }
    dead = [finding.split(":")[0] for finding in house.dead_files(files)]
    assert dead == ["engine/dead.py", "engine/_b.pxi", "lua/stray.lua", "lua/include/lost.lua"]


def test_a_machines_path_is_found_and_a_relative_one_passes() -> None:
    for path in ("/" + "work/main", "see /" + "root/.x", "/" + "home/ann/x"):
        assert house.forbidden_words("a", path) != []
    for path in ("docs/work/x", "http://host/" + "work/x", "~/" + "root/x"):
        assert house.forbidden_words("a", path) == []
