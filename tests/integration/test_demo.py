"""The demo end to end on real input, and that nothing of it stays behind but its data."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli, Program
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.cli import demo as module
from tqe.cli import demo_app
from tqe.cli.demo import agrees
from tqe.cli.percentiles import of_values, percentiles, quantile, task_times
from tqe.job import JobStatus

Start = Callable[..., Program]


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli({"TQE_REDIS_URL": redis_server.url, "TQE_DATA_DIR": str(tmp_path / "data")})


@pytest.fixture
def start(cli: Cli, tmp_path: Path) -> Iterator[Start]:
    begun: list[Program] = []

    def begin(*args: str) -> Program:
        begun.append(Program(tmp_path, {"TQE_PIN": "false"} | cli.env, ("demo", *args)))
        return begun[-1]

    yield begin
    for program in begun:
        program.close()


def run_of(demo: Program) -> int:
    """The pid of the demo's `tqe run`, once it is ready."""
    found = re.search(r"workers run as pid (\d+)", demo.says("workers run as pid"))
    assert found is not None
    return int(found[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ------------------------------------------------------------------ the whole


def test_real_files_are_worked_on_and_every_outcome_is_checked(
    cli: Cli, start: Start, tmp_path: Path
) -> None:
    figures, picture = tmp_path / "order.json", tmp_path / "order.svg"
    demo = start("--files", "120", "--procs", "2", "--order", str(figures), "--order", str(picture))
    assert demo.ended(100) == 0, demo.text()
    text = demo.text()
    files = 120 + len(demo_app.inputs()[1])
    assert f"{4 * files} jobs in " in text
    assert f"{4 * files} of {4 * files} outcomes computed again, directly: all agree" in text
    for task in ("COMPRESS", "HASH", "PARSE", "TOKENIZE"):
        assert re.search(rf"{task} +{files} +\S+ [µms]+ ", text), text
    # Some of them ran again in three orders, by what the first runs have taught.
    order = json.loads(figures.read_text())
    assert list(order["modes"]) == ["fifo", "bounded", "sjf"] and order["jobs"] == 400
    assert order["chosen"] in ("model", "hierarchical_mean", "type_mean", "fifo")
    assert "the gate chose" in text and re.search(r"bounded .+ [+-]\d+% +█+", text), text
    assert picture.read_text().startswith("<?xml")
    # What is no Python failed, was tried again, and died; and the data is still there.
    dead = cli.json("dlq", "list", "--namespace", "demo")
    assert dead and {one["reason"] for one in dead} == {"failed"}
    assert {one["attempts"] for one in dead} == {3}
    status = cli.json("status", "--namespace", "demo")
    assert status["totals"]["completed"] == 4 * files - len(dead) + 3 * order["jobs"]
    assert status["totals"]["retried"] == 2 * len(dead)
    assert not alive(run_of(demo)) and status["workers"] == []
    assert cli.json("status")["totals"]["submitted"] == 0  # the user's own queue was left alone


def test_few_files_teach_too_little(cli: Cli, start: Start) -> None:
    demo = start("--files", "3", "--procs", "2")
    assert demo.ended(50) == 0, demo.text()
    assert "too few files to learn durations from" in demo.text()
    # What leads on is of one namespace: a job that is submitted next must not wait where nobody serves it.
    last = [line.strip() for line in demo.text().split("Look at it:")[1].splitlines() if line[:2] == "  "]
    assert [line.split()[1] for line in last] == ["status", "dlq", "serve", "run", "-s"]
    assert all("--namespace demo" in line for line in last[:-1])
    assert '"type": "EMAIL"' in last[-1]


def test_ctrl_c_stops_what_was_started(cli: Cli, start: Start) -> None:
    demo = start("--procs", "2")
    run = run_of(demo)
    demo.says("jobs have ended")
    demo.signal(signal.SIGINT)
    assert demo.ended() == 130
    assert "stopping the workers" in demo.text() and "Traceback" not in demo.text()
    assert not alive(run)
    assert cli.json("status", "--namespace", "demo")["workers"] == []


def test_a_demo_that_is_killed_takes_its_workers_along(cli: Cli, start: Start) -> None:
    demo = start("--procs", "2")
    run = run_of(demo)
    os.kill(demo.process.pid, signal.SIGKILL)
    wait_until(lambda: not alive(run), 20)


def test_workers_that_end_end_the_demo(cli: Cli, start: Start) -> None:
    demo = start("--procs", "2")
    os.kill(run_of(demo), signal.SIGKILL)
    assert demo.ended() == 1
    assert "`tqe run` ended with -9; its last words:" in demo.text()


def test_a_redis_that_is_not_there(cli: Cli) -> None:
    assert "cannot be reached" in cli.fails(1, "demo", "--redis", "redis://127.0.0.1:1")


# ------------------------------------------------------------------ the check can fail


@pytest.mark.parametrize(
    ("path", "status", "result", "error", "good"),
    [
        ("ok.py", "completed", None, None, False),
        ("ok.py", "completed", {"bytes": 6, "sha256": "0" * 64}, None, False),
        ("ok.py", "dead", None, "OSError: no", False),
        ("gone.py", "dead", None, "FileNotFoundError: gone", True),
        ("gone.py", "dead", None, "ValueError: other", False),
        ("gone.py", "completed", {"bytes": 6}, None, False),
    ],
)
def test_a_wrong_outcome_is_seen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    status: str,
    result: object,
    error: str | None,
    good: bool,
) -> None:
    (tmp_path / "ok.py").write_text("x = 1\n")
    monkeypatch.setattr(demo_app, "LIBRARY", tmp_path)
    job = JobStatus(id="x", status=status, result=result, error=error)
    assert agrees(demo_app.digest.func, path, job) is good
    right = demo_app.digest.func("ok.py")
    assert agrees(demo_app.digest.func, "ok.py", JobStatus(id="x", status="completed", result=right))


def test_a_wrong_outcome_is_told_and_fails_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    path = demo_app.inputs()[0][0]
    jobs = {
        task.name: [JobStatus(id=task.name, status="completed", result=task.func(path))]
        for task in demo_app.TASKS
    }
    assert module.check(jobs, [path])
    jobs["HASH"] = [JobStatus(id="lie", status="completed", result={})]
    assert not module.check(jobs, [path])
    said = capsys.readouterr()
    assert "4 of 4 outcomes computed again, directly: 1 DIFFER" in said.out
    assert "(lie)" in said.err


# ------------------------------------------------------------------ percentiles


def test_quantiles_lie_inside_of_their_bucket() -> None:
    buckets = [(2e-6, 0.0), (4e-6, 50.0), (8e-6, 100.0), (float("inf"), 100.0)]
    assert quantile(buckets, 0.5) == pytest.approx(4e-6)
    assert 4e-6 < quantile(buckets, 0.75) < 8e-6
    assert quantile(buckets, 1.0) == pytest.approx(8e-6)
    assert percentiles(list(reversed(buckets))).count == 100


def test_quantiles_at_the_edges() -> None:
    assert quantile([], 0.5) == 0
    assert quantile([(1.0, 0.0), (float("inf"), 0.0)], 0.5) == 0
    assert quantile([(1.0, 0.0), (float("inf"), 5.0)], 0.5) == 1.0  # nothing is known beyond
    assert 0.5 <= quantile([(1.0, 5.0), (float("inf"), 5.0)], 0.5) <= 1.0


def test_percentiles_of_values() -> None:
    assert of_values([]).p99 == 0
    found = of_values([n / 100 for n in range(100)])
    assert (found.count, found.p50, found.p95, found.p99) == (100, 0.5, 0.95, 0.99)


def test_times_are_read_from_a_page() -> None:
    page = (
        "# TYPE taskqueue_job_execution_duration_seconds histogram\n"
        'taskqueue_job_execution_duration_seconds_bucket{type="A",le="0.000002"} 1.0\n'
        'taskqueue_job_execution_duration_seconds_bucket{type="A",le="+Inf"} 1.0\n'
        "# TYPE other histogram\n"
        'other_bucket{task="B",le="+Inf"} 1.0\n'
    )
    assert {name: found.count for name, found in task_times(page).items()} == {"A": 1}
    with pytest.raises(ValueError):
        task_times("<html>")
