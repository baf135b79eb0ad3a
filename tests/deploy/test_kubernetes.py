"""The Kubernetes manifests: against the published schemas, and against each other and the engine."""

import json
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import msgspec
import pytest
import yaml

from tests.deploy import foreign
from tests.support.metric_names import exposed
from tqe import settings
from tqe.api import endpoints, processes, shapes
from tqe.errors import SettingsError

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSION = "1.29"  # the oldest that these manifests are written for


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


MANIFESTS = [
    (path.name, one) for path in sorted(FOLDER.glob("*.yaml")) for one in documents(path) if "kind" in one
]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for _, one in MANIFESTS if one["kind"] == kind]


@pytest.mark.parametrize(
    "manifest", [pytest.param(one, id=f"{name}-{one['kind']}") for name, one in MANIFESTS]
)
def test_each_manifest_follows_its_schema(manifest: dict[str, Any]) -> None:
    if manifest["kind"] in foreign.SCHEMAS:
        jsonschema.validate(manifest, foreign.SCHEMAS[manifest["kind"]])
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize("kind", foreign.SCHEMAS)
def test_a_misspelt_field_anywhere_is_found(kind: str) -> None:
    """At each place of the manifests that kustomize and KEDA read; what lies below free names is free."""
    free = ("pairs", "labels", "annotations", "behavior")

    def spoilt(whole: Any, part: Any) -> Iterator[Any]:
        for name in list(part) if isinstance(part, dict) else ():
            part[f"{name}s"] = part.pop(name)
            yield whole
            part[name] = part.pop(f"{name}s")
            if name not in free:
                yield from spoilt(whole, part[name])
        for one in part if isinstance(part, list) else ():
            yield from spoilt(whole, one)

    found = 0
    for one in of_kind(kind):
        for wrong in spoilt(one, one):
            found += 1
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, foreign.SCHEMAS[kind])
    assert found > 6


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
    spec = pod("tqe-workers")
    assert spec["terminationGracePeriodSeconds"] >= loaded.grace_ms / 1000 + 20
    assert "--no-pin" in spec["containers"][0]["args"]
    assert spec["containers"][0]["ports"][0]["containerPort"] == loaded.metrics_port


def pods() -> list[dict[str, Any]]:
    """What the pods of each Deployment are made from."""
    return [one["spec"]["template"]["spec"] for one in of_kind("Deployment")]


def pod(name: str) -> dict[str, Any]:
    """The same of one Deployment."""
    (one,) = [one for one in of_kind("Deployment") if one["metadata"]["name"] == name]
    spec: dict[str, Any] = one["spec"]["template"]["spec"]
    return spec


def test_the_api_listens_where_it_is_asked_and_has_time_to_drain() -> None:
    spec = pod("tqe-api")
    (container,) = spec["containers"]
    (port,) = container["ports"]
    args = container["args"]
    assert args[args.index("--port") + 1] == str(port["containerPort"])
    assert args[args.index("--host") + 1] == "0.0.0.0"
    known = {route.path for route in endpoints.ENDPOINTS if route.scope is None}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == port["name"] and asked["path"] in known
    assert container["livenessProbe"]["httpGet"] != container["readinessProbe"]["httpGet"]
    _, still_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert spec["terminationGracePeriodSeconds"] >= int(still_s) + processes.DRAIN_S + 2 + 5
    (service,) = of_kind("Service")
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["spec"]["selector"].items() <= {"app.kubernetes.io/name": "tqe-api"}.items()


def test_variables_of_services_do_not_reach_our_pods() -> None:
    """Kubernetes tells a pod of each Service: TQE_API_PORT is no setting, and would be refused."""
    for service in of_kind("Service"):
        variable = f"{service['metadata']['name'].upper().replace('-', '_')}_PORT"
        with pytest.raises(SettingsError, match=variable):
            settings.load(env={variable: "tcp://10.0.0.1:8080"})
    assert all(spec["enableServiceLinks"] is False for spec in pods())


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
    asked = set(re.findall(r"taskqueue_\w+", json.dumps(rule)))
    assert asked == {name, "taskqueue_queue_paused"} <= set(exposed())
    pods_s = int(scaler["spec"]["metrics"][0]["external"]["target"]["averageValue"])
    assert pods_s == pod_target_s()


def pod_target_s() -> int:
    """The work that is meant for one pod: what its workers finish in half a minute."""
    args = pod("tqe-workers")["containers"][0]["args"]
    return 30 * int(args[args.index("--procs") + 1])


def test_keda_asks_the_api_for_what_it_answers() -> None:
    (scaled,) = of_kind("ScaledObject")
    (auth,) = of_kind("TriggerAuthentication")
    spec = scaled["spec"]
    (hpa,) = of_kind("HorizontalPodAutoscaler")
    assert spec["scaleTargetRef"]["name"] == hpa["spec"]["scaleTargetRef"]["name"]
    assert spec["minReplicaCount"] == hpa["spec"]["minReplicas"]
    assert spec["maxReplicaCount"] == hpa["spec"]["maxReplicas"]
    # Its behaviour is that of a HorizontalPodAutoscaler, which the schema of Kubernetes knows.
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    made = {**hpa, "spec": {**hpa["spec"], "behavior": behavior}}
    kubernetes_validate.validate(made, VERSION, strict=True)
    (trigger,) = spec["triggers"]
    asked = trigger["metadata"]
    url = urllib.parse.urlsplit(asked["url"])
    (service,) = of_kind("Service")
    assert url.hostname == f"{service['metadata']['name']}.tqe.svc"
    assert url.port == service["spec"]["ports"][0]["port"]
    assert "read" in {one.scope for one in endpoints.ENDPOINTS if (one.method, one.path) == ("GET", url.path)}
    field = next(
        one for one in msgspec.structs.fields(shapes.Queues) if one.encode_name == asked["valueLocation"]
    )
    assert field.name == "predicted_backlog_ms"
    assert int(asked["targetValue"]) == pod_target_s() * 1000
    assert asked["authMode"] == "bearer"
    assert trigger["authenticationRef"]["name"] == auth["metadata"]["name"]
    assert [one["parameter"] for one in auth["spec"]["secretTargetRef"]] == ["token"]


def test_no_file_has_a_secret() -> None:
    for path in FOLDER.parent.rglob("*.y*ml"):
        assert not re.search(r"://[^/\s]*:(?!CHANGE-ME@)[^/\s@]+@", path.read_text()), path
        assert not re.search(r"(?i)(password|api_?key): *\S", path.read_text()), path
