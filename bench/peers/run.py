"""The same work through each queue, side by side: `python -m bench.peers.run [PEER …]`.

Each run of a peer has its own redis-server on a free loopback port and ends with all that it started. Rounds
alternate over the peers. bench/README.md says what the phases measure and how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from bench.peers import common, peers
from bench.peers.peers import Peer
from tqe.bench import machine, meters
from tqe.store import binaries

SCHEMA = 2  # 1 had no `foreign` in its rows, but the load average after each
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PATIENCE_S = 180.0
POLL_S = 0.002
REST_S = 1.0


# ------------------------------------------------------------------ processes


def family(roots: list[int]) -> list[int]:
    """These processes and all that descend from them."""
    found, todo = [], list(roots)
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += meters.children(pid)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                if int(task) != pid:
                    text = Path(f"/proc/{pid}/task/{task}/children").read_text()
                    todo += [int(child) for child in text.split()]
    return list(dict.fromkeys(found))


def cpu_s(pids: list[int]) -> float:
    """User and system time, with that of children that were reaped (RQ forks for each job)."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(value) for value in fields[11:15])
    return ticks * TICK_S


class Server:
    """A redis-server on a free port of loopback; AOF as TQE's own, or no persistence for all."""

    def __init__(self, folder: Path, *, aof: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        binary = binaries.choose(data=folder, written=None, places=binaries.candidates())
        self.version = str(binary.version)
        command = [str(binary.path), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "yes" if aof else "no", "--appendfsync", "everysec"]
        command += ["--auto-aof-rewrite-min-size", "1gb", "--maxmemory-policy", "noeviction"]
        command += ["--dir", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis(port=self.port, decode_responses=True)
        for _ in range(500):
            with contextlib.suppress(redis.ConnectionError):
                self.client.ping()
                return
            time.sleep(0.02)
        raise RuntimeError("redis-server does not answer")

    def stop(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


# ------------------------------------------------------------------ one run


class Run:
    """One peer with so many worker processes, on its own server."""

    def __init__(self, peer: Peer, procs: int, server: Server, folder: Path, root: Path) -> None:
        self.peer, self.procs, self.server, self.root = peer, procs, server, root
        self.log = (folder / "log").open("ab")
        self.workers: list[subprocess.Popen[bytes]] = []
        shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else folder
        descriptor, name = tempfile.mkstemp(prefix="tqe-peers-", dir=shared)
        os.ftruncate(descriptor, common.BYTES)
        self.ledger = Path(name)
        self.words = memoryview(mmap.mmap(descriptor, common.BYTES)).cast("Q")
        os.close(descriptor)
        self.env = {
            **os.environ,
            "BENCH_REDIS_URL": server.url,
            "REDIS_URL": server.url,
            "BENCH_LEDGER": name,
            "BENCH_HOME": str(peer.home(root)),
            "PYTHONPATH": str(peers.HERE),
            "PYTHONDONTWRITEBYTECODE": "1",
            **({"BENCH_THREADS": "1"} if peer.threads else {}),
            **peer.env,
        }

    # -------------------------------------------------------------- processes

    def start(self) -> None:
        count = self.procs if self.peer.instances == "each" else 1
        for number in range(count):
            line = self.peer.worker.replace("{url}", self.server.url).replace("{number}", str(number))
            line = line.replace("{bin}", str(self.peer.bin(self.root))).replace("{procs}", str(self.procs))
            self.workers.append(
                subprocess.Popen(
                    shlex.split(line),
                    cwd=peers.HERE,
                    env={**self.env, "BENCH_NUMBER": str(number)},
                    stdout=self.log,
                    stderr=self.log,
                    start_new_session=True,
                )
            )

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        command = [*self.peer.producer(self.root), *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=peers.HERE, env=self.env, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def produce(self, *arguments: object) -> dict[str, Any]:
        return self.told(self.begin(*arguments))

    def told(self, producer: subprocess.Popen[str]) -> dict[str, Any]:
        said, _ = producer.communicate(timeout=PATIENCE_S)
        if producer.returncode:
            raise RuntimeError(f"its producer ended with {producer.returncode}: {self.last_words()}")
        answer: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return answer

    def pids(self) -> list[int]:
        return family([worker.pid for worker in self.workers])

    def close(self) -> None:
        """End what we started: politely, then the rest of each session of ours."""
        everyone = self.pids()
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(5)
        sessions = {worker.pid for worker in self.workers}
        for pid in everyone:
            with contextlib.suppress(OSError):
                if os.getsid(pid) in sessions:
                    os.kill(pid, signal.SIGKILL)
        for worker in self.workers:
            worker.wait()
        self.ledger.unlink()
        self.log.close()

    def last_words(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text("utf-8", "replace").strip()[-400:]

    # -------------------------------------------------------------- watching

    def slots(self) -> range:
        return range(common.SLOT_WORDS, common.AT_LATENCIES, common.SLOT_WORDS)

    def count(self) -> int:
        return sum(self.words[at] for at in self.slots())

    def first_ns(self) -> int:
        """When the first job of all started; 0 before."""
        return min((self.words[at + 1] for at in self.slots() if self.words[at + 1]), default=0)

    def busy(self, total: int) -> bool:
        """Whether the queue itself says that something waits, runs, or is not acknowledged."""
        if self.peer.counted:
            return int(self.server.client.execute_command(*self.peer.counted) or 0) < total
        for command in self.peer.quiet:
            said = self.server.client.execute_command(*command)
            if isinstance(said, dict):
                said = said["pending"]
            if said:
                return True
        return False

    def wait_for(self, total: int) -> int:
        """Until all have run and the queue has noted it; the moment, in ns of CLOCK_MONOTONIC."""
        end = time.monotonic() + PATIENCE_S
        while self.count() < total or self.busy(total):
            if time.monotonic() > end:
                raise RuntimeError(
                    f"{self.count()} of {total} jobs after {PATIENCE_S:.0f} s: {self.last_words()}"
                )
            time.sleep(POLL_S)
        return time.monotonic_ns()

    def wait_for_first(self) -> None:
        end = time.monotonic() + 60
        while not self.first_ns():
            if time.monotonic() > end or any(worker.poll() is not None for worker in self.workers):
                raise RuntimeError(f"no job has started: {self.last_words()}")
            time.sleep(0.001)

    # -------------------------------------------------------------- phases

    def play(self, scale: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        jobs = max(100, int(self.peer.jobs * scale))
        found |= self.submit(max(100, int((self.peer.submit_jobs or self.peer.jobs) * scale)))
        self.server.client.flushall()
        found |= self.drain(jobs)
        found |= self.together(jobs)
        if self.procs == 1:
            found |= self.timed(max(50, int(self.peer.timed["jobs"] * min(1.0, scale * 2))))
        return found

    def prepare(self) -> None:
        for command in self.peer.prepare:
            self.server.client.execute_command(*command)

    def submit(self, jobs: int) -> dict[str, Any]:
        self.prepare()
        memory, cpu = self._memory(), cpu_s([self.server.process.pid])
        told = self.produce("submit", jobs)
        return {
            "submit_rate": jobs / (told["ended_ns"] - told["begun_ns"]) * 1e9,
            "submit_producer_us": told["cpu_ns"] / jobs / 1e3,
            "submit_redis_us": (cpu_s([self.server.process.pid]) - cpu) / jobs * 1e6,
            "bytes_per_job": (self._memory() - memory) / jobs,
        }

    def _memory(self) -> int:
        return int(self.server.client.info("memory")["used_memory"])

    def drain(self, jobs: int) -> dict[str, Any]:
        self.prepare()
        self.produce("submit", jobs)
        self.start()
        self.wait_for_first()
        before, done = self._clocks(), self.count()
        ended_ns = self.wait_for(jobs)
        after = self._clocks()
        left = max(1, jobs - done)
        pss = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                pss += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        return {
            "drain_rate": jobs / (ended_ns - self.first_ns()) * 1e9,
            "drain_worker_us": (after[0] - before[0]) / left * 1e6,
            "drain_redis_us": (after[1] - before[1]) / left * 1e6,
            "memory_mb": pss / 1024,
        }

    def _clocks(self) -> tuple[float, float]:
        return cpu_s(self.pids()), cpu_s([self.server.process.pid])

    def together(self, jobs: int) -> dict[str, Any]:
        time.sleep(REST_S)
        base, before = self.count(), self._clocks()
        producer = self.begin("submit", jobs)
        ended_ns = self._through(base + jobs, producer)
        after, told = self._clocks(), self.told(producer)
        return {
            "through_rate": jobs / (ended_ns - told["begun_ns"]) * 1e9,
            "through_worker_us": (after[0] - before[0]) / jobs * 1e6,
            "through_redis_us": (after[1] - before[1]) / jobs * 1e6,
        }

    def _through(self, total: int, producer: subprocess.Popen[str]) -> int:
        ended_ns = self.wait_for(total)
        producer.wait(PATIENCE_S)
        return ended_ns

    def timed(self, jobs: int) -> dict[str, Any]:
        time.sleep(REST_S)
        base, rate = self.count(), self.peer.timed["rate"]
        self.produce("timed", jobs, rate)
        self.wait_for(base + jobs)
        waited = sorted(self.words[common.AT_LATENCIES + at] for at in range(jobs))
        return {
            "latency_rate": rate,
            **{f"p{part}_ms": waited[min(jobs - 1, jobs * part // 100)] / 1e6 for part in (50, 95, 99)},
        }


# ------------------------------------------------------------------ the session


@contextlib.contextmanager
def on_a_server(aof: bool) -> Iterator[tuple[Server, Path]]:
    folder = Path(tempfile.mkdtemp(prefix="tqe-peers-"))
    server = Server(folder, aof=aof)
    try:
        yield server, folder
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Watch:
    """What others use of the machine meanwhile: its busy time less that of all that belongs to a run."""

    def __init__(self) -> None:
        self.cpus = os.sched_getaffinity(0)
        self.begun = self._read([])

    def _read(self, pids: list[int]) -> tuple[float, float, float]:
        """Now, busy time of the machine, and ours, in s; `pids` run and were not there at the start."""
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = time.process_time() + reaped.ru_utime + reaped.ru_stime + cpu_s(pids)
        return time.monotonic(), meters.machine_busy_ns(self.cpus) / 1e9, ours

    def foreign(self, pids: list[int]) -> float:
        """Part of the machine. Ask before the processes end: whose parent does not wait for them are lost."""
        took, busy, ours = (
            after - before for after, before in zip(self._read(pids), self.begun, strict=True)
        )
        return max(0.0, (busy - ours) / (took * len(self.cpus)))


def one(peer: Peer, procs: int, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    watch = Watch()
    with on_a_server(options.aof) as (server, folder):
        run = Run(peer, procs, server, folder, options.home)
        try:
            found: dict[str, Any] = run.play(options.scale)
        except Exception as e:  # a peer that breaks must not end the session of all others
            found = {"failed": f"{type(e).__name__}: {e}"}
        finally:
            foreign = watch.foreign([*run.pids(), server.process.pid])
            run.close()
        return {"foreign": foreign, **found}, server.version


def session(wanted: list[Peer], options: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    version = ""
    steps = [
        (turn, peer, procs) for turn in range(options.rounds) for peer in wanted for procs in options.procs
    ]
    for number, (turn, peer, procs) in enumerate(steps, 1):
        begun = time.monotonic()
        found, version = one(peer, procs, options)
        row = {"peer": peer.name, "procs": procs, "round": turn}
        rows.append(row | {name: _short(value) for name, value in found.items()})
        told = found.get("failed") or f"{found['drain_rate']:,.0f} jobs/s drained"
        took = time.monotonic() - begun
        print(
            f"[{number}/{len(steps)}] {peer.name}, {procs} processes: {told} ({took:.0f} s)", file=sys.stderr
        )
    fingerprint = machine.machine(Path(tempfile.gettempdir()))
    return {
        "schema": SCHEMA,
        "tool": "bench.peers",
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "scale": options.scale,
        "rounds": options.rounds,
        "quiet": load <= 0.5 * fingerprint["cores"],
        "load_before": round(load, 2),
        "persistence": "AOF everysec" if options.aof else "none",
        "machine": fingerprint,
        "versions": machine.versions(version),
        "peers": {
            peer.name: {
                "versions": peers.versions(peer, options.home),
                "guarantee": peer.guarantee,
                "results": peer.results,
                "bulk": peer.bulk,
                "config": peer.config,
            }
            for peer in wanted
        },
        "rows": rows,
    }


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", help="all of peers.toml when none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--procs", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="part of the usual number of jobs")
    parser.add_argument("--no-aof", dest="aof", action="store_false", help="no persistence, for all")
    parser.add_argument("--home", type=Path, default=peers.HOME, help="where the environments are")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--setup-only", action="store_true", help="make the environments and stop")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = peers.chosen(options.peers)
    peers.set_up(wanted, options.home)
    wanted = [peer for peer in wanted if peer.installed(options.home)]
    if options.setup_only:
        return 0
    result = session(wanted, options)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 1 if any("failed" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
