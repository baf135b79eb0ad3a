"""What sends requests: `wrk` where it is installed, else a loop of our own; and one that keeps to a rate."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
JOB = json.dumps({"type": "EMAIL", "payload": {"to": "user1234567@mail.example.com", "n": 1234567}}).encode()
CONNECTIONS = 64


class Connection:
    """One kept-alive connection; a request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """Status and body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
        reader, writer = self._streams
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        return int(head[9:12]), await reader.readexactly(length)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    """A request as bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def percentile(values: list[float], part: float) -> float:
    """Of measured values, in their unit."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


# ------------------------------------------------------------------ as fast as it goes


def flood(port: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Single submissions by CONNECTIONS clients, each sending the next as soon as it has its answer."""
    wrk = shutil.which("wrk")
    if wrk is None:
        return asyncio.run(_flood(port, seconds))
    script = folder / "post.lua"
    script.write_text(
        f"wrk.method = 'POST'\nwrk.body = '{JOB.decode()}'\n"
        "wrk.headers['Content-Type'] = 'application/json'\n"
    )
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "--latency", "-s", str(script)]
    said = subprocess.run(
        [*command, f"http://{HOST}:{port}/api/v1/jobs"], capture_output=True, text=True, check=True
    ).stdout
    rate = re.search(r"Requests/sec: +([\d.]+)", said)
    assert rate is not None, said
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    return {"requests_per_s": float(rate[1]), "failed": int(failed[1]) if failed else 0}


async def _flood(port: int, seconds: float) -> dict[str, Any]:
    end, data = time.monotonic() + seconds, post("/api/v1/jobs", JOB)
    done, failed = 0, 0

    async def client() -> None:
        nonlocal done, failed
        connection = Connection(port)
        while time.monotonic() < end:
            status, _ = await connection.ask(data)
            done += 1
            failed += status >= 300
        connection.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return {"requests_per_s": done / seconds, "failed": failed}


async def batches(port: int, seconds: float) -> dict[str, Any]:
    """Batches of 10,000 lines by two clients."""
    data = post("/api/v1/jobs:batch", (JOB + b"\n") * 10_000, "application/x-ndjson")
    began = time.monotonic()
    jobs = 0

    async def client() -> None:
        nonlocal jobs
        connection = Connection(port)
        while time.monotonic() < began + seconds:
            _, body = await connection.ask(data)
            jobs += body.count(b'"created":true')
        connection.close()

    await asyncio.gather(client(), client())
    return {"jobs_per_s": jobs / (time.monotonic() - began)}


# ------------------------------------------------------------------ at a rate


@dataclass
class Timed:
    """What came of requests that were sent at a rate; times in ms from when each was due."""

    times_ms: list[float] = field(default_factory=list)
    failed: int = 0
    took_s: float = 0.0

    def note(self, due: float, good: bool) -> None:
        self.times_ms.append((time.monotonic() - due) * 1000)
        self.failed += not good

    def figures(self) -> dict[str, float]:
        return {f"p{part * 100:.0f}_ms": percentile(self.times_ms, part) for part in (0.5, 0.95, 0.99)}


Turn = Callable[[Connection, float, int], Awaitable[None]]


async def at_rate(port: int, rate_per_s: float, seconds: float, turn: Turn, *, connections: int) -> float:
    """`at_times`, evenly."""
    dues_s = [number / rate_per_s for number in range(int(rate_per_s * seconds))]
    return await at_times(port, dues_s, turn, connections=connections)


async def at_times(port: int, dues_s: Sequence[float], turn: Turn, *, connections: int) -> float:
    """`turn` for each request when it is due, on the next free connection, with its number; how long it took
    in all. A server that stalls does not stall the clock: what is due meanwhile counts from then."""
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(Connection(port))
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic()

    async def one(due: float, number: int) -> None:
        connection = await free.get()
        try:
            await turn(connection, due, number)
        finally:
            free.put_nowait(connection)

    for number, due_s in enumerate(dues_s):
        due = began + due_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(one(due, number))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    took_s = time.monotonic() - began
    while not free.empty():
        free.get_nowait().close()
    return took_s


async def singles(port: int, rate_per_s: float, seconds: float) -> Timed:
    """Single submissions at a rate."""
    timed, data = Timed(), post("/api/v1/jobs", JOB)

    async def turn(connection: Connection, due: float, number: int) -> None:
        status, _ = await connection.ask(data)
        timed.note(due, status == 202)

    timed.took_s = await at_rate(port, rate_per_s, seconds, turn, connections=CONNECTIONS)
    return timed


async def journeys(port: int, rate_per_s: float, seconds: float) -> tuple[Timed, Timed]:
    """Submissions at a rate, each followed by a long poll until its job has ended: both times, from when the
    submission was due. A job that has not completed is a failure of the second."""
    submitted, completed = Timed(), Timed()
    data = post("/api/v1/jobs", JOB)

    async def turn(connection: Connection, due: float, number: int) -> None:
        status, body = await connection.ask(data)
        submitted.note(due, status == 202)
        if status != 202:
            completed.failed += 1
            return
        question = get(f"/api/v1/jobs/{json.loads(body)['id']}?wait=30")
        told: dict[str, Any] = {}
        for _ in range(10):
            status, body = await connection.ask(question)
            told = json.loads(body)
            if told.get("finishedAt"):
                break
        completed.note(due, told.get("status") == "completed")

    completed.took_s = await at_rate(port, rate_per_s, seconds, turn, connections=40)
    return submitted, completed
