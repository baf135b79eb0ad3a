"""deploy/prometheus and deploy/grafana against what is exposed, with the real promtool."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.metric_names import exposed

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "tqe.json"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian and Ubuntu: apt-get install prometheus)",
)


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
        ("check", "config", "--syntax-only", "prometheus.yml"),  # the token is no file here
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
        assert f"\n| {rule['alert']} | " in page


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
