"""``cluster/kuberay``: what the overlays promise to those who apply them, and that its jobs are commands that exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..kit.commands import check_job
from ..kit.kubernetes import load_documents, walk
from ..kit.manifests import as_text, serve_args
from ..kit.overlays import (
    FOLDER,
    GPUS,
    OVERLAYS,
    applied,
    clusters,
    created,
    objects,
    of_kind,
    options,
    templates,
    with_options,
)
from ..kit.project import ROOT, tracked

pytestmark = pytest.mark.process  # kubectl builds what they look at

# --- no copies


def test_overlays_hold_patches_and_no_object_of_their_own() -> None:
    names = {path.name for path in (FOLDER / "overlays").rglob("*") if path.is_file()}
    assert names == {"kustomization.yaml"}
    for path in (FOLDER / "overlays").rglob("kustomization.yaml"):
        (settings_of,) = load_documents(path.read_text())
        assert settings_of["resources"] == (["../../../jobs"] if path.parent.name == "jobs" else ["../../base"])


def test_the_gpu_overlays_differ_in_the_accelerator_alone() -> None:
    amd, nvidia = (as_text(objects(name)) for name in ("mi300x", "nvidia"))
    amd = amd.replace(', "supplementalGroups": [44, 109]', "")
    amd, nvidia = (text.replace("amd.com/gpu", "nvidia.com/gpu") for text in (amd, nvidia))
    assert json.loads(amd) == json.loads(nvidia)


def test_every_file_is_part_of_some_overlay() -> None:
    used: set[Path] = set()

    def collect(folder: Path) -> None:
        path = folder / "kustomization.yaml"
        used.add(path)
        (found,) = load_documents(path.read_text())
        names = [*found.get("resources", []), *found.get("components", [])]
        names += [patch["path"] for patch in found.get("patches", []) if "path" in patch]
        names += [name for generator in found.get("configMapGenerator", []) for name in generator["envs"]]
        for name in names:
            here = (folder / name).resolve()
            collect(here) if here.is_dir() else used.add(here)

    for overlay in OVERLAYS:
        collect(FOLDER / "overlays" / overlay)
        collect(FOLDER / "overlays" / overlay / "jobs")
        for option in options(overlay):
            collect(FOLDER / "components" / option)
    assert {path for path in tracked() if path.is_relative_to(FOLDER)} == used


def test_every_patch_finds_something_to_change(tmp_path: Path) -> None:
    """kustomize says nothing about a target, or an image, that no object has."""
    built = [target for overlay in OVERLAYS for target in objects(overlay)]
    built += with_options("mi300x", set(options("mi300x")), tmp_path)
    for path in FOLDER.rglob("kustomization.yaml"):
        (found,) = load_documents(path.read_text())
        for entry in found.get("patches", []):
            if "target" in entry and "$patch: delete" not in entry.get("patch", ""):
                kind, name = entry["target"]["kind"], entry["target"].get("name", ".*")
                hit = [t for t in built if t["kind"] == kind and re.fullmatch(name, t["metadata"]["name"])]
                assert hit, (path, entry["target"])
    images = {c["image"] for overlay in OVERLAYS for t in templates(overlay) for c in t["spec"]["containers"]}
    assert images == {"REGISTRY/instella-ray:TAG", "instella-ray:cpu"}


# --- what they promise


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_stage_is_a_command_that_its_job_reads(overlay: str) -> None:
    paths = of_kind(overlay, "ConfigMap")["paths"]["data"]
    for name, job in of_kind(overlay, "RayJob").items():
        words = shlex.split(job["spec"]["entrypoint"], comments=False)
        config = check_job(words, paths)
        assert words[1] == f"jobs/{name.replace('-', '_')}.py"
        assert resumes(config), f"{name}: a second attempt would be refused"
        assert not re.search(r"MODEL_FOLDER|_FOLDER\b", as_text(config.model_dump(mode="json")))


def resumes(config: Any) -> bool:
    """Whether a command goes on with the output of an earlier attempt, and begins without one."""
    if hasattr(config, "train"):
        return config.train.resume == "auto"
    return getattr(config, "sample", config).mode == "resume"


def test_there_is_a_job_for_every_stage_of_the_house() -> None:
    stages = {path.stem.replace("_", "-") for path in (ROOT / "jobs").glob("*.py")}
    # For one machine; a RayService; the way to a cluster that runs.
    apart = {"bench", "bench-gpu", "icons", "train-classifier", "serve", "submit"}
    assert stages - apart == set(of_kind("mi300x", "RayJob")) == set(of_kind("nvidia", "RayJob"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_starts_by_being_applied_but_the_head_and_the_endpoint(overlay: str) -> None:
    """Nor does applying touch a job that runs: jobs are not part of it, and creating one again is refused by its name."""
    assert "RayJob" not in {target["kind"] for target in applied(overlay)}
    assert {target["kind"] for target in created(overlay)} == {"RayJob"}
    for name, job in of_kind(overlay, "RayJob").items():
        assert job["metadata"]["labels"]["app.kubernetes.io/component"] == name  # create -k DIR -l picks one
        assert "suspend" not in job["spec"]
    (development,) = of_kind(overlay, "RayCluster").values()
    assert [pool["replicas"] for pool in development["spec"]["workerGroupSpecs"]] == [0, 0, 0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_job_has_its_nodes_from_its_beginning_to_its_end_and_not_longer(overlay: str) -> None:
    """KubeRay deletes workers alone only where no autoscaler would make them anew."""
    for name, job in of_kind(overlay, "RayJob").items():
        spec = job["spec"]
        for pool in spec["rayClusterSpec"]["workerGroupSpecs"]:
            assert pool["minReplicas"] == pool["replicas"] == pool["maxReplicas"] > 0, name
        assert "enableInTreeAutoscaling" not in spec["rayClusterSpec"]
        rules = spec["deletionStrategy"]["deletionRules"]
        at_once = [rule["condition"] for rule in rules if rule["policy"] == "DeleteWorkers"]
        assert at_once == [{"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"}]
        heads = {rule["condition"]["ttlSeconds"] for rule in rules if rule["policy"] == "DeleteCluster"}
        assert min(heads) >= 3600, name  # time to read the log


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_claim_the_nodes_gpus_and_no_other_resource_of_that_kind(overlay: str) -> None:
    for name, cluster in clusters(overlay).items():
        for pool in cluster["workerGroupSpecs"]:
            limits = pool["template"]["spec"]["containers"][0]["resources"]["limits"]
            gpus = {key: value for key, value in limits.items() if key.endswith("gpu")}
            count = {"gpu": "8", "single-gpu": "1"}.get(pool["groupName"])
            expected = {GPUS[overlay]: count} if count and GPUS[overlay] else {}
            assert gpus == expected, name


def gib(amount: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", amount).groups()  # type: ignore[union-attr]
    return int(number) / {"Gi": 1, "Mi": 1024}[unit]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rays_object_store_lies_in_memory_that_the_pod_has(overlay: str) -> None:
    """What is in a memory-backed volume counts as the pod's memory; Ray takes 30 % of that for its store."""
    for template in templates(overlay):
        (container,) = template["spec"]["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        (shm,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        memory = gib(container["resources"]["limits"]["memory"])
        assert 0.2 * memory < gib(shm["emptyDir"]["sizeLimit"]) < 0.5 * memory
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_container_has_more_rights_than_it_needs(overlay: str) -> None:
    bounds = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for template in templates(overlay):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(container["securityContext"] == bounds for container in pod["containers"])
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        # Kubernetes' own API is for heads with an autoscaler.
        assert pod["serviceAccountName"] in ("head", "worker")
        assert pod.get("automountServiceAccountToken") is (False if pod["serviceAccountName"] == "worker" else None)
    for name, cluster in clusters(overlay).items():
        accounts = {cluster["headGroupSpec"]["template"]["spec"]["serviceAccountName"]}
        assert accounts == {"head" if "enableInTreeAutoscaling" in cluster else "worker"}, name
        accounts = {pool["template"]["spec"]["serviceAccountName"] for pool in cluster["workerGroupSpecs"]}
        assert accounts == {"worker"}, name
    for target in objects(overlay):
        walk(target, lambda node: [] if not node.get("privileged") else pytest.fail("privileged"))
    assert [target for target in objects(overlay) if target["kind"] == "Secret"] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_cluster_asks_for_the_token_and_the_version_of_the_image(overlay: str) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for cluster in clusters(overlay).values():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert cluster["rayVersion"] == pins["ray"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster.get("autoscalerOptions", {"version": "v2"})["version"] == "v2"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_that_objects_give_each_other_exist(overlay: str) -> None:
    for template in templates(overlay):
        pod, (container,) = template["spec"], template["spec"]["containers"]
        assert pod["serviceAccountName"] in of_kind(overlay, "ServiceAccount")
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["envFrom"] == [
            {"configMapRef": {"name": "paths"}},
            {"secretRef": {"name": "bucket", "optional": True}},  # README.md makes it where it is needed
        ]
        assert "paths" in of_kind(overlay, "ConfigMap")
        secrets = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
        assert secrets == [{"secretName": "bucket-key", "optional": True}]
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert set(claims) <= set(of_kind(overlay, "PersistentVolumeClaim"))
    (binding,) = of_kind(overlay, "RoleBinding").values()
    assert binding["roleRef"]["name"] in of_kind(overlay, "Role")
    assert [(s["name"], s["namespace"]) for s in binding["subjects"]] == [("head", binding["metadata"]["namespace"])]


def reached_by(overlay: str, labels: dict[str, str]) -> set[tuple[str, int | None]]:
    """(policy, port) by which something gets to a pod with these labels; None is every port."""
    found = set()
    for name, policy in of_kind(overlay, "NetworkPolicy").items():
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items():
            for rule in policy["spec"].get("ingress", []):
                assert rule["from"], name  # no rule lets everybody in
                found |= {(name, port["port"]) for port in rule.get("ports", [{"port": None}])}
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_gateway_comes_to_serves_port_and_only_clients_to_the_head(overlay: str) -> None:
    everywhere = {("within-ray", None), ("operator", 8265), ("operator", 8000)}
    everywhere |= {("monitoring", 8080), ("monitoring", 44217)}
    endpoint = clusters(overlay)["endpoint"]
    pods = {name: cluster for name, cluster in clusters(overlay).items() if cluster is not endpoint}
    for cluster in pods.values():
        for pool in cluster["workerGroupSpecs"]:
            assert reached_by(overlay, pool["template"]["metadata"]["labels"]) == everywhere
        head = cluster["headGroupSpec"]["template"]["metadata"]["labels"]
        assert reached_by(overlay, head) == everywhere | {("clients", 8265)}
    serving = endpoint["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    assert reached_by(overlay, serving) == everywhere | {("gateway", 8000)}
    prometheus = of_kind(overlay, "NetworkPolicy")["monitoring"]["spec"]["ingress"][0]["from"]
    assert [set(peer) for peer in prometheus] == [{"namespaceSelector", "podSelector"}]  # not all of its namespace
    denied = of_kind(overlay, "NetworkPolicy")["default-deny"]["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_endpoint_has_keys_budgets_and_time_to_finish(overlay: str) -> None:
    service = of_kind(overlay, "RayService")["endpoint"]
    args, cluster = serve_args(service), service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert [variable["name"] for variable in container["env"]] == ["INSTELLA_API_KEYS"]
        assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "api-keys", "key": "keys"}
    others = [template for template in templates(overlay) if "env" in template["spec"]["containers"][0]]
    assert len(others) == len(groups)  # no other pod knows the keys
    if overlay != "kind":
        for pool in cluster["workerGroupSpecs"]:
            assert pool["template"]["spec"]["terminationGracePeriodSeconds"] >= args.limits.timeout_s + 10
        assert service["spec"]["rayClusterDeletionDelaySeconds"] > args.limits.timeout_s
    for name, budget in of_kind(overlay, "PodDisruptionBudget").items():
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        held = [template for template in templates(overlay) if wanted <= template["metadata"]["labels"].items()]
        if name == "job-heads":
            assert held == [job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"] for job in created(overlay)]
        else:
            assert len(held) == 1 and held[0] in [group["template"] for group in groups]


@pytest.mark.parametrize("overlay", ["mi300x", "nvidia"])
def test_the_endpoints_largest_size_fits_its_largest_pool(overlay: str) -> None:
    service = of_kind(overlay, "RayService")["endpoint"]
    args, (pool,) = serve_args(service), service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    stages = [args.text, args.decoder, *args.models.values()]
    limits = pool["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (pool["groupName"], limits[GPUS[overlay]], limits["cpu"]) == ("single-gpu", "1", "11")
    for size, replicas in {"minReplicas": "least_replicas", "maxReplicas": "most_replicas"}.items():
        asked = [(args.gpus(s), args.cpus(s)) for s in stages for _ in range(getattr(s, replicas))]
        assert pods_for(asked, 1, 11) == pool[size]


def pods_for(asked: list[tuple[float, float]], gpus: float, cpus: float) -> int:
    """The number of pods that replicas (GPUs, CPUs) fill, the largest placed first."""
    pods: list[list[float]] = []
    for gpu, cpu in sorted(asked, reverse=True):
        place = next((pod for pod in pods if pod[0] >= gpu and pod[1] >= cpu), None)
        if place is None:
            pods.append(place := [gpus, cpus])
        place[0] -= gpu
        place[1] -= cpu
    return len(pods)


@pytest.mark.parametrize("overlay", ["mi300x", "nvidia"])
def test_training_finds_its_workers_places_when_it_starts(overlay: str) -> None:
    """A run that asks for more than is there is refused at once, so the pool must not start smaller."""
    paths = of_kind(overlay, "ConfigMap")["paths"]["data"]
    for name in ("train-tokenizer", "train-generator"):
        spec = of_kind(overlay, "RayJob")[name]["spec"]
        config = check_job(shlex.split(spec["entrypoint"]), paths)
        (pool,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        workers = config.train.workers
        assert workers.gpu and workers.count <= 8 * pool["minReplicas"]
        limits = pool["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert workers.count * workers.cpus <= int(limits["cpu"]) * pool["minReplicas"]


def test_a_pod_that_ends_tells_ray_so(tmp_path: Path) -> None:
    """Its command, run with a ``ray`` and a ``sleep`` that only write down what they are asked for."""
    from ray.scripts.scripts import drain_node

    (pool,) = clusters("mi300x")["train-generator"]["workerGroupSpecs"]
    (container,) = pool["template"]["spec"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    for name in ("ray", "sleep"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_ADDRESS": "head:6379"}
    raylet = subprocess.Popen([sys.executable, "-c", "input()", "--node_id=ab12"], stdin=subprocess.PIPE)
    try:
        subprocess.run(command, env=environment, check=True)
    finally:
        raylet.communicate(b"\n")
    action, *asked = (tmp_path / "ray.txt").read_text().splitlines()
    given = dict(zip(asked[::2], asked[1::2], strict=True))
    assert action == "drain-node"
    assert set(given) <= {option for parameter in drain_node.params for option in parameter.opts}
    assert given["--address"] == "head:6379" and re.fullmatch("[0-9a-f]+", given["--node-id"])
    waited = int((tmp_path / "sleep.txt").read_text())
    assert int(given["--deadline-remaining-seconds"]) <= waited
    assert waited < pool["template"]["spec"]["terminationGracePeriodSeconds"]
