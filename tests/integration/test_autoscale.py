"""`tqe run --autoscale` with real processes: a backlog brings workers, an empty queue lets them go, and none
of the jobs is lost on the way, whoever is killed meanwhile."""

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import scraping
from tests.support.cli import Cli, Program
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

APP = """
import os, time
from tqe import App

app = App()

@app.task("REST")
def rest(k: int) -> None:
    time.sleep(0.1)
    fd = os.open("journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{k}\\n".encode())
    os.close(fd)
"""
JOBS = 80


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(APP)
    return Cli({"TQE_REDIS_URL": redis_server.url})


@pytest.fixture
def program(cli: Cli, tmp_path: Path) -> Iterator[Program]:
    options = ("--autoscale", "1,3", "--drain-target", "1s", "--no-pin", "--metrics-port", "0")
    made = Program(tmp_path, cli.env, ("run", "work:app", *options))
    made.says("metrics are served")
    yield made
    made.close()


def submit(cli: Cli) -> None:
    lines = "".join(f'{{"type": "REST", "payload": {{"k": {k}}}}}\n' for k in range(JOBS))
    assert cli("submit", "--file", "-", stdin=lines).exit_code == 0


def pids(cli: Cli) -> set[int]:
    return {one["pid"] for one in cli.json("status")["workers"]}


def steward(cli: Cli, program: Program) -> int:
    """The child that is no worker, 0 while that is not clear."""
    children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text()
    others = {int(one) for one in children.split()} - pids(cli)
    return others.pop() if len(others) == 1 else 0


def completed(cli: Cli) -> bool:
    return bool(cli.json("status")["totals"]["completed"] == JOBS)


def journal(folder: Path) -> Counter[int]:
    return Counter(int(line) for line in (folder / "journal").read_text().split())


def test_a_backlog_brings_workers_and_an_empty_queue_lets_them_go(
    cli: Cli, program: Program, tmp_path: Path
) -> None:
    (url,) = re.findall(r"http://127\.0\.0\.1:\d+/metrics", program.text())
    wait_until(lambda: len(pids(cli)) == 1, 30, "the fewest workers")
    submit(cli)
    wait_until(lambda: len(pids(cli)) == 3, 30, "the most workers")
    (told,) = cli.json("status")["autoscale"].values()
    assert (told["min"], told["max"]) == (1, 3)
    assert "of 1 to 3 workers wanted" in cli("status").output
    page = scraping.scrape(url)
    assert scraping.value(page, "taskqueue_autoscale_workers_added_total") == 2
    reasons = {
        one: scraping.value(page, "taskqueue_autoscale_reason", reason=one) for one in ("most", "least")
    }
    assert reasons["least"] == 0
    wait_until(lambda: completed(cli), 60, "all jobs")
    wait_until(lambda: len(pids(cli)) == 1, 60, "the fewest workers again")
    wait_until(lambda: scraping.value(scraping.scrape(url), "taskqueue_workers_wanted") == 1)
    assert scraping.value(scraping.scrape(url), "taskqueue_worker_crashes_total") == 0
    assert journal(tmp_path) == Counter(range(JOBS)), "each job ran once"
    text = program.text()
    assert "1 to 3 processes, as many as finish what waits in 1 s; not pinned" in text
    assert "autoscale: 1 -> 3 workers, as" in text and "autoscale: 2 -> 1 workers, as" in text
    assert "is let go: 1 are enough" in text
    program.signal(signal.SIGTERM)
    assert program.ended() == 0


def test_kills_during_a_change_lose_nothing(cli: Cli, program: Program, tmp_path: Path) -> None:
    """A worker while more start, the steward that decides while they are let go."""
    wait_until(lambda: len(pids(cli)) == 1, 30, "the fewest workers")
    (first,) = pids(cli)
    submit(cli)
    program.says("autoscale: 1 -> 3")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(pids(cli) - {first}) == 3, 30, "the most workers, one of them in its place")
    wait_until(lambda: completed(cli), 60, "all jobs")
    program.says("autoscale: 3 -> 2", 60)
    os.kill(wait_until(lambda: steward(cli, program), 30, "the one child that is no worker"), signal.SIGKILL)
    program.says("the steward ended")
    wait_until(lambda: len(pids(cli)) == 1, 60, "the fewest workers again")
    assert set(journal(tmp_path)) == set(range(JOBS))
    assert sum(journal(tmp_path).values()) <= JOBS + 1, "only what the killed worker ran was run again"
