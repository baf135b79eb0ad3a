"""What ordering costs in running workers: no-op jobs, scoring and giving back, new versions, memory.

    python -m bench.ordering.engine [--scale S] [--out FILE]

Everything runs on Redis servers of its own; two and a half minutes. Figures that have a mark say whether it
was met; `quiet` says whether the machine let them count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.ordering import tables
from bench.ordering.replay import Counted
from bench.ordering.run import heading
from bench.rest.run import Bench
from tqe import clock, codec
from tqe.bench import meters, producing, tasks
from tqe.bench.lab import Lab, RunFailed
from tqe.bench.ledger import Ledger
from tqe.bench.suite import LOAD_MAX
from tqe.board.board import Board
from tqe.cli.learning import RUNG_OF
from tqe.cli.predictor import ModelPredictor, open_library
from tqe.client import Client
from tqe.job import IDS
from tqe.ml import model, trainer
from tqe.ml.dataset import Facts, Record, collect
from tqe.settings import Settings
from tqe.store import learning, settling, working
from tqe.store import model as order
from tqe.store.call import SyncDoor, connect
from tqe.store.keys import Keys
from tqe.store.learning import Files, Published
from tqe.worker.admission import Admission
from tqe.worker.fields import Fields
from tqe.worker.ordering import Ordering

RESULT = Path(__file__).parents[1] / "results" / "ordering_engine.json"
KEYS, LANE = Keys(), "normal"
ROUNDS = 7
BULK, SINGLES = 1_000_000, 100_000
WINDOW, WINDOWS = 1_000, 15
RELOADS, RELOAD_S = 100, 15.0
FOREIGN_MAX = 0.1
WARM, WARM_NO_OPS = 600, 20_000
APP = """
import time
from tqe import App

app = App()


@app.task("NAP")
def nap(ms: float, user: str) -> None:
    time.sleep(ms / 1000)
"""
START = """
import sys, time
from pathlib import Path
begun = time.perf_counter()
from tqe.cli.predictor import ModelPredictor, open_library
predictor = ModelPredictor(Path(sys.argv[1]), library=open_library())
predictor.load(sys.argv[2])
print(time.perf_counter() - begun)
"""


# --- what is learnt


def naps(jobs: int, seed: int) -> list[dict[str, Any]]:
    """Payloads: how long a job takes, and whose it is; some users' jobs are longer."""
    draw = random.Random(seed)
    users = [draw.randrange(3) for _ in range(jobs)]
    return [
        {"ms": round(min(30.0, draw.lognormvariate(user, 0.8)), 3), "user": "abc"[user]} for user in users
    ]


def trained(folder: Path) -> tuple[Path, model.Manifest]:
    """A version with a model, as `tqe ml train` makes it."""
    draw, now_s, records = random.Random(3), 0.0, []
    for payload in naps(6_000, 3):
        now_s += draw.expovariate(1.0) * (0.1 if draw.random() < 0.05 else 0.003)
        facts = Facts("NAP", LANE, 30.0, 1, 1.7e9 + now_s, payload)
        records.append(Record(facts, now_s, payload["ms"] / 1000 * draw.lognormvariate(0.0, 0.05)))
    trace = collect("naps", records, numeric=("ms",), categorical=("user",))
    path, manifest = trainer.publish(trace, folder, servers=2, trained_at=model.now(), bound_s=5.0)
    if manifest.chosen != "model":
        raise SystemExit(f"the gate chose {manifest.chosen}: {manifest.gate['reason']}")
    return path, manifest


@dataclass(frozen=True)
class Version:
    """A version as it is published."""

    manifest: model.Manifest
    files: Files

    def publish(self, door: SyncDoor) -> None:
        told = self.manifest
        learning.publish(
            door,
            KEYS,
            Published(
                version=told.version,
                sha256=told.sha256,
                bound_us=int(told.bound_s * 1e6),
                mean_us=int(told.mean_s * 1e6),
                trained_at=told.trained_at,
                chosen=told.chosen,
                rung=RUNG_OF[told.chosen],
            ),
            self.files,
        )

    def another(self, number: int) -> Version:
        """The same model under another name and hash."""
        assert self.files.model is not None
        text = self.files.model + b"\n" * number
        at = datetime.fromisoformat(self.manifest.trained_at) + timedelta(seconds=number)
        told = replace(
            self.manifest,
            version=f"{at:%Y%m%dT%H%M%S}-{number:012x}",
            sha256=hashlib.sha256(text).hexdigest(),
        )
        return Version(told, replace(self.files, manifest=json.dumps(told.dump()).encode(), model=text))


