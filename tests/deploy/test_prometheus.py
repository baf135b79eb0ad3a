"""deploy/prometheus and deploy/grafana against what is exposed, with the real promtool and Prometheus."""

import json
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import scraping
from tests.support.cli import Cli, Program
from tests.support.metric_names import exposed
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tqe.supervisor import lifecycle

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "tqe.json"

_MISSING = "is not installed (Debian and Ubuntu: apt-get install --no-install-recommends prometheus)"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=f"promtool {_MISSING}")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason=f"prometheus {_MISSING}")


def series() -> set[str]:
    """Every name that a query may use."""
    names: set[str] = set()
    for name, (kind, _) in exposed().items():
        parts = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}.get(kind, ("",))
        names |= {f"{name}{part}" for part in parts}
    return names


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def named(expression: str) -> set[str]:
    return set(re.findall(r"\btaskqueue_\w+", expression))


@needs_promtool
@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
)
def test_promtool_finds_nothing_wrong(check: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *check], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_that_shows_it_firing() -> None:
    told = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in told for one in test["alert_rule_test"] if one["exp_alerts"]}
    quiet = {"TaskqueueDamagedFrames"}  # shown not to fire at 0; a gauge above 0 needs no more
    assert {rule["alert"] for rule in rules()} == fired | quiet


def test_alerts_and_dashboard_ask_only_for_what_is_exposed() -> None:
    known = series()
    asked = [*(rule["expr"] for rule in rules()), *queries()]
    assert len(asked) > 40
    for expression in asked:
        assert named(expression) <= known, expression


def test_labels_that_queries_group_by_are_those_of_the_metric() -> None:
    labels = {label for _, found in exposed().values() for label in found} | {"le", "instance", "job"}
    for expression in [*(rule["expr"] for rule in rules()), *queries()]:
        grouped = {
            one.strip() for by in re.findall(r"\b(?:by|on) \(([^)]+)\)", expression) for one in by.split(",")
        }
        assert grouped <= labels, expression


def test_alerts_lead_to_a_section_of_the_operators_page() -> None:
    page = (DEPLOY.parent / "docs" / "OPERATING.md").read_text()
    for rule in rules():
        for section in re.findall(r"OPERATING\.md, '([^']+)'", rule["annotations"]["description"]):
            assert f"\n### {section}\n" in page, section


def test_the_dashboard_fits_its_provisioning() -> None:
    board = json.loads(DASHBOARD.read_text())
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = source["datasources"][0]["uid"]
    panels = board["panels"]
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {uid}
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


# ------------------------------------------------------------------ a real one


@pytest.fixture
def engine(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Cli, int]]:
    """A running engine, and the port of its metrics."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(
        "from tqe import App\napp = App()\n@app.task('ADD')\ndef add(a: int) -> int:\n    return a\n"
    )
    cli = Cli({"TQE_REDIS_URL": redis_server.url})
    port = lifecycle.check_port("127.0.0.1", 0)
    args = ("run", "work:app", "--procs", "1", "--no-pin", "--metrics-port", str(port))
    program = Program(tmp_path, cli.env, args)
    yield cli, port
    program.close()


@needs_prometheus
def test_a_real_prometheus_scrapes_a_running_engine(engine: tuple[Cli, int], tmp_path: Path) -> None:
    """With the committed configuration; only the address and the interval are this test's."""
    cli, port = engine
    folder = tmp_path / "prometheus"
    shutil.copytree(PROMETHEUS, folder)
    text = (folder / "prometheus.yml").read_text()
    assert "engine:9100" in text and "scrape_interval: 10s" in text and "scrape_timeout: 5s" in text
    text = text.replace("engine:9100", f"127.0.0.1:{port}")
    (folder / "prometheus.yml").write_text(
        text.replace("interval: 10s", "interval: 1s").replace("timeout: 5s", "timeout: 1s")
    )
    own = lifecycle.check_port("127.0.0.1", 0)
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{own}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--storage.tsdb.path=data"], cwd=folder, stdout=log, stderr=log)
    try:

        def ask(query: str) -> list[dict[str, Any]]:
            try:
                url = f"http://127.0.0.1:{own}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
                answer: list[dict[str, Any]] = json.loads(scraping.scrape(url))["data"]["result"]
            except OSError:
                return []
            return answer

        cli("submit", "--file", "-", stdin='{"type": "ADD", "payload": {"a": 1}}\n' * 50)
        done = 'taskqueue_job_execution_duration_seconds_count{type="ADD"} == 50'
        wait_until(lambda: ask(done), 30, "fifty jobs in Prometheus")
        wait_until(lambda: ask("max(taskqueue_jobs_completed_total) == 50"), 30, "the queue's total")
        assert [one["metric"]["instance"] for one in ask('up{job="tqe"} == 1')] == [f"127.0.0.1:{port}"]
        told = json.loads(scraping.scrape(f"http://127.0.0.1:{own}/api/v1/rules"))["data"]["groups"]
        assert {rule["health"] for group in told for rule in group["rules"]} <= {"ok", "unknown"}
    finally:
        server.terminate()
        server.wait(10)
