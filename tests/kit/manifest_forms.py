"""Strict forms of the objects of operators in ``cluster/``: an unknown key is an error at any depth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, StringConstraints

Duration = Annotated[str, StringConstraints(pattern=r"^\d+(ms|s|m|h|d)$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Texts = dict[str, str]


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    namespace: Name | None = None
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


class SecretKey(Strict):
    name: Name
    key: str


class SecretSource(Strict):
    secretKeyRef: SecretKey


class SecretValue(Strict):
    valueFrom: SecretSource


class FaultTolerance(Strict):
    redisAddress: str = Field(pattern=r"^[a-z.-]+:\d+$")
    redisPassword: SecretValue


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: Auth
    enableInTreeAutoscaling: Literal[True] | None = None
    autoscalerOptions: Autoscaler | None = None
    gcsFaultToleranceOptions: FaultTolerance | None = None
    headGroupSpec: Head
    workerGroupSpecs: list[Pool] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _options_belong_to_an_autoscaler(self) -> ClusterSpec:
        if (self.enableInTreeAutoscaling is None) != (self.autoscalerOptions is None):
            raise ValueError("autoscalerOptions belong to enableInTreeAutoscaling")
        return self


class DeletionCondition(Strict):
    jobStatus: Literal["SUCCEEDED", "FAILED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: int = Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _one_of_them(self) -> DeletionCondition:
        if (self.jobStatus is None) == (self.jobDeploymentStatus is None):
            raise ValueError("expected one of jobStatus and jobDeploymentStatus")
        return self


class DeletionRule(Strict):
    condition: DeletionCondition
    policy: Literal["DeleteWorkers", "DeleteCluster", "DeleteSelf"]


class DeletionStrategy(Strict):
    deletionRules: list[DeletionRule] = Field(min_length=1)


class JobSpec(Strict):
    """A job, with what KubeRay's operator refuses beyond its schema."""

    entrypoint: str
    submissionMode: Literal["HTTPMode"]
    backoffLimit: int = Field(ge=1)
    preRunningDeadlineSeconds: int = Field(ge=1)
    deletionStrategy: DeletionStrategy | None = None
    shutdownAfterJobFinishes: Literal[True] | None = None
    rayClusterSpec: ClusterSpec

    @pydantic.model_validator(mode="after")
    def _ends_in_one_way(self) -> JobSpec:
        if (self.deletionStrategy is None) == (self.shutdownAfterJobFinishes is None):
            raise ValueError("expected one of deletionStrategy and shutdownAfterJobFinishes")
        rules = self.deletionStrategy.deletionRules if self.deletionStrategy else []
        waits: dict[tuple[str | None, str | None], list[int]] = {}
        for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf"):
            for rule in rules:
                if rule.policy == policy:
                    event = rule.condition.jobStatus, rule.condition.jobDeploymentStatus
                    waits.setdefault(event, []).append(rule.condition.ttlSeconds)
        if any(seconds != sorted(seconds) for seconds in waits.values()):
            raise ValueError("expected workers to go before the cluster, and that before the job")
        workers_go = any(rule.policy == "DeleteWorkers" for rule in rules)
        if workers_go and self.rayClusterSpec.enableInTreeAutoscaling:
            raise ValueError("DeleteWorkers needs a cluster without an autoscaler")
        return self


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
    podTargetLabels: list[str]
    podMetricsEndpoints: list[Endpoint] = Field(min_length=1)


class Recording(Strict):
    record: str = Field(pattern=r"^[a-z_]+:[a-z_]+:[a-z0-9_]+$")
    expr: str


class Alert(Strict):
    alert: str = Field(pattern=r"^[A-Z][A-Za-z0-9]+$")
    expr: str
    for_: Duration = Field(alias="for")
    labels: dict[Literal["severity"], Literal["page", "ticket"]] = Field(min_length=1)
    annotations: dict[Literal["summary", "action", "runbook_url"], str] = Field(min_length=3)


class RuleGroup(Strict):
    name: Name
    rules: list[Alert | Recording] = Field(min_length=1)


class PrometheusRuleSpec(Strict):
    groups: list[RuleGroup] = Field(min_length=1)


class CertificateRef(Strict):
    kind: Literal["Secret"]
    name: Name


class ListenerTls(Strict):
    mode: Literal["Terminate"]
    certificateRefs: list[CertificateRef] = Field(min_length=1)


class RouteNamespaces(Strict):
    from_: Literal["Same"] = Field(alias="from")


class AllowedRoutes(Strict):
    namespaces: RouteNamespaces


class Listener(Strict):
    name: Name
    protocol: Literal["HTTPS"]
    port: int
    hostname: str
    tls: ListenerTls
    allowedRoutes: AllowedRoutes


class GatewaySpec(Strict):
    gatewayClassName: str
    listeners: list[Listener] = Field(min_length=1)


class ParentRef(Strict):
    name: Name
    sectionName: Name


class PathMatch(Strict):
    type: Literal["PathPrefix", "Exact"]
    value: str = Field(pattern="^/")


class RouteMatch(Strict):
    path: PathMatch


class BackendRef(Strict):
    name: Name
    port: int


class RouteTimeouts(Strict):
    request: Duration


class RouteRule(Strict):
    matches: list[RouteMatch]
    backendRefs: list[BackendRef] = Field(min_length=1)
    timeouts: RouteTimeouts


class HttpRouteSpec(Strict):
    parentRefs: list[ParentRef] = Field(min_length=1)
    hostnames: list[str] = Field(min_length=1)
    rules: list[RouteRule] = Field(min_length=1)


class FlavorQuota(Strict):
    name: str
    nominalQuota: str = Field(pattern=r"^\d+(Gi|Ti)?$")


class QuotaFlavor(Strict):
    name: Name
    resources: list[FlavorQuota] = Field(min_length=1)


class ResourceGroup(Strict):
    coveredResources: list[str] = Field(min_length=1)
    flavors: list[QuotaFlavor] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _in_the_same_order(self) -> ResourceGroup:
        if any([quota.name for quota in flavor.resources] != self.coveredResources for flavor in self.flavors):
            raise ValueError("expected the resources of a flavor in the order of coveredResources")
        return self


class Preemption(Strict):
    withinClusterQueue: Literal["Never", "LowerPriority", "LowerOrNewerEqualPriority"]


class ClusterQueueSpec(Strict):
    namespaceSelector: PodSelector
    queueingStrategy: Literal["StrictFIFO", "BestEffortFIFO"]
    preemption: Preemption
    resourceGroups: list[ResourceGroup] = Field(min_length=1)


class LocalQueueSpec(Strict):
    clusterQueue: Name


class ResourceFlavorSpec(Strict):
    pass


SPECS: dict[tuple[str, str], type[Strict]] = {
    ("gateway.networking.k8s.io/v1", "Gateway"): GatewaySpec,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HttpRouteSpec,
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): ClusterQueueSpec,
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): LocalQueueSpec,
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): ResourceFlavorSpec,
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
    spec: dict[str, Any] = {}


class WorkloadPriority(Strict):
    """A priority class of Kueue's, which has no spec."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["WorkloadPriorityClass"]
    metadata: Metadata
    value: int
    description: str
