"""deploy/prometheus and deploy/grafana against what is exposed, with the real promtool."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_kubernetes import of_kind
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


def others() -> list[str]:
    """Queries outside of rules and dashboard: the autoscaler's, and those of the operator's page."""
    adapter = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter.yaml").read_text())
    page = "".join((DEPLOY.parent / "docs" / name).read_text() for name in ("OPERATING.md", "METRICS.md"))
    return [
        *(rule["metricsQuery"] for rule in adapter["rules"]["external"]),
        *re.findall(r"`((?:sum|max|rate)\([^`]*taskqueue_[^`]*)`", page),
    ]


@needs_promtool
def test_prometheus_understands_each_query_of_the_dashboard(tmp_path: Path) -> None:
    plain = [one.replace("$__rate_interval", "1m").replace("$type", ".*") for one in queries()]
    asked = [*plain, *others()]
    assert len(asked) > 50 and not [one for one in asked if "$" in one]
    rules = [{"record": f"asked:{at}", "expr": one} for at, one in enumerate(asked)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_whoever_counts_work_leaves_paused_lanes_out() -> None:
    """Pods that were added for a paused lane would stand idle."""
    asked = [*(rule["expr"] for rule in rules()), *queries(), *others()]
    sums = [one for one in asked if re.search(r"sum\(max by \(priority\) \(taskqueue_predicted_backlog", one)]
    assert len(sums) == 4  # alert, dashboard, autoscaler, page
    assert all("== bool 0" in one and "taskqueue_queue_paused" in one for one in sums)


@needs_promtool
@pytest.mark.parametrize("job", ["tqe", "tqe-api"])
def test_in_kubernetes_each_job_scrapes_the_pods_of_its_deployment(job: str, tmp_path: Path) -> None:
    """Debian's promtool knows nothing of Kubernetes: it is told the pods that Kubernetes would tell."""
    config = yaml.safe_load((DEPLOY / "kubernetes/prometheus.yaml").read_text())
    (told,) = [one for one in config["scrape_configs"] if one["job_name"] == job]
    assert told.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"names": ["tqe"]}}]
    assert ("credentials_file" in told.get("authorization", {})) == (job == "tqe-api")
    told["static_configs"] = [
        {
            "targets": [f"10.0.0.{at}:{port['containerPort']}"],
            "labels": {
                "__meta_kubernetes_namespace": "tqe",
                "__meta_kubernetes_pod_name": f"{name}-{phase}",
                "__meta_kubernetes_pod_phase": phase,
                "__meta_kubernetes_pod_container_port_name": port["name"],
                "__meta_kubernetes_pod_label_app_kubernetes_io_name": labels["app.kubernetes.io/name"],
            },
        }
        for at, (name, labels, port, phase) in enumerate(
            (one["metadata"]["name"], template["metadata"]["labels"], port, phase)
            for one in of_kind("Deployment")
            for template in [one["spec"]["template"]]
            for port in template["spec"]["containers"][0]["ports"]
            for phase in ("Running", "Succeeded")
        )
    ]
    told.pop("authorization", None)  # the token is no file here
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump({**config, "rule_files": [], "scrape_configs": [told]}))
    command = ["promtool", "check", "service-discovery", "--timeout=1s", str(file), job]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept = [one["labels"] for one in json.loads(done.stdout) if one["labels"]]
    workload = {"tqe": "tqe-workers", "tqe-api": "tqe-api"}[job]
    assert [(one["job"], one["instance"], one["namespace"]) for one in kept] == [
        (job, f"{workload}-Running", "tqe")
    ]


def test_jobs_have_the_names_that_alerts_ask_for() -> None:
    named = {job for rule in rules() for job in re.findall(r'\bjob!?="([^"]+)"', rule["expr"])}
    for file in (PROMETHEUS / "prometheus.yml", DEPLOY / "kubernetes/prometheus.yaml"):
        assert named == {one["job_name"] for one in yaml.safe_load(file.read_text())["scrape_configs"]}


def test_each_alert_has_a_test_that_shows_it_firing() -> None:
    told = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in told for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert {rule["alert"] for rule in rules()} == fired


def test_alerts_and_dashboard_ask_only_for_what_is_exposed() -> None:
    known = series()
    asked = [*(rule["expr"] for rule in rules()), *queries(), *others()]
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
