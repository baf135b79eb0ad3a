"""The rules of the house as functions: each takes text and answers with the findings, one line each.

They read source, they import nothing of it. `tests/test_house.py` runs them over the project, and over
small bad samples to show that each can fail.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# Who may import whom: from strictly lower ranks, and from one's own rank only if it is in `PEERS`.
# The first part of the name below tqe counts (`tqe.store.keys` is `store`).
RANKS: Mapping[str, int] = {
    "errors": 0,
    "settings": 0,
    "clock": 0,
    "cpus": 0,
    "formats": 0,
    "job": 1,
    "codec": 1,
    "registry": 1,
    "schedule": 1,
    "telemetry": 1,
    "current": 1,
    "_fast": 1,
    "_pure": 1,
    "_pure_board": 1,
    "lua": 1,
    "board": 2,
    "store": 3,
    "worker": 4,
    "steward": 4,
    "client": 4,
    "app": 5,
    "supervisor": 5,
    "bench": 6,
    "testing": 6,
    "otel": 6,
    "api": 6,
    "cli": 6,
}
# Worker, steward and client never import each other: they meet in the store and on the board.
PEERS = frozenset({0, 1, 6})
# The clock too: the breaker and the age of a model need time, and only `clock` may read one.
ML_MAY_IMPORT = frozenset({"job", "errors", "clock"})

# Calls and imports that have one owner. A pattern ends at a dot or fits whole; an owner with a slash at the
# end is a folder. Paths are below engine/.
OWNERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "talks to Redis": (("redis", "hiredis"), ("store/",)),
    "reads the environment": (
        ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"),
        ("settings.py",),
    ),
    "reads a clock": (
        (
            "time.time",
            "time.time_ns",
            "time.monotonic",
            "time.monotonic_ns",
            "time.clock_gettime",
            "time.clock_gettime_ns",
            "datetime.now",
            "datetime.utcnow",
            "datetime.datetime.now",
            "datetime.datetime.utcnow",
            "datetime.date.today",
            "date.today",
        ),
        # The keeper is a program of its own, which runs by its path and imports nothing of ours.
        ("clock.py", "store/keeper.py"),
    ),
    "forks or handles signals": (
        (
            "os.fork",
            "os.forkpty",
            "os.posix_spawn",
            "os.posix_spawnp",
            "signal.signal",
            "signal.set_wakeup_fd",
            "signal.pthread_sigmask",
            "signal.setitimer",
            "signal.alarm",
            "multiprocessing",
        ),
        ("supervisor/process.py", "store/keeper.py"),
    ),
    "starts programs": (
        (
            "subprocess",
            "asyncio.create_subprocess_exec",
            "asyncio.create_subprocess_shell",
            "os.system",
            "os.popen",
        ),
        # The canary loads a model in a child first: a damaged one kills the process that holds it.
        ("store/embedded.py", "store/keeper.py", "store/binaries.py", "canary.py", "cli/"),
    ),
    "writes to the terminal": (("print", "sys.stdout", "sys.stderr"), ("cli/",)),
    "runs what data says": (
        (
            "pickle",
            "cPickle",
            "marshal",
            "shelve",
            "dill",
            "cloudpickle",
            "eval",
            "exec",
            "yaml.load",
            "jsonpickle",
        ),
        (),
    ),
}

LONG_FUNCTION_LINES = 70


# --- files and their sentences ---


def opening_sentence(path: str, text: str) -> list[str]:
    """A file opens with a docstring (in .pxi and .lua: a comment will do) whose first paragraph is a
    sentence."""
    first = _opening(path, text)
    if first is None:
        return [f"{path}: opens with no docstring"]
    paragraph = " ".join(first.strip().split("\n\n")[0].split())
    if not re.fullmatch(r"[A-Z`_\"'(].*[.:]", paragraph):
        return [f"{path}: does not open with a sentence: {paragraph!r}"]
    if len(paragraph) > 240:
        return [f"{path}: one sentence that says what the file owns, not {len(paragraph)} characters"]
    return []


def _opening(path: str, text: str) -> str | None:
    if path.endswith((".py", ".pyi")):
        return ast.get_docstring(ast.parse(text))
    body = re.sub(r"\A(?:#\s*(?:cython|distutils):.*\n|\s*\n)*", "", text)
    quoted = re.match(r'[rR]?"""(.*?)"""', body, re.S)
    if quoted:
        return quoted[1]
    comment = re.match(r"(?:#(?!!).*\n?)+", body)
    return re.sub(r"(?m)^# ?", "", comment[0]) if comment else None


def stdlib_names(paths: Iterable[str]) -> list[str]:
    """A module named like one of the standard library shadows it as soon as someone runs a neighbour as a
    script."""
    return [
        f"{path}: the standard library has a module of that name"
        for path in paths
        if path.endswith((".py", ".pyx"))
        and Path(path).stem in sys.stdlib_module_names
        and not Path(path).stem.startswith("__")
    ]


# --- imports ---


def imports(text: str, package: str = "") -> Iterator[str]:
    """The dotted name of everything that a Python text imports, at any depth, relative ones resolved."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{above}.{base}" if base else above
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of_cython(text: str) -> Iterator[str]:
    """The same for Cython, by lines; `cimport` of C headers is none of our business."""
    for match in re.finditer(
        r"(?m)^\s*(?:from\s+([\w.]+)\s+import\s+\(?([\w, ]+)|import\s+([\w., ]+))", text
    ):
        if match[1]:
            yield from (f"{match[1]}.{name.split()[0]}" for name in match[2].split(",") if name.strip())
        else:
            yield from (name.split()[0] for name in match[3].split(",") if name.strip())


