"""The REST API on this machine: `make bench-http`, about four minutes; figures in bench/results/http.json."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.rest import clients, order, table
from tqe.bench import machine
from tqe.bench.suite import LOAD_MAX

APP = """
from tqe import App

app = App()


@app.task("EMAIL")
def email(to: str, n: int) -> int:
    return n
"""
RUNS = 3
FLOOD_S, RATE_S, BATCH_S, JOURNEY_S, CHAOS_S = 5, 8, 5, 12, 15
RATE_PER_S, JOURNEYS_PER_S, CHAOS_PER_S = 1_000, 100, 50
KILL_EVERY_S = 2.0
WORKERS = 2


class Bench:
    """A folder with a Redis of its own, and the programs that were started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("TQE_")}
        self.env |= {"TQE_DATA_DIR": str(folder / "data")}
        (folder / "work.py").write_text(APP + order.TASK)

    @contextlib.contextmanager
    def program(self, words: str, *args: str) -> Iterator[str]:
        """A tqe command, from when it has said these words; what it has said until then."""
        log = self.folder / f"{args[0]}.log"
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "tqe.cli.main", *args]
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            for _ in range(600):
                if words in log.read_text():
                    break
                if process.poll() is not None:
                    raise SystemExit(f"tqe {args[0]} ended:\n{log.read_text()}")
                time.sleep(0.05)
            yield log.read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def server(self) -> Iterator[int]:
        """`tqe serve` with one process; its port."""
        with self.program("stop  ", "serve", "work:app", "--port", "0") as said:
            found = re.search(r"serving +http://[^ ]*:(\d+)", said)
            assert found is not None, said
            yield int(found[1])


def workers_of(port: int) -> list[int]:
    """Pids of the workers that live."""
    with urllib.request.urlopen(f"http://{clients.HOST}:{port}/api/v1/workers", timeout=10) as answer:
        return [worker["pid"] for worker in json.load(answer)["workers"]]


async def chaos(port: int) -> tuple[clients.Timed, int]:
    """Jobs at a rate while a worker is killed every two seconds, in turn."""
    killed = 0

    async def kill() -> None:
        nonlocal killed
        while True:
            await asyncio.sleep(KILL_EVERY_S)
            pids = await asyncio.to_thread(workers_of, port)
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[killed % len(pids)], signal.SIGKILL)
                    killed += 1

    killer = asyncio.create_task(kill())
    try:
        _, completed = await clients.journeys(port, CHAOS_PER_S, CHAOS_S)
    finally:
        killer.cancel()
    return completed, killed


def measure(folder: Path, scale: float) -> dict[str, Any]:
    """All figures; each run and their median."""
    bench = Bench(folder)
    runs: list[dict[str, float]] = []
    with bench.server() as port:
        clients.flood(port, max(1, 2 * scale), folder)  # imports, pools, caches
        for _ in range(RUNS):
            flood = clients.flood(port, max(1, FLOOD_S * scale), folder)
            rate = asyncio.run(clients.singles(port, RATE_PER_S, RATE_S * scale))
            batch = asyncio.run(clients.batches(port, BATCH_S * scale))
            runs.append(
                {
                    "submits_per_s": flood["requests_per_s"],
                    **{f"submit_{name}": value for name, value in rate.figures().items()},
                    "batch_jobs_per_s": batch["jobs_per_s"],
                    "failed": flood["failed"] + rate.failed,
                }
            )
    shutil.rmtree(folder / "data", ignore_errors=True)  # what was submitted is not to be run
    with bench.server() as port, bench.program("workers", "run", "work:app", "--procs", str(WORKERS)):
        asyncio.run(clients.journeys(port, JOURNEYS_PER_S, 2 * scale))
        submitted, completed = asyncio.run(clients.journeys(port, JOURNEYS_PER_S, JOURNEY_S * scale))
        hurt, killed = asyncio.run(chaos(port))
    with bench.server() as port:
        workers = ("--procs", str(order.WORKERS), "--no-pin")
        with bench.program("workers", "run", "work:app", *workers):
            compared = order.compare(bench, port, scale)
    return {
        "runs": runs,
        "median": {name: median(run[name] for run in runs) for name in runs[0]},
        "end_to_end": {
            "jobs_per_s": len(completed.times_ms) / completed.took_s,
            "failed": completed.failed,
            **{f"submit_{name}": value for name, value in submitted.figures().items()},
            **{f"completion_{name}": value for name, value in completed.figures().items()},
        },
        "chaos": {
            "jobs": len(hurt.times_ms),
            "failed": hurt.failed,
            "workers_killed": killed,
            **{f"completion_{name}": value for name, value in hurt.figures().items()},
        },
        "order": compared,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/http.json"))
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--scale", type=float, default=1.0, help="of the time that each part takes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tqe-bench-") as name:
        folder = Path(name)
        fingerprint = machine.machine(folder)
        quiet = fingerprint["load_average"][0] <= LOAD_MAX * fingerprint["cores"]
        found = {
            "schema": 1,
            "tool": "make bench-http",
            "taken": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": fingerprint,
            "versions": machine.versions("the embedded one"),
            "generator": "wrk" if shutil.which("wrk") else "own",
            "quiet": quiet,
            "scale": options.scale,
            **measure(folder, options.scale),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1, default=round) + "\n")
    print(table.made(found))
    if options.write:
        table.put(found, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
