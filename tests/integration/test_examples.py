"""The examples and the ported code of the guides, run as a reader would run them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import PROGRAM, environment
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.supervisor import lifecycle

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def env(redis_server: RedisServer, tmp_path: Path) -> dict[str, str]:
    return environment(
        {
            "TQE_REDIS_URL": redis_server.url,
            "TQE_BACKOFF_BASE_MS": "1",
            "SITE_DB": str(tmp_path / "site.sqlite3"),
            "DJANGO_SETTINGS_MODULE": "examples.django_site.settings",
        }
    )


def burst(app: str, env: dict[str, str]) -> str:
    """Run what is there, from the project's folder."""
    done = subprocess.run(
        [*PROGRAM, "run", app, "--burst", "--procs", "1", "--no-pin"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


# --- Starlette ---


@pytest.fixture
def port(env: dict[str, str], tmp_path: Path) -> Iterator[int]:
    """The web app on uvicorn."""
    log = tmp_path / "web.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "examples.web_app:web", "--port", "0"],
            cwd=ROOT, env=env, stdout=out, stderr=out,
        )  # fmt: skip
        try:
            found = wait_until(
                lambda: re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()), 30, "it serves"
            )
            yield int(found[1])
        finally:
            server.terminate()
            assert server.wait(20) is not None


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(
            method, path, json.dumps(body), {name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_the_web_app(port: int, env: dict[str, str]) -> None:
    status, first = ask(port, "POST", "/reports", {"customer": "ann", "months": 2}, idempotency_key="k")
    assert (status, first["created"]) == (202, True)
    assert ask(port, "POST", "/reports", {"customer": "ann", "months": 2}, idempotency_key="k") == (
        202,
        {"id": first["id"], "created": False},
    )
    assert ask(port, "POST", "/reports", {"customer": "ann", "months": 3}, idempotency_key="k")[0] == 409
    status, wrong = ask(port, "POST", "/reports", {"customer": 7})
    assert status == 422 and "the argument customer is wrong" in wrong["error"]
    _, doomed = ask(port, "POST", "/reports", {"customer": "bob", "months": 0})
    assert ask(port, "GET", f"/reports/{first['id']}") == (202, {"status": "queued"})
    burst("examples.web_app:jobs", env)
    assert ask(port, "GET", f"/reports/{first['id']}") == (
        200,
        {"status": "completed", "result": {"customer": "ann", "pages": 6}},
    )
    status, dead = ask(port, "GET", f"/reports/{doomed['id']}")
    assert dead == {"status": "dead", "error": "ValueError: 0 months are none"}
    assert ask(port, "GET", "/reports/nonsense")[0] == 404


# --- Django ---

SITE = """
import django
django.setup()
from django.core.management import call_command
from django.test import Client
from examples.django_site.models import Signup
call_command("migrate", run_syncdb=True, verbosity=0)
client = Client()
answer = client.post("/signup", {"email": "ann@example.com"})
assert answer.status_code == 202, answer.content
try:
    client.post("/signup", {"email": "bob@example.com", "fail": "1"})
except ValueError as e:
    assert "wrong after all" in str(e)
from examples.django_site.tasks import app
assert app.settings.lanes == ("mail", "normal", "reports") and app.settings.max_retries == 5
print(app.client.status().lanes["mail"].queued, Signup.objects.filter(welcomed=True).count())
"""


def in_django(code: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_django_site(env: dict[str, str]) -> None:
    assert in_django(SITE, env) == "1 0"  # the rolled-back one submitted nothing
    said = burst("examples.django_site.tasks:app", env)
    assert json.loads(said.splitlines()[0])["event"] == "starting"  # its settings ask for JSON
    look = """
        import django
        django.setup()
        from examples.django_site.models import Signup
        print(list(Signup.objects.values_list("email", "welcomed")))
    """
    assert in_django(look, env) == "[('ann@example.com', True)]"


# --- the README ---


def test_the_commands_of_the_readme_run_its_curl_line(env: dict[str, str], tmp_path: Path) -> None:
    """As a newcomer types them, in the project's folder; another port, as 8080 may be taken."""
    page = (ROOT / "README.md").read_text("utf-8")
    section = page.partition("Other languages submit over HTTP.")[2].partition("\n## ")[0]
    run, serve, curl, *_ = re.findall(r"```\n(.*?)\n```", section, re.S)
    look = re.search(r"`(curl [^`]*ID\?wait=30')`", section)
    assert look is not None
    assert (run.split()[:2], serve.split()[:2]) == (["tqe", "run"], ["tqe", "serve"])
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    port = lifecycle.check_port("127.0.0.1", 0)
    # Before the virtual environment is found, `tqe` may be another one.
    env = env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TQE_PIN": "false"}

    def typed(line: str) -> dict[str, Any]:
        line = line.replace("localhost:8080", f"127.0.0.1:{port}")
        done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True, timeout=60)
        told: dict[str, Any] = json.loads(done.stdout or "{}")
        return told

    with contextlib.ExitStack() as ended:
        for line in (run.replace("--procs 8", "--procs 1"), f"{serve} --port {port}"):
            log = ended.enter_context((tmp_path / "log").open("ab"))
            process = subprocess.Popen(shlex.split(line), cwd=ROOT, env=env, stdout=log, stderr=log)
            ended.callback(process.wait, 30)
            ended.callback(process.terminate)
        job = wait_until(lambda: typed(curl).get("id"), 30, "the server takes the line")
        shown = typed(look[1].replace("ID", job))
        assert shown["status"] == "completed" and shown["result"] == "'Hello' went to test@example.com"


def test_prometheus_understands_the_snippet_of_the_readme(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian and Ubuntu: apt-get install prometheus)")
    (snippet,) = re.findall(r"```yaml\n(scrape_configs.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    file = tmp_path / "prometheus.yml"
    file.write_text(snippet)
    done = subprocess.run(["promtool", "check", "config", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- guides ---


def test_the_port_from_celery(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "FROM_CELERY.md").read_text("utf-8")
    files = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.S))
    assert files.keys() == {"before/tasks.py", "tasks.py", "test_tasks.py"}
    compile(files.pop("before/tasks.py"), "before/tasks.py", "exec")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    # The other plugins of this environment take longer to load than the tests to run.
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tqe.testing.plugin"],
        cwd=tmp_path, env=environment({}) | alone,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
