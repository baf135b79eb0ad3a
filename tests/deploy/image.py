"""Runs the steps of deploy/Dockerfile without a container engine, and then its command: `make image-check`.

Each stage gets a root folder of its own: an overlay over this machine's, so that whatever a step writes stays
in it, and /src, /opt and /app begin empty. It stands for the base image; apt, pip and the compiler are real.
Needs root on a Debian with unshare, and a minute or two.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.deploy import dockerfile

ROOT = Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.c")

# What the base image brings: a Python under the name that the steps use, where everybody may read it.
BASE = (
    "apt-get install -y -qq --no-install-recommends python3-venv python3-dev >/dev/null"
    " && ln -sf /usr/bin/python3 /usr/local/bin/python"
)

# The API begins, answers its probe, and ends when it is told to.
SERVE = """tqe serve examples.quickstart:app --port 0 > /tmp/log 2>&1 & server=$!
for _ in $(seq 100); do
    at=$(sed -n 's/.*serving *//p' /tmp/log); sleep 0.1
    python -c "import urllib.request as u; u.urlopen('$at/readyz', timeout=3)" 2>/dev/null && up=1 && break
done
kill $server; wait $server; code=$?; cat /tmp/log; test "$up$code" = 10"""


class Root:
    """One stage's root folder, and how a command runs in it."""

    def __init__(self, folder: Path) -> None:
        self.upper, self._work, self._merged = (folder / name for name in ("upper", "work", "merged"))
        for one in (self.upper, self._work, self._merged):
            one.mkdir(parents=True)
        for name in ("src", "opt", "app"):
            (self.upper / name).mkdir()
            os.setxattr(self.upper / name, "trusted.overlay.opaque", b"y")
        self.env = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
        }
        self.cwd = "/"
        self.user = "0:0"

    def run(self, *command: str) -> None:
        """Run it as a container would: this root, this folder, this user; an error ends all."""
        mount = f"lowerdir=/,upperdir={self.upper},workdir={self._work}"
        uid, gid = self.user.split(":")
        script = (
            f"set -e; mount -t overlay overlay -o {mount} {self._merged}; cd {self._merged}"
            "; for d in proc sys dev; do mount --rbind /$d $d; done; mount -t tmpfs tmpfs tmp; chmod 1777 tmp"
            f'; exec chroot --userspec={uid}:{gid} . /bin/sh -c \'cd "$0" && exec "$@"\' {self.cwd} "$@"'
        )
        inside = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script, "sh", *command]
        subprocess.run(inside, env=self.env, check=True)


def build(folder: Path) -> Root:
    """Every step of every stage, in order; the last stage's root."""
    done: dict[str, Root] = {}
    stages = dockerfile.read(ROOT / "deploy" / "Dockerfile")
    for number, stage in enumerate(stages):
        root = done[stage.name] = Root(folder / f"stage{number}")
        root.run("/bin/sh", "-c", BASE)
        for verb, text in stage.steps:
            print(f"{verb} {text}", flush=True)
            _step(root, done, verb, text)
    return root


def _step(root: Root, done: dict[str, Root], verb: str, text: str) -> None:
    if verb == "RUN":
        root.run("/bin/sh", "-c", text)
    elif verb == "WORKDIR":
        root.cwd = text
        (root.upper / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif verb == "ENV":
        for one in text.split():
            name, _, value = one.partition("=")
            root.env[name] = value.replace("$PATH", root.env["PATH"])
    elif verb == "USER":
        root.user = text
    elif verb == "COPY":
        *sources, target = text.split()
        context = ROOT
        if sources[0].startswith("--from="):
            context = done[sources.pop(0).partition("=")[2]].upper
        for source in sources:
            _copy(
                context / source.lstrip("/"),
                root.upper / os.path.normpath(f"{root.cwd}/{target}").lstrip("/"),
            )


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(
            source,
            target,
            symlinks=True,
            dirs_exist_ok=True,
            ignore=IGNORED if source.is_relative_to(ROOT) else None,
        )
    else:
        shutil.copy(source, target / source.name if target.is_dir() else target)


def main() -> int:
    """Build, then let the image's own entrypoint run a job as its own user."""
    if os.getuid() != 0 or shutil.which("unshare") is None or shutil.which("apt-get") is None:
        print("image-check needs root, unshare and apt-get", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="tqe-image-", dir="/var/tmp") as name:
        root = build(Path(name))
        final = dockerfile.read(ROOT / "deploy" / "Dockerfile")[-1]
        program = final.words("ENTRYPOINT")
        root.run(*program, "--version")
        clean = "! test -e /opt/tqe/bin/pip && ! test -e /src/setup.py && test $(id -u) = 10001"
        root.run("/bin/sh", "-c", clean)
        root.run("/opt/tqe/bin/python", "-c", "import lightgbm, uvicorn, tqe._fast")
        command = " ".join([*program, *final.words("CMD"), "--burst", "--procs", "1"])
        data = "export TQE_DATA_DIR=/tmp/data"
        root.run(
            "/bin/sh", "-c", f'{data}; tqe submit GREET \'{{"name": "Ann"}}\' && {command} && tqe status'
        )
        root.run("/bin/sh", "-c", f"{data}; {SERVE}")
    print("the image's steps and its commands work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
