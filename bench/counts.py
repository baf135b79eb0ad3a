"""Machine instructions a job for codec and dispatch, counted by valgrind: figures that noise cannot blur.

    python -m bench.counts            compare with the committed figures, exit 1 if one has grown too much
    python -m bench.counts --update   make these the committed figures of this Python

    python -m bench.counts --require  fail where valgrind is missing, instead of skipping

A count depends on the interpreter, the compiler and what decodes payloads, so figures are kept by all three;
where there are none for those at hand, the counts are only printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from bench.micro.parts import PARTS, Part

COMMITTED = Path(__file__).parent / "counts.json"
WARM_UP = 20  # the interpreter specialises what has run some times
CALLS = 5
# What stands for one job is called more often: else what happens once (a table grows, a free list is empty)
# counts as much as the job.
CALLS_OF_ONE = 200
TOLERANCE = 0.03
# A call that Python passes on to the C library and that nobody else makes: valgrind writes down what it has
# counted each time before it, and starts from zero.
MARK = os.getppid
TRIGGER = "getppid"
UNCHECKED = "NOT CHECKED: instructions a job"


def calls(part: Part) -> int:
    """How often a part is done while it is watched."""
    return CALLS_OF_ONE if part.jobs == 1 else CALLS


def run_parts() -> None:
    """What valgrind watches: for each part a mark, some calls, a mark."""
    gc.collect()
    gc.disable()
    for part in PARTS.values():
        once = part.make()
        for _ in range(WARM_UP):
            once()
        MARK()
        for _ in range(calls(part)):
            once()
        MARK()


def count() -> dict[str, float]:
    """Instructions a job of each part."""
    with tempfile.TemporaryDirectory(prefix="tqe-counts-") as folder:
        base = Path(folder) / "dump"
        command = ["valgrind", "--tool=callgrind", f"--dump-before={TRIGGER}"]
        command += [f"--callgrind-out-file={base}", sys.executable, "-m", "bench.counts", "--watched"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONMALLOC": "pymalloc"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"valgrind failed:\n{done.stderr[-2000:]}")
        dumps = [_total(Path(f"{base}.{number}")) for number in range(1, 2 * len(PARTS) + 1)]
    # Of each pair the first covers setting up, the second the calls.
    worked = dumps[1::2]
    return {
        name: round(total / calls(part) / part.jobs, 1)
        for (name, part), total in zip(PARTS.items(), worked, strict=True)
    }


def _total(dump: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)", dump.read_text("utf-8", "replace"), re.M)
    if found is None:
        raise SystemExit(f"{dump.name} holds no total")
    return int(found[1])


def fingerprint() -> str:
    """What the counts depend on beside the code: `cpython-3.11 x86_64 cc-12 msgspec-0.20.0`."""
    said = subprocess.run(["cc", "-dumpversion"], capture_output=True, text=True, check=False).stdout.strip()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    compiler = f"cc-{said.partition('.')[0]} msgspec-{metadata.version('msgspec')}"
    return f"{sys.implementation.name}-{version} {platform.machine()} {compiler}"


def compare(counted: dict[str, float], committed: dict[str, float]) -> list[str]:
    """Prints the table; the parts that have grown beyond the tolerance."""
    grown = []
    width = max(map(len, counted))
    print(f"{'instructions a job':{width}}  {'now':>10}  {'committed':>10}  change")
    for name, now in counted.items():
        before = committed.get(name)
        change = None if not before else now / before - 1
        told = "new" if change is None else f"{change:+.1%}"
        print(f"{name:{width}}  {now:>10,.1f}  {'' if before is None else f'{before:,.1f}':>10}  {told}")
        if change is not None and change > TOLERANCE:
            grown.append(name)
    return grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="commit these counts for this interpreter")
    parser.add_argument("--require", action="store_true", help="fail where valgrind is missing")
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watched:
        run_parts()
        return 0
    if shutil.which("valgrind") is None:
        print(f"{UNCHECKED}: valgrind, which counts them, is not installed (apt-get install valgrind)")
        return int(options.require)
    known = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    kind = fingerprint()
    counted = count()
    grown = compare(counted, known.get(kind, {}))
    if options.update:
        known[kind] = counted
        COMMITTED.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        print(f"written for {kind}")
        return 0
    if kind not in known:
        print(f"{UNCHECKED}: no figures are committed for {kind}; there are: {', '.join(known) or 'none'}")
        print("Where this machine's are to be kept: make bench-counts UPDATE=1")
        return 0
    if grown:
        print(f"more than {TOLERANCE:.0%} above the committed figures: {', '.join(grown)}")
        print("If that is the price of something, say so in the commit and run: make bench-counts UPDATE=1")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