def version_of(folder: Path, manifest: model.Manifest) -> Version:
    files = Files(
        manifest=(folder / model.MANIFEST).read_bytes(),
        history=(folder / model.HISTORY).read_bytes(),
        model=(folder / model.MODEL).read_bytes(),
    )
    return Version(manifest, files)


# --- no-op jobs


def no_ops(lab: Lab, models: Path, version: Version, scale: float) -> dict[str, Any]:
    """Draining no-op jobs with a model in use against nothing published, in turns: what is lost."""
    predictor = ModelPredictor(models, library=open_library())
    predictor.preload(version.manifest.version)
    found: dict[str, Any] = {}
    for name, words, jobs, produce in (
        ("no_op_bulk", "no-op jobs in bulk", int(BULK * scale), producing.bulk),
        ("no_op_singles", "no-op jobs in frames of one", int(SINGLES * scale), producing.singles),
    ):
        rates: dict[bool, list[float]] = {False: [], True: []}
        cpu: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(ROUNDS):
            for on in (turn % 2 == 0, turn % 2 == 1):
                with lab.stage() as stage:
                    if on:
                        version.publish(SyncDoor(connect(stage.server.url)))
                    stage.start(predictor=predictor if on else None)
                    # Types that nobody has timed are scored once: that is not what a running worker costs.
                    stage.produce(produce(WARM_NO_OPS))
                    stage.wait_for(WARM_NO_OPS)
                    stage.pause()
                    stage.produce(produce(jobs))
                    before = stage.read()
                    stage.resume()
                    stage.wait_for(WARM_NO_OPS + jobs)
                    spent = stage.spent(before)
                    rates[on].append(jobs / spent.at_ns * 1e9)
                    cpu[on].append(spent.workers_ns / jobs / 1e3)
        # What disturbs a drain only slows it: the best round of each is the nearest to what they can do.
        lost = 100 * (1 - max(rates[True]) / max(rates[False]))
        more = median(cpu[True]) - median(cpu[False])
        found[name] = figure(f"{words}: throughput lost by having a model in use", [lost], "%", 5.0)
        found[f"{name}_cpu"] = figure(f"{words}: more CPU in the worker", [more], "µs a job")
        for on, how in ((False, "without"), (True, "with")):
            found[f"{name}_{how}"] = figure(f"{words}: CPU in the worker {how}", cpu[on], "µs a job")
            found[f"{name}_rate_{how}"] = figure(f"{words}: rate {how}", rates[on], "jobs a second")
    return found


# --- scoring and giving back


def written_back(lab: Lab, models: Path, version: Version) -> dict[str, Any]:
    """A lane of unscored frames of one, window by window, as a worker does it, without the loop around."""
    told = version.manifest
    with lab.stage() as stage:
        door = SyncDoor(connect(stage.server.url))
        _fill(door, WINDOW * WINDOWS)
        incarnation = IDS.frame_id().decode()
        door.run(working.takeover(KEYS, "", incarnation, 60_000))
        names = {b"NAP": Counted(1e9)}
        quantum_ns = 5_000_000
        ordering = Ordering(
            ModelPredictor(models, library=True),
            Board(1).slots[0],
            names,
            Admission(names, quantum_ns=quantum_ns),
            quantum_ns,
            fields={b"NAP": Fields()},
        )
        modes: dict[str, order.Mode] = {LANE: "bounded"}
        bound_us, mean_us = int(told.bound_s * 1e6), told.mean_s * 1e6
        ordering.follow(order.Order(told.version, told.sha256, bound_us, mean_us, modes, "model"))
        rule = working.LaneRule(LANE, ordering.bounds[LANE])
        fetcher = working.Fetcher(KEYS, incarnation, [rule], 60_000)
        arranged, settled, in_redis = [], [], []
        for _ in range(WINDOWS):
            call = fetcher.call(jobs_max=1, bytes_max=1 << 24, frames_max=WINDOW, window_jobs=WINDOW)
            fetched = working.read_fetch(door.run(call))
            left = {LANE: fetched.left[0]} if fetched.left else {}
            redis_ns, begun_ns = clock.process_cpu_ns(stage.server.pid), time.process_time_ns()
            plan = ordering.arrange(fetched.frames, left, held_ns=0.0, idle=True, free_slots=1)
            scored_ns = time.process_time_ns()
            batch = settling.SettleBatch()
            for name, frames in plan.returned:
                batch.add(settling.returned(name, frames))
            for made in batch.calls(KEYS, incarnation, result_ttl_s=60, dlq_max=100):
                door.run(made.call)
            back = max(1, len(plan.returned))
            if back < WINDOW / 2:
                raise RunFailed(f"only {back} jobs of a window went back")
            arranged.append((scored_ns - begun_ns) / back / 1e3)
            settled.append((time.process_time_ns() - scored_ns) / back / 1e3)
            in_redis.append((clock.process_cpu_ns(stage.server.pid) - redis_ns) / back / 1e3)
    both = [a + b for a, b in zip(arranged, settled, strict=True)]
    return {
        "arranged": figure("reading, scoring, cutting a window", arranged, "µs a job"),
        "written_back": figure("the same and giving it back, in the worker", both, "µs a job", 12.0),
        "written_back_redis": figure("giving back, in Redis", in_redis, "µs a job"),
    }


