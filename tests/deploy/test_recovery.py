"""What docs/OPERATING.md tells operators of Redis, done: a failover, and a backup that is restored."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli, Program
from tests.support.ports import reserved_port
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

APP = """
import os, time
from tqe import App

app = App(lease_ms=2_000)

@app.task("NOTE")
def note(k: int) -> None:
    time.sleep(0.01)
    fd = os.open("journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{k}\\n".encode())
    os.close(fd)
"""

MakeRedis = Callable[..., RedisServer]


class Site:
    """An app, and an address that leads to whichever server is the primary."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "primary.sock"
        (folder / "work.py").write_text(APP)
        self.cli = Cli({"TQE_REDIS_URL": f"unix://{self.socket}"})
        self.programs: list[Program] = []

    def lead_to(self, server: RedisServer) -> None:
        self.socket.unlink(missing_ok=True)
        self.socket.symlink_to(server.socket)

    def run(self, *more: str) -> Program:
        args = ("run", "work:app", "--procs", "1", "--no-pin", *more)
        self.programs.append(Program(self.folder, self.cli.env, args))
        return self.programs[-1]

    def submit(self, start: int, stop: int) -> int:
        """How many of them were new."""
        lines = "".join(
            f'{{"type": "NOTE", "payload": {{"k": {k}}}, "idempotency_key": "note-{k}"}}\n'
            for k in range(start, stop)
        )
        told = self.cli("submit", "--file", "-", "--json", stdin=lines)
        assert told.exit_code == 0, told.output
        return int(json.loads(told.stdout)["created"])

    def noted(self) -> list[int]:
        journal = self.folder / "journal"
        return [int(one) for one in journal.read_text().split()] if journal.exists() else []

    def completed(self) -> int:
        return int(self.cli.json("status")["totals"]["completed"])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    made = Site(tmp_path)
    yield made
    for program in made.programs:
        program.close()


def test_after_a_failover_workers_go_on_at_the_new_primary(site: Site, make_redis: MakeRedis) -> None:
    port = reserved_port()
    old = make_redis(port=str(port), bind="127.0.0.1")
    new = make_redis(replicaof=f"127.0.0.1 {port}", repl_diskless_sync_delay="0")
    site.lead_to(old)
    wait_until(lambda: new.client().info("replication")["master_link_status"] == "up", 30, "the replica")
    program = site.run()
    site.submit(0, 300)
    assert old.client().wait(1, 10_000) == 1  # what is not replicated is lost, and nobody can tell
    wait_until(lambda: len(site.noted()) >= 50, 30, "some of the jobs")
    old.kill()
    new.client().replicaof("no", "one")
    site.lead_to(new)
    wait_until(lambda: set(site.noted()) == set(range(300)), 60, "each job")
    wait_until(lambda: site.completed() == 300, 30, "the total of each job once")
    wait_until(lambda: site.cli.json("status")["running"] == 0, 30, "nothing runs any more")
    assert program.process.poll() is None, "nobody had to be restarted"


def test_a_backup_is_restored_as_the_page_says(site: Site, make_redis: MakeRedis) -> None:
    server = make_redis()
    site.lead_to(server)
    site.submit(0, 20)
    server.client().save()
    backup = shutil.copy(server.folder / "dump.rdb", site.folder / "backup.rdb")
    assert site.run("--burst").ended(60) == 0
    site.submit(20, 25)
    assert sorted(site.noted()) == list(range(20))

    server.stop()
    for left in server.folder.glob("appendonly*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.copy(backup, server.folder / "dump.rdb")
    server._config["appendonly"] = "no"
    server.start()
    server.client().config_set("appendonly", "yes")
    assert site.cli("pause", "normal").exit_code == 0
    assert site.cli.json("status")["lanes"]["normal"]["queued"] == 20, "as it was, with what has run since"
    assert site.submit(0, 25) == 5, "the keys of the backup count"
    assert site.cli("resume", "normal").exit_code == 0
    assert site.run("--burst").ended(60) == 0
    assert sorted(site.noted()) == sorted([*range(20), *range(25)])
    wait_until(lambda: not server.client().info("persistence")["aof_rewrite_in_progress"], 30)
    server._config["appendonly"] = "yes"
    server.restart()
    assert site.completed() == 25
