"""The Kubernetes manifests: against the published schemas, and against each other and the engine."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.metric_names import exposed
from tqe import settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSION = "1.29"  # the oldest that these manifests are written for
FOREIGN = {"Kustomization", "ScaledObject", "TriggerAuthentication"}  # no part of Kubernetes itself


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


MANIFESTS = [
    (path.name, one) for path in sorted(FOLDER.glob("*.yaml")) for one in documents(path) if "kind" in one
]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for _, one in MANIFESTS if one["kind"] == kind]


@pytest.mark.parametrize(
    "manifest",
    [pytest.param(one, id=f"{name}-{one['kind']}") for name, one in MANIFESTS if one["kind"] not in FOREIGN],
)
def test_each_manifest_follows_its_schema(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_schemas_would_find_a_mistake() -> None:
    wrong = json.loads(json.dumps(of_kind("Deployment")[0]))
    wrong["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 50
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_the_kustomization_names_files_that_exist_and_every_image() -> None:
    (told,) = of_kind("Kustomization")
    assert all((FOLDER / name).is_file() for name in told["resources"])
    images = {
        container["image"]
        for one in of_kind("Deployment")
        for container in one["spec"]["template"]["spec"]["containers"]
    }
    assert {one["name"] for one in told["images"]} >= {one for one in images if ":" not in one}


def test_kustomize_builds_it() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = [one["kind"] for one in yaml.safe_load_all(done.stdout)]
    assert {"Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler", "ConfigMap"} <= set(kinds)
    assert all(
        one["metadata"].get("namespace") == "tqe"
        for one in yaml.safe_load_all(done.stdout)
        if one["kind"] != "Namespace"
    )


def test_settings_in_the_config_are_settings() -> None:
    (config,) = of_kind("ConfigMap")
    secret = of_kind("Secret")[0]["stringData"]
    loaded = settings.load(
        env={**config["data"], **{k: v for k, v in secret.items() if k.startswith("TQE_")}}
    )
    assert not loaded.pin and loaded.metrics_port == 9100 and loaded.metrics_host == "0.0.0.0"
    (workers,) = [one for one in of_kind("Deployment") if one["metadata"]["name"] == "tqe-workers"]
    spec = workers["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] >= loaded.grace_ms / 1000 + 20
    assert "--no-pin" in spec["containers"][0]["args"]
    assert spec["containers"][0]["ports"][0]["containerPort"] == loaded.metrics_port


@pytest.mark.parametrize("one", of_kind("Deployment"), ids=lambda one: one["metadata"]["name"])
def test_pods_are_what_the_restricted_standard_asks_for(one: dict[str, Any]) -> None:
    spec = one["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"]
        assert container["livenessProbe"] and container["resources"]["limits"]["memory"]


def test_selectors_select_the_pods_that_they_mean() -> None:
    labels = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in of_kind("Deployment")
    }
    for one in [*of_kind("Deployment"), *of_kind("PodDisruptionBudget")]:
        wanted = one["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= labels[one["metadata"]["name"]].items()
    for one in of_kind("HorizontalPodAutoscaler"):
        assert one["spec"]["scaleTargetRef"]["name"] in labels
    assert {one["metadata"]["name"] for one in of_kind("PodDisruptionBudget")} == set(labels)


def test_the_autoscaler_and_its_adapter_mean_the_same_exposed_metric() -> None:
    (scaler,) = of_kind("HorizontalPodAutoscaler")
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["external"]
    name = scaler["spec"]["metrics"][0]["external"]["metric"]["name"]
    assert name == rule["name"]["as"]
    assert set(re.findall(r"taskqueue_\w+", json.dumps(rule))) == {name} <= set(exposed())
    (workers,) = [one for one in of_kind("Deployment") if one["metadata"]["name"] == "tqe-workers"]
    args = workers["spec"]["template"]["spec"]["containers"][0]["args"]
    pods_s = int(scaler["spec"]["metrics"][0]["external"]["target"]["averageValue"])
    assert pods_s == 30 * int(args[args.index("--procs") + 1])


def test_no_file_has_a_secret() -> None:
    for path in FOLDER.parent.rglob("*.y*ml"):
        assert not re.search(r"://[^/\s]*:(?!CHANGE-ME@)[^/\s@]+@", path.read_text()), path
        assert not re.search(r"(?i)(password|api_?key): *\S", path.read_text()), path
