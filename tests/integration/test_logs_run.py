"""What a running engine logs: each line of a job names it, in every kind of task, and tells no secret."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.support.cli import PROGRAM, environment
from tests.support.redis_server import RedisServer
from tqe import App

APP = """
import asyncio, contextvars, logging, threading
from tqe import App

log = logging.getLogger("shop")
app = App()

@app.on_worker_start
def start():
    log.info("hook")

@app.task("PLAIN")
def plain(n: int) -> None:
    log.info("plain %d", n, extra={"password": "s3cret", "url": "https://ann:s3cret@host/"})
    thread = threading.Thread(target=contextvars.copy_context().run, args=(log.info, "thread %d", n))
    thread.start()
    thread.join()

@app.task("ASYNC")
async def coroutine(n: int) -> None:
    await asyncio.sleep(0.01 * (n % 3))
    await asyncio.gather(asyncio.to_thread(log.info, "async %d", n), step(n))

async def step(n: int) -> None:
    log.info("step %d", n)

@app.task("FAILS", max_retries=1)
def fails(n: int) -> None:
    log.info("fails %d", n)
    raise ValueError("odd")

@app.task("SILENT")
def silent() -> None:
    log.debug("not shown")
"""


def run(folder: Path, url: str, **env: str) -> list[dict[str, Any]]:
    (folder / "work.py").write_text(APP)
    done = subprocess.run(
        [*PROGRAM, "run", "work:app", "--burst", "--procs", "1", "--no-pin", "--concurrency", "8"],
        cwd=folder,
        env=environment({"TQE_REDIS_URL": url, "TQE_LOG_FORMAT": "json", "TQE_BACKOFF_BASE_MS": "0", **env}),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_each_line_of_a_job_names_it(redis_server: RedisServer, tmp_path: Path) -> None:
    app = App(redis_url=redis_server.url)
    expected: dict[str, tuple[str, str]] = {}
    words = {"ASYNC": ("async", "step"), "PLAIN": ("plain", "thread"), "FAILS": ("fails",)}
    for n in range(4):
        # Async jobs first: then the worker runs what is synchronous on its helper thread, too.
        for kind in words:
            name = app.submit(kind, {"n": n}).id
            expected |= {f"{word} {n}": (name, kind) for word in words[kind]}
    app.submit("SILENT")
    app.close()
    lines = run(tmp_path, redis_server.url)
    told = [line for line in lines if line["event"] in expected]
    assert {line["event"] for line in told} == expected.keys()
    for line in told:
        assert (line.get("job_id"), line.get("type")) == expected[line["event"]], line
        assert (line["lane"], line["worker"]) == ("normal", 0)
    assert sorted(line["attempt"] for line in told if line["event"] == "fails 0") == [1, 2]
    (dead,) = [line for line in lines if line["event"].endswith("(FAILS) is dead: ValueError")][:1]
    assert dead["type"] == "FAILS" and dead["job_id"] in dead["event"]
    (hook,) = [line for line in lines if line["event"] == "hook"]
    assert "job_id" not in hook and hook["logger"] == "shop"
    assert "s3cret" not in json.dumps(lines) and "not shown" not in json.dumps(lines)
