"""The small parts and the scripts of two commits, side by side.

    python -m bench.compare REV [--against REV] [--rounds N] [--only NAME]

Each commit is built in a folder of its own, far from the working tree; without --against the second one is
the working tree as it is installed. The suites are those of the working tree for both: of a part that an old
commit cannot run it is said that there is only the other side. Rounds alternate, and of each part the best
median counts, so that a passing disturbance does not look like a change.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
NOTABLE = 0.05


def build(revision: str, folder: Path) -> Path:
    """The package of a commit, compiled; the folder to import it from."""
    tree, site = folder / "tree", folder / "site"
    packed = folder / "tree.tar"
    run("git", "archive", "--format=tar", f"--output={packed}", revision, cwd=ROOT)
    with tarfile.open(packed) as archive:
        archive.extractall(tree, filter="data")
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    install += ["--no-build-isolation", "--target", str(site), str(tree)]
    run(sys.executable, *install, cwd=folder)
    return site


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} … failed:\n{done.stderr[-3000:]}")


def measure(site: Path | None, report: Path, only: str | None) -> dict[str, tuple[float, int]]:
    """(median in s, jobs) of each part. `site` None: what is installed."""
    command = [sys.executable, "-m", "pytest", "bench/micro", "-q", "-o", "python_files=bench_*.py"]
    command += ["-p", "no:cacheprovider", "--benchmark-max-time=0.3", "--benchmark-warmup=on"]
    command += [f"--benchmark-json={report}", *(["-k", only] if only else [])]
    environment = dict(os.environ)
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    try:
        told = json.loads(report.read_text())
    except (OSError, ValueError):
        raise SystemExit(f"nothing could be measured:\n{done.stdout[-3000:]}") from None
    return {
        one["name"].removeprefix("test_").replace("part[", "").replace("]", "").replace("[", ", "): (
            one["stats"]["median"],
            int(one["extra_info"].get("jobs", 1)),
        )
        for one in told["benchmarks"]
    }


def table(before: dict[str, list[float]], after: dict[str, list[float]], jobs: dict[str, int]) -> None:
    """Best medians in ns a job, and their ratio; the spread over the rounds says how much to believe."""
    width = max(map(len, jobs))
    print(f"{'ns a job':{width}}  {'before':>12}  {'after':>12}  {'change':>8}  spread")
    for name in jobs:
        old, new = before.get(name), after.get(name)
        if not old or not new:
            print(f"{name:{width}}  only {'before' if old else 'after'}")
            continue
        change = min(new) / min(old) - 1
        spread = max((max(values) - min(values)) / min(values) for values in (old, new))
        mark = " *" if abs(change) > max(NOTABLE, spread) else ""
        ns = [min(values) / jobs[name] * 1e9 for values in (old, new)]
        print(f"{name:{width}}  {ns[0]:>12,.1f}  {ns[1]:>12,.1f}  {change:>+8.1%}  {spread:.0%}{mark}")
    print(f"* changed by more than {NOTABLE:.0%} and by more than the rounds differ among themselves")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", metavar="REV", help="the commit to compare with")
    parser.add_argument("--against", metavar="REV", help="another commit instead of the working tree")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", metavar="NAME", help="parts whose name contains this (pytest -k)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tqe-compare-"))
    try:
        sites: list[Path | None] = []
        for number, revision in enumerate((options.before, options.against)):
            print(f"building {revision or 'nothing: the working tree is installed'}", file=sys.stderr)
            place = folder / str(number)
            place.mkdir()
            sites.append(build(revision, place) if revision else None)
        found: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
        jobs: dict[str, int] = {}
        for turn in range(options.rounds):
            for side, site in enumerate(sites):
                print(
                    f"round {turn + 1} of {options.rounds}, {'after' if side else 'before'}", file=sys.stderr
                )
                for name, (median, n) in measure(site, folder / "report.json", options.only).items():
                    found[side][name].append(median)
                    jobs[name] = n
        print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
        table(found[0], found[1], jobs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
