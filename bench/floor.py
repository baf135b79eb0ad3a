"""What no queue on one Redis can be below, beside what TQE takes, in the same run.

    python -m bench.floor [--jobs N] [--rounds N]

Redis, frames of one: bare scripts that do for each job what the promises need (LPOP and HSET of a lease,
HDEL and the snapshot at its end) and check nothing, beside `fetch` and `settle` on the same frames.

Idle latency: bare sockets, one script call that enqueues, the wake of a BLPOP in another process, one script
call that takes the job; beside the scenario `latency` of `tqe bench`. Rounds alternate, so each pair met the
same machine.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import hiredis

from bench.micro.parts import INCARNATION, LANE, Bench, outgoing, settler
from tqe import clock, codec
from tqe.bench import meters, suite, tasks
from tqe.bench.lab import Lab, Stage
from tqe.bench.ledger import Ledger
from tqe.store import producing, working
from tqe.store.call import SyncDoor, connect
from tqe.store.keys import Keys

CALL = 500  # frames a call, as a busy worker asks for them
GAP_S = 0.005
FRAME_BYTES = 200
KEYS = Keys()

TAKE = """
local frames, held = redis.call('LPOP', KEYS[1], ARGV[1]) or {}, {}
for i = 1, #frames do
  held[2 * i - 1], held[2 * i] = string.sub(frames[i], 5, 45), frames[i]
end
if #held > 0 then
  redis.call('HSET', KEYS[2], unpack(held))
end
return frames
"""
END = """
local names, fields = {}, {}
for i = 1, #ARGV do
  names[i] = ARGV[i]
  fields[2 * i - 1], fields[2 * i] = string.sub(ARGV[i], 1, 26), 'C'
end
redis.call('HDEL', KEYS[1], unpack(names))
redis.call('HSET', KEYS[2], unpack(fields))
redis.call('EXPIRE', KEYS[2], 3600)
"""
PUT = "redis.call('RPUSH', KEYS[1], ARGV[1]) redis.call('RPUSH', KEYS[2], 'w') return 1"


# ------------------------------------------------------------------ Redis, frames of one


class Scripts:
    """Time of scripts by Redis' own count, and CPU of the server, both a job."""

    def __init__(self, stage: Stage, client: Any) -> None:
        self._stage, self._client = stage, client
        self.usec, self.cpu_ns, self.jobs = 0, 0, 0

    def of(self, jobs: int, do: Callable[[], Any]) -> Any:
        before, cpu = self._usec(), meters.cpu_ns([self._stage.server.pid])
        found = do()
        self.cpu_ns += meters.cpu_ns([self._stage.server.pid]) - cpu
        self.usec += self._usec() - before
        self.jobs += jobs
        return found

    def _usec(self) -> int:
        told = self._client.info("commandstats")
        return sum(int(told.get(f"cmdstat_{name}", {}).get("usec", 0)) for name in ("evalsha", "eval"))

    def told(self) -> tuple[float, float]:
        return self.usec / self.jobs, self.cpu_ns / self.jobs / 1e3


def bare(stage: Stage, jobs: int) -> tuple[float, float]:
    client = connect(stage.server.url)
    take, end = client.register_script(TAKE), client.register_script(END)
    watched, queue, held, field = Scripts(stage, client), KEYS.queue(LANE), b"held", KEYS.bucket(0, "0")
    for at in range(0, jobs, CALL):
        client.rpush(queue, *(one.data for one in outgoing(CALL, 1, first=at)))
        frames = watched.of(CALL, lambda: take(keys=[queue, held], args=[CALL]))
        names = [frame[4:45] for frame in frames]
        watched.of(0, lambda names=names: end(keys=[held, field], args=names))  # type: ignore[misc]
    client.close()
    return watched.told()


