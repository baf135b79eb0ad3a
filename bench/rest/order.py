"""Completion times over HTTP, as jobs came and by predicted duration, with a model learnt on the way."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from bench.rest import clients

if TYPE_CHECKING:
    from bench.rest.run import Bench

WORKERS = 4
LOAD = 0.9
MEAN_S = 0.02
JOBS = 1_500  # a pass: eight seconds of submissions
PAIRS = 3
ROWS = (4.0, 0.8)  # of a report: mean and spread of the logarithm
# Milliseconds a row.
SHOPS = {"mini": 0.027, "small": 0.067, "middle": 0.134, "large": 0.269, "huge": 0.806}
TASK = f"""

import random
import time


@app.task("REPORT")
def report(shop: str, rows: int, n: int) -> int:
    noise = random.Random(n).lognormvariate(0, 0.2)  # that nobody can predict
    time.sleep({SHOPS!r}[shop] * rows * noise / 1000)
    return rows
"""
INSTALL_S = 30.0
FOLLOW_S = 1.0  # in which workers see another mode on their board

Job = tuple[str, int]  # shop, rows


def jobs_of(seed: int, jobs: int) -> list[Job]:
    """Reports on many rows for shops of different size, of MEAN_S on average."""
    draw = random.Random(seed)
    return [(draw.choice(list(SHOPS)), max(1, round(draw.lognormvariate(*ROWS)))) for _ in range(jobs)]


def compare(bench: Bench, port: int, scale: float) -> dict[str, Any]:
    """A pass to learn from, then passes in both orders in turn over the same jobs at the same times."""
    count = max(200, int(JOBS * scale))
    tell(bench, "ml", "mode", "normal", "fifo")
    one_pass(port, jobs_of(1, count), seed=1)
    said = json.loads(tell(bench, "ml", "train", "--json"))
    _installed(bench.folder / "run.log")
    pairs: list[dict[str, dict[str, float]]] = []
    for number in range(PAIRS):
        pair = {}
        for mode in ("fifo", "bounded") if number % 2 else ("bounded", "fifo"):
            tell(bench, "ml", "mode", "normal", mode)
            time.sleep(FOLLOW_S)
            pair[mode] = one_pass(port, jobs_of(2 + number, count), seed=2 + number)
        pairs.append(pair)
    changes = {
        name: [pair["bounded"][f"{name}_ms"] / pair["fifo"][f"{name}_ms"] - 1 for pair in pairs]
        for name in ("mean", "p50", "p95", "p99", "max")
    }
    return {
        "jobs": count,
        "workers": WORKERS,
        "load": LOAD,
        "mean_run_ms": MEAN_S * 1000,
        "chosen": said["chosen"],
        "pairs": pairs,
        "vs_fifo": {name: round(median(found), 4) for name, found in changes.items()},
        "vs_fifo_runs": {name: [round(one, 4) for one in found] for name, found in changes.items()},
    }


def tell(bench: Bench, *args: str) -> str:
    """A command of tqe that ends; what it said."""
    return subprocess.run(
        [sys.executable, "-m", "tqe.cli.main", *args],
        cwd=bench.folder,
        env=bench.env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def _installed(log: Path) -> None:
    end_s = time.monotonic() + INSTALL_S
    while "is installed" not in log.read_text():
        if time.monotonic() > end_s:
            raise SystemExit(f"the model was not installed:\n{log.read_text()}")
        time.sleep(0.1)


def one_pass(port: int, jobs: Sequence[Job], seed: int) -> dict[str, float]:
    """Submit each when it is due, one by one; from the records, how long each took to its end."""
    draw = random.Random(seed)
    gaps = [draw.expovariate(LOAD * WORKERS / MEAN_S) for _ in jobs]
    return asyncio.run(_pass(port, jobs, list(accumulate(gaps))))


async def _pass(port: int, jobs: Sequence[Job], dues_s: Sequence[float]) -> dict[str, float]:
    names = [""] * len(jobs)

    async def turn(connection: clients.Connection, due: float, number: int) -> None:
        shop, rows = jobs[number]
        body = {"type": "REPORT", "payload": {"shop": shop, "rows": rows, "n": number}}
        status, answer = await connection.ask(clients.post("/api/v1/jobs", json.dumps(body).encode()))
        assert status == 202, answer
        names[number] = json.loads(answer)["id"]

    await clients.at_times(port, dues_s, turn, connections=clients.CONNECTIONS)
    connection, took_ms = clients.Connection(port), []
    for name in names:
        told: dict[str, Any] = {}
        while not told.get("finishedAt"):
            _, answer = await connection.ask(clients.get(f"/api/v1/jobs/{name}?wait=30"))
            told = json.loads(answer)
        assert told["status"] == "completed", told
        span = datetime.fromisoformat(told["finishedAt"]) - datetime.fromisoformat(told["submittedAt"])
        took_ms.append(span.total_seconds() * 1000)
    connection.close()
    found = {f"p{part * 100:.0f}_ms": clients.percentile(took_ms, part) for part in (0.5, 0.95, 0.99)}
    return {"mean_ms": round(mean(took_ms), 2), **found, "max_ms": max(took_ms)}
