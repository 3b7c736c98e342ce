"""What a site chooses: the values of ``site.env``, its gateway and quota, and the options of an overlay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..kit.manifests import as_text, check_object, crd_validator, serve_args
from ..kit.overlays import FOLDER, GPUS, clusters, of_kind, options, with_options

pytestmark = pytest.mark.process  # kubectl builds what they look at

SITE = dict(
    line.split("=", 1)
    for line in (FOLDER / "components" / "site" / "site.env").read_text().splitlines()
    if not line.startswith("#")
)
SITE_GPUS = int(SITE["gpus"])
PLACEHOLDERS = sorted({word for value in SITE.values() for word in re.findall(r"\b[A-Z][A-Z_]+\b", value)})


@pytest.mark.parametrize("overlay", ["mi300x", "nvidia"])
def test_tls_ends_at_a_gateway_that_stays_and_leads_to_the_endpoint_alone(overlay: str) -> None:
    gateway, route = of_kind(overlay, "Gateway")["endpoint"], of_kind(overlay, "HTTPRoute")["endpoint"]
    (listener,) = gateway["spec"]["listeners"]
    assert route["spec"]["parentRefs"] == [{"name": "endpoint", "sectionName": listener["name"]}]
    assert route["spec"]["hostnames"] == [listener["hostname"]]
    (rule,) = route["spec"]["rules"]
    service = of_kind(overlay, "RayService")["endpoint"]
    assert rule["backendRefs"] == [{"name": f"{service['metadata']['name']}-serve-svc", "port": 8000}]
    timeout = int(rule["timeouts"]["request"].removesuffix("s"))
    assert serve_args(service).limits.timeout_s < timeout < service["spec"]["rayClusterDeletionDelaySeconds"]


@pytest.mark.parametrize("overlay", ["mi300x", "nvidia"])
def test_the_quota_is_the_sites_and_has_room_for_the_endpoint_and_a_job(overlay: str) -> None:
    hard = of_kind(overlay, "ResourceQuota")["instella-ray"]["spec"]["hard"]
    (pool,) = clusters(overlay)["endpoint"]["workerGroupSpecs"]
    assert int(hard[f"requests.{GPUS[overlay]}"]) == SITE_GPUS >= pool["maxReplicas"] + 8


@pytest.mark.parametrize("overlay", ["mi300x", "nvidia"])
def test_options_of_an_overlay_are_valid_and_do_what_they_say(overlay: str, shared_dir: Path, tmp_path: Path) -> None:
    chosen = set(options(overlay))
    assert chosen == {
        *("identity-gcp", "identity-aws", "head-recovery", "queue", "queued-jobs", "incremental-upgrade"),
    }
    built = with_options(overlay, chosen, tmp_path)
    assert (
        re.findall(rf"\b(?:{'|'.join(PLACEHOLDERS)})\b", as_text(built)) == []
    )  # site.env is the only place to fill in
    found = {(target["kind"], target["metadata"]["name"]): target for target in built}
    for target in built:
        check_object(target)
        if target["apiVersion"] == "ray.io/v1":
            crd_validator(shared_dir / "kuberay_crds", target["kind"]).validate(target)
    for name in ("head", "worker"):
        assert set(found["ServiceAccount", name]["metadata"]["annotations"]) == {
            *("iam.gke.io/gcp-service-account", "eks.amazonaws.com/role-arn"),
        }
    # Heads find their Redis, with its password, and nobody else reaches it.
    service = found["RayService", "endpoint"]["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    redis = found["StatefulSet", "redis"]["spec"]["template"]
    (port,) = found["Service", "redis"]["spec"]["ports"]
    assert service["redisAddress"] == f"redis:{port['port']}"
    assert "externalStorageNamespace" not in service  # two clusters of an upgrade would share it
    (container,) = redis["spec"]["containers"]
    assert service["redisPassword"]["valueFrom"] == container["env"][0]["valueFrom"]
    policy = found["NetworkPolicy", "redis"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= redis["metadata"]["labels"].items()
    (rule,) = policy["ingress"]
    head = found["RayService", "endpoint"]["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"][
        "labels"
    ]
    assert [peer["podSelector"]["matchLabels"].items() <= head.items() for peer in rule["from"]] == [True]
    # Kueue admits what its queue covers, has a class of priority for, and takes no autoscaler.
    (group,) = found["ClusterQueue", "instella-ray"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    quotas = {quota["name"]: quota["nominalQuota"] for quota in flavor["resources"]}
    assert ("ResourceFlavor", flavor["name"]) in found and quotas[GPUS[overlay] or ""] == str(SITE_GPUS)
    for (kind, _), job in found.items():
        if kind == "RayJob":
            labels, spec = job["metadata"]["labels"], job["spec"]
            assert ("LocalQueue", labels["kueue.x-k8s.io/queue-name"]) in found
            assert ("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"]) in found
            assert spec["shutdownAfterJobFinishes"] is True
            groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
            for pod in [group["template"]["spec"] for group in groups]:
                assert set(pod["containers"][0]["resources"]["requests"]) <= set(quotas)
