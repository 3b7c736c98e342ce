"""Whether the objects in ``cluster/`` are what those who read them take: Kubernetes, operators, Ray Serve."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from instella_ray.serving.config import ServeArgs

from .manifest_forms import SPECS, ClusterSpec, Resource, ServiceSpec, WorkloadPriority
from .serve_config import check_serve_config

KUBERNETES = "1.34"


def check_object(target: dict[str, Any]) -> None:
    """Raises what :mod:`kubernetes_validate` or pydantic raise for what is wrong with an object."""
    assert {"apiVersion", "kind", "metadata"} <= set(target), sorted(target)
    kind = target["apiVersion"], target["kind"]
    if kind[1] == "WorkloadPriorityClass":
        WorkloadPriority.model_validate(target)
        return
    if kind not in SPECS:
        kubernetes_validate.validate(target, KUBERNETES, strict=True)
        return
    Resource.model_validate(target)
    spec = SPECS[kind].model_validate(target.get("spec", {}))
    cluster = spec if isinstance(spec, ClusterSpec) else getattr(spec, "rayClusterSpec", None)
    if isinstance(spec, ServiceSpec):
        cluster = spec.rayClusterConfig
        check_serve_config(yaml.safe_load(spec.serveConfigV2))
    if cluster is not None:
        check_cluster(cluster)


def check_cluster(cluster: ClusterSpec) -> None:
    groups = [cluster.headGroupSpec, *cluster.workerGroupSpecs]
    for group in groups:
        check_pod(group.template)
    if (autoscaler := cluster.autoscalerOptions) is None:
        return
    # The sidecar that KubeRay adds to the head is made of these two.
    sidecar = {"name": "x", "resources": autoscaler.resources, "securityContext": autoscaler.securityContext}
    check_pod({"metadata": {}, "spec": {"containers": [sidecar]}})


def check_pod(template: dict[str, Any]) -> None:
    unknown = set(template) - {"metadata", "spec"}
    assert not unknown, unknown
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def serve_args(service: dict[str, Any]) -> ServeArgs:
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return ServeArgs.model_validate(application["args"])


@cache
def crd_validator(folder: Path, kind: str) -> jsonschema.Draft7Validator:
    """KubeRay's own schema of a kind's objects, with unknown keys refused as far as it says what is known."""
    text = (folder / f"{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, yaml.CSafeLoader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return jsonschema.Draft7Validator(schema)


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _strict(value) for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if node.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


def as_text(target: Any) -> str:
    return json.dumps(target)