def module_name(path: str) -> str:
    """engine/store/keys.py -> tqe.store.keys, ml/model.py -> tqe.ml.model"""
    parts = list(Path(path).with_suffix("").parts)
    head = ["tqe"] if parts[0] == "engine" else ["tqe", parts[0]]
    rest = [part for part in parts[1:] if part != "__init__"]
    return ".".join(head + rest)


def _imported(path: str, text: str) -> Iterator[str]:
    if path.endswith((".pyx", ".pxi", ".pxd")):
        yield from imports_of_cython(text)
        return
    name = module_name(path)
    package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
    yield from imports(text, package)


def layers(path: str, text: str) -> list[str]:
    """Imports point down."""
    me = module_name(path)
    if me == "tqe":
        return []  # the front of the house shows what lies behind it
    mine = me.split(".")[1]
    if mine.startswith("_") and path.endswith(".pxi"):
        mine = "_fast"
    if mine != "ml" and mine not in RANKS:
        return [f"{path}: {mine} has no rank: give it one in tests/support/house.py"]
    found = []
    for name in sorted(set(_imported(path, text))):
        parts = name.split(".")
        if parts[0] in ("engine", "ml", "lua"):
            found.append(f"{path}: imports {name}: the installed name is tqe")
        if parts[0] != "tqe" or len(parts) < 2:
            continue
        theirs = parts[1]
        if theirs == mine or theirs in ("__version__",):
            continue
        if not _may_import(mine, theirs):
            found.append(f"{path}: {mine} imports {theirs}, which is not below it")
    return found


def _may_import(mine: str, theirs: str) -> bool:
    if mine == "ml":
        return theirs in ML_MAY_IMPORT
    if theirs == "ml":
        return mine == "cli"  # the composition root hands the predictor in
    if theirs not in RANKS:
        # A name of the front (`from tqe import App`): only those above everything may use it.
        return RANKS[mine] == max(RANKS.values())
    if RANKS[theirs] == RANKS[mine]:
        return RANKS[mine] in PEERS
    return RANKS[theirs] < RANKS[mine]


# --- owners ---


def owners(path: str, text: str) -> list[str]:
    """What only its owner may do, by imports and by calls. `path` starts with engine/ or ml/."""
    inner = path.split("/", 1)[1]
    names = {name: None for name in _imported(path, text)}
    names |= dict.fromkeys(_dotted(path, text))
    found = []
    for what, (patterns, allowed) in OWNERS.items():
        if any(inner == owner or (owner.endswith("/") and inner.startswith(owner)) for owner in allowed):
            continue
        for name in names:
            if any(name == p or name.startswith(p + ".") for p in patterns):
                found.append(f"{path}: {name}: only {', '.join(allowed) or 'nobody'} {what}")
    return sorted(set(found))