def ours(stage: Stage, jobs: int) -> tuple[float, float]:
    client = connect(stage.server.url)
    door, bench, calls = SyncDoor(client), Bench(), settler()
    watched = Scripts(stage, client)
    fetcher = working.Fetcher(KEYS, INCARNATION, [working.LaneRule(LANE)], 600_000)
    fetch = fetcher.call(jobs_max=CALL, bytes_max=1 << 20, frames_max=CALL)
    door.run(working.takeover(KEYS, "", INCARNATION, 600_000))
    for at in range(0, jobs, CALL):
        door.run(producing.enqueue_call(KEYS, outgoing(CALL, 1, first=at))[0])
        reply = watched.of(CALL, lambda: door.run(fetch))
        leases = bench.run(working.read_fetch(reply).frames)
        made = calls(leases)
        watched.of(0, lambda made=made: [door.run(one.call) for one in made])  # type: ignore[misc]
        bench.slot.close_rows(leases)
    client.close()
    return watched.told()


# ------------------------------------------------------------------ idle latency


class Wire:
    """A bare socket that sends and waits for one reply."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._reader = hiredis.Reader(notEnoughData=self)

    def ask(self, packed: bytes) -> Any:
        self._socket.sendall(packed)
        while (reply := self._reader.gets()) is self:
            self._reader.feed(self._socket.recv(65_536))
        return reply

    def script(self, text: str) -> bytes:
        sha: bytes = self.ask(codec.pack_command(("SCRIPT", "LOAD", text)))
        return sha


def waiting(path: str, jobs: int) -> Mapping[str, Any]:
    """The worker's side: when each job is in its hands."""
    wire = Wire(path)
    take = codec.pack_command(("EVALSHA", wire.script(TAKE), 2, "queue", "held", 1))
    wait = codec.pack_command(("BLPOP", "wake", 0))
    found = []
    while len(found) < jobs:
        wire.ask(wait)
        for frame in wire.ask(take):
            found.append(clock.monotonic_ns() - int(frame[:20]))
    return {"ns": found}


def sending(path: str, jobs: int) -> Mapping[str, Any]:
    wire = Wire(path)
    sha = wire.script(PUT)
    for _ in range(jobs):
        time.sleep(random.uniform(0.5, 1.5) * GAP_S)
        frame = (b"%020d" % clock.monotonic_ns()).ljust(FRAME_BYTES, b"x")
        wire.ask(codec.pack_command(("EVALSHA", sha, 2, "queue", "wake", frame)))
    return {}


def bare_latency(stage: Stage, jobs: int) -> tuple[float, float]:
    """p50 and p99 in ms."""
    path = stage.server.url.removeprefix("unix://").partition("?")[0]
    waiter = stage.begin(lambda app: waiting(path, jobs))
    stage.produce(lambda app: sending(path, jobs))
    found = waiter.answer()["ns"]
    return meters.percentile(found, 0.5) / 1e6, meters.percentile(found, 0.99) / 1e6


# ------------------------------------------------------------------ the table


def line(name: str, unit: str, floors: list[float], found: list[float]) -> str:
    ratios = [a / b for a, b in zip(found, floors, strict=True)]
    cells = [f"{median(floors):.3g}", f"{median(found):.3g}"]
    cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {name} | {unit} | " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=50_000, help="frames of one")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    jobs = max(1, options.jobs // CALL) * CALL
    rows: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory(prefix="tqe-floor-", ignore_cleanup_errors=True) as folder:
        ledger = Ledger()
        app = tasks.make_app(ledger)
        lab = Lab(Path(folder), app=app, ledger=ledger, scale=0.5, pulse=lambda part: None)
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
            row: list[float] = []
            for measure, count in ((bare, jobs), (ours, jobs), (bare_latency, 500)):
                with lab.stage() as stage:
                    row += measure(stage, count)
            latency = suite.SCENARIOS["latency"].play(lab)
            rows.append((*row, latency["p50"], latency["p99"]))
    columns = [list(column) for column in zip(*rows, strict=True)]
    print(f"Redis {lab.redis_version}; medians of {options.rounds} alternating rounds (range of the ratios)")
    print("| | unit | floor | tqe | tqe / floor |\n|---|---|--:|--:|--:|")
    for name, unit, floor, tqe in (
        ("frames of one, time in scripts", "µs/job", 0, 2),
        ("frames of one, CPU of Redis", "µs/job", 1, 3),
        ("submit to start, idle, p50", "ms", 4, 6),
        ("submit to start, idle, p99", "ms", 5, 7),
    ):
        print(line(name, unit, columns[floor], columns[tqe]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
