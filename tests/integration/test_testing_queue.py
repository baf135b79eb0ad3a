"""The pytest fixtures of `tqe.testing`: a real queue on a private Redis with workers forked from the test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from tqe import App, JobFailed, current_job
from tqe.errors import QueueStuck, RedisUnavailable, RegistrationError
from tqe.testing import Queue, private_redis

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "TESTING.md"

shop = App("shop", max_retries=2)
greeting = "Hello"


@shop.task("WHERE")
def where() -> int:
    return os.getpid()


@shop.task("GREET")
async def greet(name: str) -> str:
    return f"{greeting}, {name}!"


@shop.task("CHAIN")
def chain(left: int) -> int:
    if left:
        chain.submit(left - 1)
    return left


@shop.task("BROKEN")
def broken() -> None:
    raise ValueError(f"attempt {current_job().attempt}")


@shop.task("KILLS")
def kills(marker: str) -> str:
    if os.path.exists(marker):
        return "survived"
    Path(marker).touch()
    os._exit(9)


@pytest.fixture
def tqe_app() -> App:
    return shop


def test_drain_runs_all_there_is_in_another_process(
    tqe_queue: Queue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(f"{__name__}.greeting", "Salut")  # workers are forked later, and see it
    told, place, failed = greet.submit("Ann"), where.submit(), broken.submit()
    chain.submit(3)
    killed = kills.submit(str(tmp_path / "marker"))
    tqe_queue.drain()
    assert told.result() == "Salut, Ann!"
    assert place.result() != os.getpid()
    with pytest.raises(JobFailed, match="attempt 3"):
        failed.result()
    assert killed.result() == "survived"
    assert shop.client.status().totals["completed"] == 7


def test_each_test_has_an_empty_queue(tqe_queue: Queue) -> None:
    assert shop.client.status().totals.get("submitted", 0) == 0
    tqe_queue.drain()


def test_a_worker_beside_the_test(tqe_queue: Queue) -> None:
    with tqe_queue.worker():
        assert greet.submit("Ann").result(timeout=20) == "Hello, Ann!"
        with pytest.raises(RegistrationError, match="runs already"), tqe_queue.worker():
            pass
        first = where.submit().result(timeout=20)
        tqe_queue.drain()
    wait_until(lambda: not os.path.exists(f"/proc/{first}"), what="the worker is gone")
    with pytest.raises(RedisUnavailable), private_redis("/proc/nowhere"):
        pass


async def test_async_code_drains_too(tqe_queue: Queue) -> None:
    told = await greet.asubmit("Ann")
    await tqe_queue.adrain()
    assert await told.result() == "Hello, Ann!"
    await shop.aclose()


def test_what_does_not_end_is_told(tqe_queue: Queue) -> None:
    greet.with_options(delay=3600).submit("Ann")
    with pytest.raises(QueueStuck, match=r"within 0.3 s: 1 wait for their time"):
        tqe_queue.drain(timeout=0.3)


# --- in a project of somebody else's ---


def run_pytest(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
        cwd=folder, capture_output=True, text=True, timeout=50,
    )  # fmt: skip


def blocks(path: Path) -> dict[str, str]:
    """The code of a page by the name of the file that its first line gives."""
    found = re.findall(r"```\w+\n# (\S+)\n(.*?)```", path.read_text("utf-8"), re.S)
    return {name: text for name, text in found}


def test_the_examples_of_the_guide(tmp_path: Path) -> None:
    files = blocks(GUIDE)
    assert {"shop.py", "pytest.ini", "test_shop.py", "test_shop_queue.py"} <= files.keys()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[5-9] passed", done.stdout)


def test_without_an_app_it_says_what_to_do_and_asks_for_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            import sys

            def test_light(): assert "tqe.app" not in sys.modules
            def test_it(tqe_eager): ...
        """)
    )
    done = run_pytest(tmp_path)
    assert "1 passed, 1 error" in done.stdout
    assert "Set `tqe_app = module:attribute` in pytest's configuration" in done.stdout