def _dotted(path: str, text: str) -> Iterator[str]:
    """Every dotted name that is used, with `import x as y` and `from x import y` undone."""
    if not path.endswith(".py"):
        bare = re.sub(r'""".*?"""|\'\'\'.*?\'\'\'|"[^"\n]*"|\'[^\'\n]*\'|#.*', "", text, flags=re.S)
        yield from re.findall(r"(?<![\w.])(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*", bare)
        yield from re.findall(r"(?<![\w.])(print|eval|exec)(?=\()", bare)
        return
    tree = ast.parse(text)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = _name_of(node)
            if name and (
                isinstance(node, ast.Attribute) or name in known or name in ("print", "eval", "exec")
            ):
                head, dot, rest = name.partition(".")
                yield known.get(head, head) + dot + rest


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _name_of(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


# --- size ---


def long_functions(path: str, text: str) -> dict[str, int]:
    """`path:function` -> lines, for those above the limit. Docstrings count: a screen is a screen."""
    if path.endswith((".pyx", ".pxi")):
        sizes = _cython_functions(text)
    elif path.endswith(".lua"):
        sizes = _lua_functions(text)
    else:
        sizes = _python_functions(ast.parse(text), "")
    return {f"{path}:{name}": lines for name, lines in sizes if lines > LONG_FUNCTION_LINES}


def _python_functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, (node.end_lineno or node.lineno) - node.lineno + 1
            yield from _python_functions(node, name + ".")
        else:
            yield from _python_functions(node, prefix)


def _cython_functions(text: str) -> Iterator[tuple[str, int]]:
    lines = text.splitlines()
    for start, line in enumerate(lines):
        head = re.match(
            r"(\s*)(?:async\s+)?(?:def|cp?def(?!\s+(?:class|extern|struct|enum|union)))\s.*?(\w+)\(", line
        )
        if not head or line.lstrip().startswith("#"):
            continue
        # The body starts after the line that ends the signature; a declaration without one has no colon.
        last = start
        while last < len(lines) and not re.search(r"[:)]\s*(?:#.*)?$|noexcept.*$|nogil.*$", lines[last]):
            last += 1
        end = last
        for number in range(last + 1, len(lines)):
            body = lines[number]
            if body.strip() and len(body) - len(body.lstrip()) <= len(head[1]):
                break
            if body.strip():
                end = number
        yield head[2], end - start + 1


def _lua_functions(text: str) -> Iterator[tuple[str, int]]:
    start, name = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        head = re.match(r"(?:local\s+)?function\s+([\w.:]+)", line)
        if head:
            start, name = number, head[1]
        elif name and re.match(r"end\b", line):
            yield name, number - start + 1
            name = ""


def ratchet(long: Mapping[str, int], allowed: Mapping[str, int]) -> list[str]:
    """A function above the limit must be listed, may not grow, and leaves the list when it has shrunk."""
    found = []
    for name, lines in long.items():
        if lines > allowed.get(name, LONG_FUNCTION_LINES):
            limit = (
                f"{allowed[name]} are listed" if name in allowed else f"{LONG_FUNCTION_LINES} fit a screen"
            )
            found.append(f"{name} has {lines} lines; {limit}")
    for name, lines in allowed.items():
        if long.get(name, 0) < lines:
            has = long.get(name, "no more than the limit")
            found.append(f"{name} is listed with {lines} lines and has {has}: lower it")
    return found


# --- Lua ---


def lua_header(name: str, text: str) -> list[str]:
    """The header of a script is its contract: see CONTRIBUTING.md for the form."""
    lines = text.splitlines()
    header = []
    for line in lines:
        if not line.startswith("--") or line.startswith("--!"):
            break
        header.append(line)
    body = _lua_body(lines[len(header) :])
    found = []
    if not header or not re.match(rf"-- {re.escape(name)}: .+", header[0]):
        found.append(f"{name}.lua: the first line is not `-- {name}: what it does`")
    for word in ("moves", "returns", "cost"):
        if not any(re.match(rf"--\s+{word}\b:?\s+\S", line) for line in header):
            found.append(f"{name}.lua: the header has no line `-- {word} …`")
    if not any(re.match(r"--\s+oom:\s+(runs|refused)\b", line) for line in header):
        found.append(f"{name}.lua: the header has no line `-- oom: runs | refused`")
    for table in ("KEYS", "ARGV"):
        found += _slots(name, table, header, body)
    return found


def _lua_body(lines: list[str]) -> str:
    return "\n".join(re.sub(r"--.*", "", line) for line in lines)


def _slots(name: str, table: str, header: list[str], body: str) -> list[str]:
    """Slots of the header against those of the body. `KEYS[4..]` declares a fourth and all that follow."""
    declared: set[int] = set()
    rest: int | None = None
    for line in header:
        match = re.match(rf"--\s+{table}\[(\d+)(\.\.+|…)?(\d+)?\]", line)
        if match and match[2] and not match[3]:
            rest = int(match[1])
        elif match:
            declared |= set(range(int(match[1]), int(match[3] or match[1]) + 1))
    used = {int(slot) for slot in re.findall(rf"\b{table}\[\s*(\d+)\s*\]", body)}
    computed = bool(re.search(rf"\b{table}\b(?!\[\s*\d+\s*\])", body))
    found = []
    for slot in sorted(declared - used):
        # A declared slot may be reached through a computed index only when such slots are declared as well.
        found.append(f"{name}.lua: the header declares {table}[{slot}], the body never uses it")
    for slot in sorted(used - declared):
        if rest is None or slot < rest:
            found.append(f"{name}.lua: the body uses {table}[{slot}], the header does not declare it")
    if rest is not None and not computed and not any(slot >= rest for slot in used):
        found.append(f"{name}.lua: the header declares {table}[{rest}..], the body never uses it")
    if rest is None and computed:
        found.append(
            f"{name}.lua: the body computes an index of {table}, the header declares no `{table}[n..]`"
        )
    known = declared | ({rest} if rest is not None else set())
    if known != set(range(1, len(known) + 1)):
        found.append(f"{name}.lua: the slots of {table} in the header have a gap: {sorted(known)}")
    return found


def forbidden_commands(path: str, text: str) -> list[str]:
    """KEYS walks the whole database; SCRIPT LOAD is denied by careful ACLs, and EVAL caches as well."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        code = re.sub(r"(--|#).*", "", line)
        if re.search(r"""(call|execute_command)\(\s*['"]keys['"]""", code, re.I) or ".keys('*')" in code:
            found.append(f"{path}:{number}: runs KEYS")
        if re.search(r"""\bscript[\s_'",b]*load\b""", code, re.I):
            found.append(f"{path}:{number}: runs SCRIPT LOAD")
    return found


# --- the whole ---


def dead_files(files: Mapping[str, str], entry_points: Iterable[str] = ()) -> list[str]:
    """Files that nothing in the project refers to. A module that only its own test imports is dead as
    well."""
    referred: set[str] = set(entry_points)
    words: dict[str, str] = {}
    for path, text in files.items():
        if path.endswith((".py", ".pyx", ".pxi", ".pyi")):
            for name in _imported(path, text):
                referred.add(name)
                referred.add(name.rpartition(".")[0])
        words[path] = text
    dead = []
    for path in files:
        stem = Path(path).stem
        if stem in ("__init__", "__main__") or path.endswith((".pyi", ".pxd")):
            continue
        if path.endswith(".py"):
            name = module_name(path)
            # `python -m tqe.store.keeper`: named in a string.
            used = name in referred or any(f'"{name}"' in text for p, text in words.items() if p != path)
        elif path.endswith(".pyx"):
            used = module_name(path) in referred
        elif path.endswith(".pxi"):
            used = any(f'include "{Path(path).name}"' in text for text in words.values())
        elif "/include/" in path:
            used = any(
                re.search(rf"\binclude\W+(?:include/)?{re.escape(stem)}\b", text)
                for p, text in words.items()
                if p != path and p.endswith(".lua")
            )
        else:
            used = any(
                re.search(rf"""["']{re.escape(stem)}(?:\.lua)?["']""", text)
                for p, text in words.items()
                if p.startswith("engine/store/")
            )
        if not used:
            dead.append(f"{path}: nothing refers to it")
    return dead


# Paths of somebody's machine, put together here so that this file does not contain what it looks for.
_MACHINE_PATHS = tuple("/" + name + "/" for name in ("work", "root", "workspace", "mnt"))
FORBIDDEN = re.compile(
    r"(?<![\w.~$}/*-])(?:"
    + "|".join(map(re.escape, _MACHINE_PATHS))
    + r")|/"
    + r"home/[a-z]+/|/"
    + r"Users/\w+/"
)


def forbidden_words(path: str, text: str) -> list[str]:
    return [
        f"{path}:{number}: {match[0]} is a path of somebody's machine"
        for number, line in enumerate(text.splitlines(), 1)
        if (match := FORBIDDEN.search(line))
    ]
