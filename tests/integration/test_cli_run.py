"""`tqe run` as users start it: real processes, a real Redis, signals, mistakes."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.support.cli import PROGRAM, Cli, Program, environment
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

APP = """
import os, threading, time
from tqe import App, current_job

app = App(lease_ms=9_000)

@app.task("ADD")
def add(a: int, b: int) -> int:
    return a + b

@app.task("SLEEP")
def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"

@app.task("PARENT")
def parent() -> str:
    return add.submit(a=1, b=2).id

@app.task("LEASE")
def lease() -> int:
    return app.settings.lease_ms
"""

Start = Callable[..., Program]


@pytest.fixture
def cli(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(APP)
    return Cli({"TQE_REDIS_URL": redis_server.url})


@pytest.fixture
def start(cli: Cli, tmp_path: Path) -> Iterator[Start]:
    """`start("run", "work:app", …)` begins a tqe command."""
    begun: list[Program] = []

    def begin(*args: str, **env: str) -> Program:
        begun.append(Program(tmp_path, {"TQE_PIN": "false"} | cli.env | env, args))
        return begun[-1]

    yield begin
    for program in begun:
        program.close()


def running(cli: Cli, workers: int) -> None:
    wait_until(lambda: len(cli.json("status")["workers"]) == workers, 20, f"{workers} workers")


# ------------------------------------------------------------------ at work


def test_it_says_what_runs_where_and_runs_jobs(cli: Cli, start: Start, redis_server: RedisServer) -> None:
    run = start("run", "work:app", "--procs", "2", "--no-pin")
    assert json.loads(cli("submit", "ADD", '{"a": 1, "b": 2}', "--wait=20").stdout) == 3
    text = run.text()
    for words in (
        "app      work:app: ADD, LEASE, PARENT, SLEEP",
        f"at unix://{redis_server.socket}",
        "lanes    high > normal > low",
        "workers  2 processes; not pinned: switched off",
        "stop     Ctrl-C",
    ):
        assert words in text, text
    running(cli, 2)
    run.signal(signal.SIGTERM)
    assert run.ended() == 0
    assert cli.json("status")["workers"] == []


def test_burst_ends_when_no_job_is_left(cli: Cli, start: Start) -> None:
    names = [cli.json("submit", "ADD", json.dumps({"a": n, "b": n}))["id"] for n in range(3)]
    assert start("run", "work:app", "--procs", "1", "--burst").ended() == 0
    assert [cli.json("job", name)["result"] for name in names] == [0, 2, 4]


def test_a_task_that_submits_meets_the_redis_of_the_command_line(
    cli: Cli, start: Start, redis_server: RedisServer
) -> None:
    env = {"TQE_REDIS_URL": "redis://127.0.0.1:1"}
    start("run", "work:app", "--procs", "1", "--redis", redis_server.url, "--namespace", "n", **env)
    child = json.loads(cli("submit", "PARENT", "--wait=20", "--namespace", "n").stdout)
    wait_until(lambda: cli.json("job", child, "--namespace", "n")["result"] == 3)


@pytest.mark.parametrize("args", [(), ("--no-preload",)])
def test_what_the_apps_code_says_counts_less_than_options(
    cli: Cli, start: Start, args: tuple[str, ...]
) -> None:
    start("run", "work:app", "--procs", "1", *args)
    assert cli("submit", "LEASE", "--wait=20").stdout == "9000\n"
    cli_says = start("run", "work:app", "--procs", "1", "--lease", "5", "--namespace", "n", *args)
    assert cli("submit", "LEASE", "--wait=20", "--namespace", "n").stdout == "5000\n"
    if args:
        assert "imported by each worker" in cli_says.text()


def test_an_app_with_threads_is_imported_by_each_worker(cli: Cli, start: Start, tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(
        APP + "\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    )
    run = start("run", "threads:app", "--procs", "1")
    assert cli("submit", "LEASE", "--wait=20").stdout == "9000\n"
    assert "each worker imports it for itself" in run.text()


def test_ctrl_c_drains_and_a_second_one_stops(cli: Cli, start: Start, redis_client: redis.Redis) -> None:
    run = start("run", "work:app", "--procs", "1", "--grace", "30")
    running(cli, 1)
    name = cli.json("submit", "SLEEP", '{"seconds": 30}')["id"]
    wait_until(lambda: cli.json("job", name)["status"] == "running")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does it: to the whole group
    run.says("draining")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.ended() == 0
    assert cli.json("job", name)["status"] in ("queued", "retrying")


def test_metrics_are_served_where_the_first_lines_say(cli: Cli, start: Start) -> None:
    run = start("run", "work:app", "--procs", "1", "--metrics-port", "0")
    text = run.says("metrics are served")
    (url,) = [line.split()[1] for line in text.splitlines() if line.startswith("  metrics")]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as page:
        assert b"taskqueue_workers" in page.read()


def test_the_log_may_be_json(cli: Cli, start: Start, redis_server: RedisServer) -> None:
    run = start("run", "work:app", "--procs", "1", "--burst", TQE_LOG_FORMAT="json")
    assert run.ended() == 0
    events = [json.loads(line) for line in run.text().splitlines()]
    assert events[0]["event"] == "starting" and redis_server.socket in events[0]["redis"]


def test_a_warning_about_the_server_is_told(
    cli: Cli, start: Start, make_redis: Callable[..., RedisServer]
) -> None:
    server = make_redis(appendonly="no")
    run = start("run", "work:app", "--procs", "1", "--burst", "--redis", server.url)
    assert run.ended() == 0
    assert "the append-only file is off" in run.text()


# ------------------------------------------------------------------ for the eye


def test_status_watch_goes_on_until_ctrl_c(cli: Cli, start: Start) -> None:
    watch = start("status", "--watch", "--json", "--interval", "0.1")
    wait_until(lambda: len(watch.text().splitlines()) >= 3)
    watch.signal(signal.SIGINT)
    assert watch.ended() == 130
    assert json.loads(watch.text().splitlines()[0])["running"] == 0


def on_terminal(cli: Cli, *args: str, until: bytes = b"") -> bytes:
    """What a command writes to a terminal; with `until`, Ctrl-C is pressed once that is there."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, *args], env=environment(cli.env), stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # nobody has the other end open any more
            break
        said += part
        if until and until in said:
            process.send_signal(signal.SIGINT)
            until = b""
    os.close(master)
    process.wait(20)
    return said


