"""Strict forms of the objects in ``cluster/``: an unknown key is an error at any depth."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import kubernetes_validate
import pydantic
import yaml
from pydantic import Field, StringConstraints

from instella_ray.serving.config import ServeArgs

from .serve_config import check_serve_config

KUBERNETES = "1.34"
Duration = Annotated[str, StringConstraints(pattern=r"^\d+(ms|s|m|h|d)$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Texts = dict[str, str]


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    namespace: Name
    labels: Texts = {}
    annotations: Texts = {}


class Auth(Strict):
    mode: Literal["token"]
    secretName: Name


class Autoscaler(Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: int = Field(ge=1)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    resources: dict[str, Any]
    securityContext: dict[str, Any]


class Head(Strict):
    rayStartParams: Texts
    template: dict[str, Any]


class Pool(Strict):
    groupName: Name
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    labels: Texts
    template: dict[str, Any]

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Pool:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("expected minReplicas <= replicas <= maxReplicas")
        return self


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: Auth
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: Autoscaler
    headGroupSpec: Head
    workerGroupSpecs: list[Pool] = Field(min_length=1)


class JobSpec(Strict):
    suspend: bool
    entrypoint: str
    submissionMode: Literal["HTTPMode"]
    backoffLimit: int = Field(ge=1)
    preRunningDeadlineSeconds: int = Field(ge=1)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    rayClusterSpec: ClusterSpec


class UpgradeOptions(Strict):
    gatewayClassName: str
    maxSurgePercent: int = Field(ge=1, le=100)
    stepSizePercent: int = Field(ge=1, le=100)
    intervalSeconds: int = Field(ge=1)


class Upgrade(Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade"]
    clusterUpgradeOptions: UpgradeOptions | None = None

    @pydantic.model_validator(mode="after")
    def _options_belong_to_the_type(self) -> Upgrade:
        if (self.type == "NewCluster") != (self.clusterUpgradeOptions is None):
            raise ValueError("clusterUpgradeOptions belong to NewClusterWithIncrementalUpgrade")
        return self


class ServiceSpec(Strict):
    excludeHeadPodFromServeSvc: bool
    upgradeStrategy: Upgrade
    rayClusterDeletionDelaySeconds: int = Field(ge=0)
    serviceUnhealthySecondThreshold: int = Field(ge=1)
    deploymentUnhealthySecondThreshold: int = Field(ge=1)
    serveConfigV2: str
    rayClusterConfig: ClusterSpec


class Endpoint(Strict):
    port: str
    path: str = "/metrics"
    interval: Duration


class NamespaceSelector(Strict):
    matchNames: list[Name]


class PodSelector(Strict):
    matchLabels: Texts


class PodMonitorSpec(Strict):
    namespaceSelector: NamespaceSelector
    selector: PodSelector
    podMetricsEndpoints: list[Endpoint] = Field(min_length=1)


class Rule(Strict):
    alert: str = Field(pattern=r"^[A-Z][A-Za-z0-9]+$")
    expr: str
    for_: Duration = Field(alias="for")
    labels: dict[Literal["severity"], Literal["page", "ticket"]] = Field(min_length=1)
    annotations: dict[Literal["summary", "action"], str] = Field(min_length=2)


class RuleGroup(Strict):
    name: Name
    rules: list[Rule] = Field(min_length=1)


class PrometheusRuleSpec(Strict):
    groups: list[RuleGroup] = Field(min_length=1)


SPECS: dict[tuple[str, str], type[Strict]] = {
    ("ray.io/v1", "RayCluster"): ClusterSpec,
    ("ray.io/v1", "RayJob"): JobSpec,
    ("ray.io/v1", "RayService"): ServiceSpec,
    ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitorSpec,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRuleSpec,
}


class Resource(Strict):
    """An object of a kind that Kubernetes does not know by itself."""

    apiVersion: str
    kind: str
    metadata: Metadata
    spec: dict[str, Any]


def check_object(target: dict[str, Any]) -> None:
    """Raises what :mod:`kubernetes_validate` or pydantic raise for what is wrong with an object."""
    assert {"apiVersion", "kind", "metadata"} <= set(target), sorted(target)
    kind = target["apiVersion"], target["kind"]
    if kind not in SPECS:
        kubernetes_validate.validate(target, KUBERNETES, strict=True)
        return
    Resource.model_validate(target)
    spec = SPECS[kind].model_validate(target["spec"])
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
    # The sidecar that KubeRay adds to the head is made of these two.
    autoscaler = cluster.autoscalerOptions
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