def _fill(door: SyncDoor, jobs: int) -> None:
    seconds, micros = door.client.time()
    frames = [
        codec.pack(
            [(b"NAP", json.dumps(payload).encode(), b"", False)],
            frame_id=IDS.frame_id(),
            lane=LANE,
            tracked=True,
            enqueued_us=seconds * 1_000_000 + micros,
        )
        for payload in naps(jobs, 5)
    ]
    for at in range(0, jobs, 1_000):
        door.client.rpush(KEYS.queue(LANE), *frames[at : at + 1_000])
    door.client.hincrby(KEYS.depth, LANE, jobs)


# --- a running host


@dataclass
class Host:
    """`tqe run` with two workers on a Redis, and who gives it work."""

    bench: Bench
    client: Client
    door: SyncDoor
    submitted: int = 0

    def submit(self, jobs: int) -> None:
        self.client.submit_many([("NAP", payload) for payload in naps(jobs, self.submitted)])
        self.submitted += jobs

    def ended(self) -> int:
        return self.client.status().totals.get("completed", 0)

    def finish(self) -> None:
        self.until(lambda: self.ended() >= self.submitted, "everything that was submitted has completed")

    def until(self, reached: Any, what: str) -> None:
        end_s = time.monotonic() + RELOAD_S
        while not reached():
            if time.monotonic() > end_s:
                raise SystemExit(f"not reached: {what}\n{self.log()[-2000:]}")
            time.sleep(0.02)

    def log(self) -> str:
        return (self.bench.folder / "run.log").read_text()

    def pids(self) -> set[int]:
        return {worker.pid for worker in self.client.workers()}

    def now_us(self) -> int:
        seconds, micros = self.door.client.time()
        return int(seconds) * 1_000_000 + int(micros)

    def busy(self) -> None:
        """Never less than some hundred jobs wait."""
        if self.submitted - self.ended() < 300:
            self.submit(500)

    def private_mb(self) -> float:
        """Of the larger worker, after some work."""
        self.submit(WARM)
        self.finish()
        return max(meters.private_bytes(pid) for pid in self.pids()) / 1e6


def living(lab: Lab, folder: Path, version: Version, reloads: int) -> dict[str, Any]:
    """Memory without and with a model, and new versions while jobs run."""
    with lab.stage() as stage:
        bench = Bench(folder)
        (folder / "work.py").write_text(APP)
        bench.env |= {"TQE_REDIS_URL": stage.server.url}
        client, door = Client(Settings(redis_url=stage.server.url)), SyncDoor(connect(stage.server.url))
        host = Host(bench, client, door)
        run = ("run", "work:app", "--procs", "2", "--no-pin")
        with bench.program("workers", *run):
            host.until(lambda: len(host.pids()) == 2, "two workers")
            without_mb = host.private_mb()
            times, lost, pids = reloaded(host, version, reloads)
            same = host.pids() == pids
            after_mb = host.private_mb()
        with bench.program("workers", *run):
            host.until(lambda: len(host.pids()) == 2, "two workers")
            started_mb = host.private_mb()
        client.close()
    share_mb = started_mb - without_mb
    return {
        "reload": figure(f"{reloads} new versions under load: published to the last run by the one before, "
                         "the slowest", times, "s", 2.0, worst=True),
        "reload_median": figure("the same, the median", times, "s"),
        "reload_lost": figure("jobs lost, and workers that died, meanwhile", [lost + (not same)], "", 0.0),
        "memory": figure("more private memory of a worker that starts with a model", [share_mb], "MB", 10.0),
        "memory_reloaded": figure("the same after those versions", [after_mb - without_mb], "MB"),
    }  # fmt: skip