def test_a_long_submission_shows_a_bar_on_a_terminal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text('{"type": "A"}\n' * 20_000)
    said = on_terminal(cli, "submit", "--file", "jobs")
    assert b"submitting" in said and b"20,000 jobs" in said
    assert b"20,000 created" in said
    assert b"submitting" not in on_terminal(cli, "submit", "--file", "jobs", "--json")


def test_status_watch_on_a_terminal_shows_rates(cli: Cli) -> None:
    said = on_terminal(cli, "status", "--watch", "--interval", "0.1", until=b"per second")
    assert b"no worker runs" in said and b"interrupted" in said


# ------------------------------------------------------------------ mistakes


def refused(start: Start, code: int, *args: str, **env: str) -> str:
    run = start("run", *args, **env)
    assert run.ended() == code, run.text()
    text = run.text()
    assert "Traceback" not in text
    found = re.findall(r"(?m)^Error: (.+)$", text)
    assert len(found) == 1, text
    return str(found[0])


@pytest.mark.parametrize(
    ("app", "code", "part"),
    [
        ("nowhere:app", 2, "there is no module nowhere"),
        ("work:nothing", 2, "work has no attribute nothing"),
        ("work:add", 2, "work:add is no App, but AppTask"),
        ("work", 2, "as module:attribute"),
    ],
)
def test_an_app_that_is_not_there(start: Start, app: str, code: int, part: str) -> None:
    assert part in refused(start, code, app)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import json\n\njson.loads('{')\n", ("JSONDecodeError", "broken.py:3")),
        ("x = 1\ndef f(:\n", ("SyntaxError", "broken.py", "line 2")),
        ("import nothing_of_that_name\n", ("nothing_of_that_name", "broken.py:1")),
        ("raise SystemExit(3)\n", ("SystemExit", "broken.py:1")),
        (
            "from tqe import App\napp = App()\n@app.task('A')\ndef a(): ...\n@app.task('A')\ndef b(): ...\n",
            ("task A is registered twice", "broken.py:5"),
        ),
        ("from tqe import App\napp = App(lease=3)\n", ("lease, which is not a setting",)),
    ],
)
@pytest.mark.parametrize("args", [(), ("--no-preload",)])
def test_an_app_that_cannot_be_imported_names_the_line(
    start: Start, tmp_path: Path, text: str, parts: tuple[str, ...], args: tuple[str, ...]
) -> None:
    (tmp_path / "broken.py").write_text(text)
    said = refused(start, 2 if "setting" in parts[0] else 1, "broken:app", *args)
    for part in parts:
        assert part in said, said


def test_no_app_at_all(cli: Cli) -> None:
    assert "module:attribute" in cli.fails(2, "run")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("--procs", "0"), "a whole number from 1 to 1024"),
        (("--procs", "many"), "sets procs to 'many'"),
        (("--lanes", "high,High"), "sets lanes to 'high,High'"),
        (("--lanes", "a,b"), "default_lane"),
        (("--concurrency", "-1"), "sets concurrency to '-1'"),
        (("--lease", "0.1"), "sets lease_ms to 100"),
        (("--lease", "inf"), "'inf' is no duration"),
        (("--grace", "x"), "'x' is no duration"),
        (("--autoscale", "4"), "it takes MIN,MAX"),
        (("--autoscale", "1,4", "--procs", "2"), "give one of them"),
        (("--autoscale", "1,4", "--drain-target", "1d"), "'1d' is no duration"),
        (("--metrics-port", "70000"), "the port of /metrics"),
    ],
)
def test_wrong_options(cli: Cli, args: tuple[str, ...], part: str) -> None:
    assert part in cli.fails(2, "run", "work:app", *args)


def test_a_port_that_is_taken(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"metrics_port = {port}" in refused(start, 2, "work:app", "--metrics-port", port)


def test_a_redis_that_is_not_there_or_not_fit(start: Start, redis_client: redis.Redis) -> None:
    assert "cannot be reached" in refused(start, 1, "work:app", "--redis", "redis://127.0.0.1:1")
    redis_client.config_set("maxmemory-policy", "volatile-ttl")
    assert "noeviction" in refused(start, 1, "work:app")


def test_a_bare_run_takes_the_app_of_tqe_toml(cli: Cli, start: Start, tmp_path: Path) -> None:
    (tmp_path / "tqe.toml").write_text('app = "work:app"\n')
    start("run", "--procs", "1")
    assert cli("submit", "ADD", '{"a": 1, "b": 1}', "--wait=20").stdout == "2\n"


def test_the_installed_command_is_the_same_program(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("tqe")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert said.stdout.startswith("tqe, version ")
