"""The demo's second part: the same jobs as they came and by predicted duration, side by side."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from tqe import clock
from tqe.cli import demo_app, learning
from tqe.cli.output import duration, number, show, table
from tqe.client import Client
from tqe.errors import TQEError
from tqe.job import split_job_id
from tqe.ml import ModelError
from tqe.settings import Settings
from tqe.store import learning as stored
from tqe.store import reading
from tqe.store.model import DEFAULT_MODE, Mode

MODES: Final[tuple[Mode, ...]] = ("fifo", "bounded", "sjf")
LANE: Final = "normal"
SHARE: Final = 0.2  # of the first part's jobs
PASS_S: Final = 4.0  # of work at most in a pass, so that the demo stays below a minute
JOBS_MIN: Final = 400  # below, there is too little to learn from
BURSTS: Final = 8
LOAD: Final = 1.3  # bursts come so much faster than they can be worked off: a backlog grows
INSTALL_S: Final = 10.0
FOLLOW_S: Final = 1.0  # in which workers see a changed mode or version on their board
STALL_S: Final = 120.0
LOOK_S: Final = 0.1
BAR: Final = 40

Job = tuple[str, dict[str, Any]]  # type, payload


@dataclass(frozen=True, slots=True)
class Outcome:
    """Completion times of one pass: submission to end, in seconds, ascending."""

    mode: Mode
    spans_s: Sequence[float]

    @property
    def mean_s(self) -> float:
        return sum(self.spans_s) / len(self.spans_s)

    def at(self, share: float) -> float:
        return self.spans_s[min(len(self.spans_s) - 1, int(share * len(self.spans_s)))]

    def dump(self) -> dict[str, Any]:
        return {
            "mean_s": round(self.mean_s, 4),
            **{name: round(self.at(q), 4) for name, q in (("p50_s", 0.5), ("p95_s", 0.95), ("p99_s", 0.99))},
            "max_s": round(self.spans_s[-1], 4),
            "percentiles_s": [round(self.at(q / 100), 4) for q in range(101)],
        }


def sample(paths: Sequence[str], failed: set[str], per_s: float) -> list[Job]:
    """A part of the first part's jobs, in random order; none that fail, since their retries would tell of
    something else. `per_s` is what the workers managed in the first part."""
    whole = [path for path in paths if path not in failed]
    draw = random.Random(2)
    most = int(per_s * PASS_S) // len(demo_app.TASKS)
    wanted = max(min(int(len(whole) * SHARE), most), -(-JOBS_MIN // len(demo_app.TASKS)))
    picked = draw.sample(whole, min(len(whole), wanted))
    jobs: list[Job] = [(task.name, {"path": path}) for task in demo_app.TASKS for path in picked]
    draw.shuffle(jobs)
    return jobs


def compare(
    client: Client,
    settings: Settings,
    jobs: Sequence[Job],
    *,
    per_s: float,
    log: Path,
    alive: Callable[[], None],
) -> dict[str, Any] | None:
    """Each mode's pass over the same jobs; None, with the reason said, where that cannot be done.

    `per_s` is what the workers managed in the first part. The first pass is FIFO; what it and the first part
    have taught is trained on, judged by the gate and published; then the others follow.
    """
    if len(jobs) < JOBS_MIN:
        click.echo("too few files to learn durations from: the order is not compared")
        return None
    every_s = len(jobs) / BURSTS / per_s / LOAD
    click.echo(
        f"\nDoes the order matter? {number(len(jobs))} of these jobs again, mixed, in one lane:"
        f" {BURSTS} bursts, one each {duration(every_s)}"
    )
    outcomes, told = [], {"chosen": "", "reason": ""}
    with learning.opened(settings) as queue:
        try:
            for mode in MODES:
                stored.set_mode(queue.door, queue.keys, [LANE], mode)
                if mode == "bounded":
                    told = learn(queue, settings, log, alive)
                time.sleep(FOLLOW_S)
                outcomes.append(Outcome(mode, one_pass(client, jobs, every_s, alive)))
        except ModelError as e:
            click.echo(f"the order is not compared: {e}")
            return None
        finally:
            stored.set_mode(queue.door, queue.keys, [LANE], DEFAULT_MODE)
    return {
        "jobs": len(jobs),
        "bursts": BURSTS,
        "every_s": round(every_s, 4),
        "procs": settings.procs,
        **told,
        "modes": {outcome.mode: outcome.dump() for outcome in outcomes},
    }


def one_pass(client: Client, jobs: Sequence[Job], every_s: float, alive: Callable[[], None]) -> list[float]:
    """Submit the bursts at their times, wait for the end, and tell how long each job took from submission."""
    began_s, size = clock.monotonic_ns() / 1e9, -(-len(jobs) // BURSTS)
    wanted = []
    for burst in range(BURSTS):
        time.sleep(max(0.0, began_s + burst * every_s - clock.monotonic_ns() / 1e9))
        part = jobs[burst * size : (burst + 1) * size]
        wanted += [split_job_id(handle.id) for handle in client.submit_many(part, priority=LANE)]
    deadline_s = clock.monotonic_ns() / 1e9 + STALL_S
    while True:
        alive()
        records = [found.status for found in client.run(reading.job_records(client.core.keys, wanted))]
        if all(record.ended for record in records):
            break
        if clock.monotonic_ns() / 1e9 > deadline_s:
            raise TQEError(f"jobs have not ended after {STALL_S:.0f} s")
        time.sleep(LOOK_S)
    return sorted(
        (record.finished_at - record.submitted_at).total_seconds()
        for record in records
        if record.finished_at is not None and record.submitted_at is not None
    )


def learn(queue: learning.Queue, settings: Settings, log: Path, alive: Callable[[], None]) -> dict[str, Any]:
    """What `tqe ml train` does; waits until the workers' host has taken it. Raises ModelError."""
    from tqe.ml import model, traces, trainer

    runs = traces.parse(stored.traces(queue.door, queue.keys))
    with tempfile.TemporaryDirectory(prefix="tqe-model-") as made:
        path, manifest = trainer.publish(
            traces.trace_of("demo", runs), Path(made), servers=settings.procs, trained_at=model.now()
        )
        learning.publish(queue, path, manifest)
    reason = str(manifest.gate["reason"])
    click.echo(f"learnt from {number(len(runs))} runs; the gate chose {manifest.chosen}: {reason}")
    words = f"model {manifest.version} is installed"
    end_ns = clock.monotonic_ns() + int(INSTALL_S * 1e9)
    while words not in log.read_text("utf-8", "replace"):
        alive()
        if clock.monotonic_ns() > end_ns:
            raise ModelError(f"the version was not installed within {INSTALL_S:.0f} s; {log} may say why")
        time.sleep(LOOK_S)
    return {"chosen": manifest.chosen, "reason": reason, "bound_s": round(manifest.bound_s, 4)}


def tell(found: dict[str, Any]) -> None:
    """Figures and bars for people."""
    headings = ("mean", "p50", "p95", "p99", "max")
    rows = table("order", *headings, "mean vs FIFO", "", right=(*headings, "mean vs FIFO"))
    fifo_s = found["modes"]["fifo"]["mean_s"]
    most_s = max(mode["mean_s"] for mode in found["modes"].values())
    for name, mode in found["modes"].items():
        rows.add_row(
            name,
            *(duration(mode[f"{heading}_s"]) for heading in headings),
            f"{mode['mean_s'] / fifo_s - 1:+.0%}",
            "█" * max(1, round(BAR * mode["mean_s"] / most_s)),
        )
    show(rows)
    click.echo("(from submission to end; bounded is the default once a version is published)\n")


def write(found: dict[str, Any], path: Path) -> None:
    """The figures as JSON, or a picture of them, by the name's ending."""
    if path.suffix == ".json":
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    from tqe.ml import plots

    plots.draw_order(found["modes"], path)