def reloaded(host: Host, version: Version, reloads: int) -> tuple[list[float], int, set[int]]:
    """(seconds from publication to the last start of a run by the version before, jobs lost, workers)."""
    published: list[tuple[str, int]] = []
    pids = host.pids()
    for number in range(reloads + 1):
        new = version.another(number)
        host.busy()
        published.append((new.manifest.version, host.now_us()))
        new.publish(host.door)

        def used(name: str = new.manifest.version) -> bool:
            host.busy()
            runs = host.door.client.xrevrange(KEYS.traces, count=1)
            return bool(runs) and json.loads(runs[0][1][b"j"]).get("version") == name

        host.until(used, f"a run by {new.manifest.version}, the {number}th version")
    host.finish()
    last_us: dict[str, int] = {}
    for line in learning.traces(host.door, KEYS):
        run = json.loads(line)
        last_us[run.get("version", "")] = max(last_us.get(run.get("version", ""), 0), run["start_us"])
    times = [
        max(0.0, (last_us.get(before, 0) - at_us) / 1e6) for (before, _), (_, at_us) in pairwise(published)
    ]
    return times, host.submitted - host.ended(), pids


def started(models: Path, version: str) -> dict[str, Any]:
    """What `tqe run` takes longer to start with a model: imports, the library, the version."""
    found = []
    for _ in range(2 * ROUNDS):
        said = subprocess.run(
            [sys.executable, "-c", "import tqe.cli.main\n" + START, str(models), version],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        found.append(1000 * float(said.stdout.split()[-1]))
    return {"start": figure("more time to start with a model", found, "ms", 50.0)}


# --- the result


def figure(
    what: str, values: Sequence[float], unit: str, mark: float | None = None, *, worst: bool = False
) -> dict[str, Any]:
    """The median of the values, or the worst of them, beside its mark."""
    value = max(values) if worst else median(values)
    return {
        "what": what,
        "value": round(value, 4),
        "unit": unit,
        "mark": mark,
        "met": None if mark is None else value <= mark,
        "values": [round(one, 4) for one in values],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--scale", type=float, default=1.0, help="less jobs and versions: a look, no result")
    options = parser.parse_args()
    begun_s = time.monotonic()
    results = heading("bench.ordering.engine") | {"scale": options.scale}
    quiet = results["load_before"] <= LOAD_MAX * results["machine"]["cores"] and options.scale >= 1
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tqe-engine-") as made:
        folder = Path(made)
        path, manifest = trained(folder / "models")
        version = version_of(path, manifest)
        lab = _lab(folder / "lab")
        parts = (
            ("start-up", lambda: started(path.parent, manifest.version)),
            ("giving back", lambda: written_back(lab, path.parent, version)),
            ("no-op jobs", lambda: no_ops(lab, path.parent, version, options.scale)),
            ("new versions", lambda: living(lab, _made(folder / "host"), version, _reloads(options.scale))),
        )
        for name, part in parts:
            print(name, file=sys.stderr)
            figures |= part()
    foreign = max(lab.foreign, default=0.0)
    results |= {
        "quiet": quiet and foreign <= FOREIGN_MAX,
        "foreign": foreign,
        "seconds": round(time.monotonic() - begun_s, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": figures,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(tables.engine(results))


def _lab(folder: Path) -> Lab:
    ledger = Ledger()
    app = tasks.make_app(ledger)
    return Lab(_made(folder), app=app, ledger=ledger, scale=1.0, pulse=lambda part: None)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _reloads(scale: float) -> int:
    return max(3, int(RELOADS * scale))


if __name__ == "__main__":
    main()
