"""The queues of `peers.toml` and the environments in which they live, outside of the tree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOME = Path("~/.cache/tqe-peers").expanduser()
NEWER = ("python3.14", "python3.13", "python3.12")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One variant; `peers.toml` says what each field means."""

    name: str
    adapter: str
    worker: str
    instances: str
    jobs: int
    guarantee: str
    results: str
    bulk: str
    config: str
    python: tuple[str, ...] = ()
    node: tuple[str, ...] = ()
    python_min: str = ""
    environment: str = ""
    quiet: tuple[tuple[str, ...], ...] = ()
    counted: tuple[str, ...] = ()
    prepare: tuple[tuple[str, ...], ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    threads: bool = False
    submit_jobs: int = 0
    timed: dict[str, int] = field(default_factory=lambda: {"jobs": 1_000, "rate": 200})

    @property
    def is_ours(self) -> bool:
        return not self.python and not self.node

    def home(self, root: Path) -> Path:
        """Its environment; ours is the one that runs this."""
        return Path(sys.prefix) if self.is_ours else root / (self.environment or self.name)

    def bin(self, root: Path) -> Path:
        return self.home(root) / "bin"

    def installed(self, root: Path) -> bool:
        if self.node:
            return (self.home(root) / "node_modules").is_dir()
        return self.is_ours or (self.bin(root) / "python").exists()

    def producer(self, root: Path) -> list[str]:
        return ["node" if self.node else str(self.bin(root) / "python"), str(HERE / self.adapter)]


def load() -> dict[str, Peer]:
    text = (HERE / "peers.toml").read_text("utf-8")
    return {name: Peer(name=name, **fields) for name, fields in tomllib.loads(text).items()}


def chosen(names: list[str]) -> list[Peer]:
    known = load()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"there is no peer {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


# ------------------------------------------------------------------ environments


def set_up(peers: list[Peer], root: Path) -> None:
    """Make what is missing; a queue that cannot be installed here is said and left out later."""
    done: set[Path] = set()
    for peer in peers:
        home = peer.home(root)
        if peer.is_ours or home in done:
            continue
        done.add(home)
        wanted = sorted((*peer.python, *peer.node))
        stamp = home / "installed.json"
        if stamp.exists() and json.loads(stamp.read_text()) == wanted:
            continue
        print(f"{peer.name}: installing {', '.join(wanted)}", file=sys.stderr)
        failure = _install_node(peer, home) if peer.node else _install_python(peer, home)
        if failure:
            print(f"{peer.name}: left out: {failure}", file=sys.stderr)
            shutil.rmtree(home, ignore_errors=True)
        else:
            stamp.write_text(json.dumps(wanted))


def _install_python(peer: Peer, home: Path) -> str:
    python = _newer(peer.python_min) if peer.python_min else sys.executable
    if not python:
        return f"it needs Python {peer.python_min}, and there is none on PATH"
    if not (home / "bin" / "python").exists():
        failure = _run([python, "-m", "venv", str(home)])
        if failure:
            return failure
    return _run([str(home / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", *peer.python])


def _install_node(peer: Peer, home: Path) -> str:
    if not shutil.which("npm"):
        return "npm is not installed"
    home.mkdir(parents=True, exist_ok=True)
    (home / "package.json").write_text('{"private": true}\n')
    return _run(["npm", "install", "--silent", "--no-audit", "--no-fund", *peer.node], cwd=home)


def _newer(least: str) -> str:
    """An interpreter that is new enough: this one, or one on PATH."""
    wanted = tuple(map(int, least.split(".")))
    if sys.version_info[:2] >= wanted:
        return sys.executable
    check = f"import sys; sys.exit(sys.version_info < {wanted})"
    managed = sorted(map(str, Path("~/.pyenv/versions").expanduser().glob("3.1[2-9]*/bin/python3")))
    for found in (*map(shutil.which, NEWER), *reversed(managed)):
        if found and not _run([found, "-c", check]):
            return found
    return ""


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it failed"])[-1]


def versions(peer: Peer, root: Path) -> dict[str, str]:
    """Versions of what a peer consists of, as they are installed."""
    if peer.node:
        found = {}
        for package in peer.node:
            name = package.rpartition("@")[0]
            told = json.loads((peer.home(root) / "node_modules" / name / "package.json").read_text())
            found[name] = told["version"]
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
        return {**found, "node": node.stdout.strip()}
    names = [spec.partition("==")[0].partition("[")[0] for spec in peer.python] or ["tqe"]
    code = "import json, sys, platform; from importlib.metadata import version as v\n"
    code += "print(json.dumps({**{n: v(n) for n in sys.argv[1:]}, 'python': platform.python_version()}))"
    said = subprocess.run(
        [str(peer.bin(root) / "python"), "-c", code, *names], capture_output=True, text=True, check=False
    )
    told: dict[str, str] = json.loads(said.stdout or "{}")
    return told
