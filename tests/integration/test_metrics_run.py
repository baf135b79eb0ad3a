"""`/metrics` of a real `tqe run`: over kills of workers and of the steward, and where it listens."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import scraping
from tests.support.cli import Cli, Program
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.errors import SettingsError
from tqe.supervisor import lifecycle

APP = """
from tqe import App

app = App()

@app.task("ADD", max_retries=0)
def add(a: int) -> int:
    return 1 // a
"""


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(APP)
    return Cli({"TQE_REDIS_URL": redis_server.url})


@pytest.fixture
def program(cli: Cli, tmp_path: Path) -> Iterator[Program]:
    args = ("run", "work:app", "--procs", "2", "--no-pin", "--metrics-port", "0")
    made = Program(tmp_path, cli.env, args)
    yield made
    made.close()


def children(pid: int) -> set[int]:
    return {int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_counters_survive_kills_of_workers_and_of_the_steward(cli: Cli, program: Program) -> None:
    text = program.says("metrics are served")
    (url,) = re.findall(r"http://127\.0\.0\.1:\d+/metrics", text)
    seen: dict[object, float] = {}

    def look() -> str:
        page = scraping.scrape(url)
        for name, now in scraping.counters(page).items():
            if not str(name[0]).startswith("taskqueue_steward_"):  # of this steward's own life
                assert now >= seen.get(name, 0.0), name
                seen[name] = now
        return page

    def ran() -> float:
        return scraping.value(look(), "taskqueue_job_execution_duration_seconds_count", type="ADD")

    def pids() -> set[int]:
        return {one["pid"] for one in cli.json("status")["workers"]}

    def submit_and_wait(jobs: int, total: int) -> None:
        cli("submit", "--file", "-", stdin='{"type": "ADD", "payload": {"a": 1}}\n' * jobs)
        wait_until(lambda: ran() >= total, what=f"{total} jobs on the page")

    submit_and_wait(300, 300)
    wait_until(lambda: len(pids()) == 2, what="two workers")
    before = pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: scraping.value(look(), "taskqueue_worker_restarts_total") == 2)
    wait_until(lambda: len(pids()) == 2 and not pids() & before, what="two new workers")
    submit_and_wait(200, 500)
    wait_until(lambda: len(children(program.process.pid) - pids()) == 1)
    (steward,) = children(program.process.pid) - pids()
    os.kill(steward, signal.SIGKILL)
    wait_until(lambda: "the steward ended" in program.text())

    def served_again() -> bool:
        try:
            return ran() >= 500
        except OSError:
            return False

    wait_until(served_again, what="the next steward's page")
    page = look()
    assert scraping.value(page, "taskqueue_worker_crashes_total") == 2
    assert scraping.value(page, "taskqueue_steward_restarts_total") == 1
    cli("submit", "ADD", '{"a": 0}')
    wait_until(lambda: scraping.value(look(), "taskqueue_jobs_dead_total") == 1)
    assert scraping.value(look(), "taskqueue_dlq_jobs") == 1


def test_metrics_are_for_this_machine_unless_told_otherwise() -> None:
    port = lifecycle.check_port("127.0.0.1", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(SettingsError, match=f"metrics_port = {port}.*Address already in use"):
            lifecycle.check_port("127.0.0.1", port)
        lifecycle.check_port("127.0.0.2", port)  # another address of this machine is free
    with pytest.raises(SettingsError, match="metrics_host = nowhere"):
        lifecycle.check_port("nowhere.invalid", 9100)


COUNTING = """
import os, signal
from prometheus_client import Counter, Histogram
from tqe import App

sold = Counter("sold", "Things sold.", ["what"])
price = Histogram("price", "What they cost.", buckets=(1, 10))
app = App()

@app.task("SELL", max_retries=0)
def sell(what: str, cost: float) -> int:
    sold.labels(what).inc()
    price.observe(cost)
    return os.getpid()

@app.task("DIE", max_retries=0)
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_metrics_of_the_apps_own_survive_their_workers(cli: Cli, tmp_path: Path, preload: str) -> None:
    (tmp_path / "work.py").write_text(COUNTING)
    env = {**cli.env, "TQE_CRASHES_MAX": "1", "TMPDIR": str(tmp_path)}
    program = Program(
        tmp_path, env, ("run", "work:app", "--procs", "1", "--no-pin", "--metrics-port", "0", preload)
    )
    try:
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/metrics", program.says("metrics are served"))

        def sold() -> float:
            page = scraping.scrape(url)
            return scraping.value(page, "sold_total", what="pen") if "sold_total{" in page else 0.0

        for total in (1, 2, 3):
            cli("submit", "SELL", '{"what": "pen", "cost": 5}', "--wait=20")
            assert sold() == total
            assert cli("submit", "DIE", "--wait=20").exit_code == 1
            wait_until(lambda now=total: sold() == now, what="the worker's count is still there")
        (folder,) = tmp_path.glob("tqe-metrics-*")
        wait_until(lambda: list(folder.glob("counter_folded-*.db")), 20, "what dead workers left is folded")
        page = scraping.scrape(url)
        assert scraping.value(page, "sold_total", what="pen") == 3
        assert scraping.value(page, "price_count") == 3 and scraping.value(page, "price_sum") == 15
        assert scraping.value(page, "price_bucket", le="10.0") == 3
        program.signal(signal.SIGTERM)
        assert program.ended() == 0
        assert not folder.exists()
    finally:
        program.close()
