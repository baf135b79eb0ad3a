"""Schemas of the manifests that are no part of Kubernetes itself, from the documents of kustomize and KEDA.

Nothing may be downloaded for a test, so these are written here, only as deep as our manifests go. They are
strict: a field that is not named is a mistake.
"""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string", "minLength": 1}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
SWITCH: Final[Schema] = {"type": "boolean"}
TEXTS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}
# The behaviour of an autoscaler is checked by the schema of Kubernetes, in a test of its own.
ANY: Final[Schema] = {"type": "object"}


def of(must: str = "", /, **fields: Schema) -> Schema:
    """An object with these fields and no others; `must`: those that have to be there."""
    return {
        "type": "object",
        "properties": fields,
        "required": must.split(),
        "additionalProperties": False,
    }


def each(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def manifest(version: str, kind: str, must: str, **fields: Schema) -> Schema:
    return of(f"apiVersion kind {must}", apiVersion={"const": version}, kind={"const": kind}, **fields)


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


META: Final = of("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)

TRIGGER: Final = of(
    "type metadata",
    type=one_of("metrics-api"),
    name=TEXT,
    metricType=one_of("AverageValue", "Value", "Utilization"),
    useCachedMetrics=SWITCH,
    # All of them texts: KEDA refuses numbers.
    metadata=of(
        "url valueLocation targetValue",
        url=TEXT,
        format=one_of("json", "xml", "yaml", "prometheus"),
        valueLocation=TEXT,
        targetValue={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
        activationTargetValue=TEXT,
        authMode=one_of("apiKey", "basic", "bearer", "tls"),
        method=one_of("header", "query"),
        keyParamName=TEXT,
        unsafeSsl=one_of("true", "false"),
    ),
    authenticationRef=of(
        "name", name=TEXT, kind=one_of("TriggerAuthentication", "ClusterTriggerAuthentication")
    ),
)

SCHEMAS: Final[dict[str, Schema]] = {
    "Kustomization": manifest(
        "kustomize.config.k8s.io/v1beta1",
        "Kustomization",
        "resources",
        namespace=TEXT,
        namePrefix=TEXT,
        nameSuffix=TEXT,
        resources=each(TEXT),
        components=each(TEXT),
        labels=each(of("pairs", pairs=TEXTS, includeSelectors=SWITCH, includeTemplates=SWITCH)),
        commonAnnotations=TEXTS,
        images=each(of("name", name=TEXT, newName=TEXT, newTag=TEXT, digest=TEXT)),
        replicas=each(of("name count", name=TEXT, count=COUNT)),
    ),
    "TriggerAuthentication": manifest(
        "keda.sh/v1alpha1",
        "TriggerAuthentication",
        "metadata spec",
        metadata=META,
        spec=of(
            secretTargetRef=each(of("parameter name key", parameter=TEXT, name=TEXT, key=TEXT)),
            env=each(of("parameter name", parameter=TEXT, name=TEXT, containerName=TEXT)),
        ),
    ),
    "ScaledObject": manifest(
        "keda.sh/v1alpha1",
        "ScaledObject",
        "metadata spec",
        metadata=META,
        spec=of(
            "scaleTargetRef triggers",
            scaleTargetRef=of("name", apiVersion=TEXT, kind=TEXT, name=TEXT, envSourceContainerName=TEXT),
            pollingInterval=COUNT,
            initialCooldownPeriod=COUNT,
            cooldownPeriod=COUNT,
            idleReplicaCount=COUNT,
            minReplicaCount=COUNT,
            maxReplicaCount=COUNT,
            fallback=of("failureThreshold replicas", failureThreshold=COUNT, replicas=COUNT),
            advanced=of(
                restoreToOriginalReplicaCount=SWITCH,
                horizontalPodAutoscalerConfig=of(name=TEXT, behavior=ANY),
            ),
            triggers=each(TRIGGER),
        ),
    ),
}
