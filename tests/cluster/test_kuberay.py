"""``cluster/kuberay``: every overlay builds, every object in it is valid, and its jobs are commands that exist."""

from __future__ import annotations

import copy
import random
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.errors import UserError

from ..commands import check_job
from ..test_repository import ROOT, tracked
from .kustomize import KustomizeError, Object, build, load_documents, walk
from .manifests import as_text, check_object, crd_validator, serve_args

FOLDER = ROOT / "cluster" / "kuberay"
OVERLAYS = ("mi300x", "nvidia", "kind")
GPUS = {"mi300x": "amd.com/gpu", "nvidia": "nvidia.com/gpu", "kind": None}
REFUSED = (
    pydantic.ValidationError,
    kubernetes_validate.ValidationError,
    kubernetes_validate.InvalidSchemaError,
    UserError,
    AssertionError,
)


@cache
def objects(overlay: str) -> tuple[Object, ...]:
    return tuple(build(FOLDER / "overlays" / overlay))


def of_kind(overlay: str, kind: str) -> dict[str, Object]:
    return {target["metadata"]["name"]: target for target in objects(overlay) if target["kind"] == kind}


def clusters(overlay: str) -> dict[str, Object]:
    """The RayCluster spec of everything that has one."""
    found = {name: target["spec"] for name, target in of_kind(overlay, "RayCluster").items()}
    found |= {name: target["spec"]["rayClusterSpec"] for name, target in of_kind(overlay, "RayJob").items()}
    return found | {n: target["spec"]["rayClusterConfig"] for n, target in of_kind(overlay, "RayService").items()}


def templates(overlay: str) -> list[Object]:
    return [
        group["template"]
        for cluster in clusters(overlay).values()
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


# --- validity


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid_without_a_key_that_nobody_reads(overlay: str) -> None:
    for target in objects(overlay):
        check_object(target)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_takes_its_objects_as_they_are(overlay: str, shared_dir: Path) -> None:
    for target in objects(overlay):
        if target["apiVersion"] == "ray.io/v1":
            crd_validator(shared_dir / "kuberay_crds", target["kind"]).validate(target)


def misspelt(target: Object, seed: int) -> tuple[str, Object]:
    """A copy of ``target`` with one key of those that a schema knows spelt in another way, and that key."""
    target, places = copy.deepcopy(target), list[Object]()
    free = (
        "models",
        "labels",
        "matchLabels",
        "annotations",
        "data",
        "rayStartParams",
        "requests",
        "limits",
        "metadata",
    )

    def visit(node: Any, key: str = "") -> None:
        if isinstance(node, dict) and node and key not in free:
            places.append(node)
        for name, item in node.items() if isinstance(node, dict) else ((key, item) for item in node):
            if isinstance(item, dict | list):
                visit(item, name)

    visit(target)
    draw = random.Random(seed)
    place = draw.choice(places)
    key = draw.choice(sorted(place))
    at = draw.randrange(len(key))
    place[key[:at] + "q" + key[at:]] = place.pop(key)
    return key, target


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OVERLAYS), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_misspelt_key_at_any_depth_is_refused(overlay: str, which: int, seed: int) -> None:
    built = objects(overlay)
    key, target = misspelt(built[which % len(built)], seed)
    with pytest.raises(REFUSED):
        check_object(target)
        pytest.fail(f"{key} of {target.get('kind')} may be misspelt")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_a_misspelt_key_of_the_serve_configuration_is_refused(seed: int) -> None:
    service = copy.deepcopy(of_kind("mi300x", "RayService")["endpoint"])
    key, changed = misspelt(yaml.safe_load(service["spec"]["serveConfigV2"]), seed)
    service["spec"]["serveConfigV2"] = yaml.safe_dump(changed)
    with pytest.raises((*REFUSED, KeyError)):
        check_object(service)
        pytest.fail(f"{key} may be misspelt")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_kuberays_schema_refuses_misspelt_keys_too(shared_dir: Path, which: int, seed: int) -> None:
    built = [target for target in objects("mi300x") if target["apiVersion"] == "ray.io/v1"]
    original = built[which % len(built)]
    _, target = misspelt({"spec": original["spec"]}, seed)
    with pytest.raises(jsonschema.ValidationError):
        if "spec" not in target:
            raise jsonschema.ValidationError("spec")
        crd_validator(shared_dir / "kuberay_crds", original["kind"]).validate({**original, **target})


# --- no copies


def test_overlays_hold_patches_and_no_object_of_their_own() -> None:
    names = {path.name for path in (FOLDER / "overlays").rglob("*") if path.is_file()}
    assert names == {"kustomization.yaml"}
    for path in (FOLDER / "overlays").glob("*/kustomization.yaml"):
        (settings_of,) = load_documents(path.read_text())
        assert settings_of["resources"] == ["../../base"]


def test_the_gpu_overlays_differ_in_the_accelerator_alone() -> None:
    amd, nvidia = (as_text(objects(name)) for name in ("mi300x", "nvidia"))
    amd = amd.replace(', "supplementalGroups": [44, 109]', "")
    assert amd.replace("amd.com/gpu", "nvidia.com/gpu").replace("TAG-rocm", "TAG-cuda") == nvidia


def test_every_file_is_part_of_some_overlay() -> None:
    used: set[Path] = set()

    def collect(folder: Path) -> None:
        path = folder / "kustomization.yaml"
        used.add(path)
        (found,) = load_documents(path.read_text())
        names = [*found.get("resources", []), *found.get("components", [])]
        names += [patch["path"] for patch in found.get("patches", []) if "path" in patch]
        for name in names:
            here = (folder / name).resolve()
            collect(here) if here.is_dir() else used.add(here)

    for overlay in OVERLAYS:
        collect(FOLDER / "overlays" / overlay)
    assert {path for path in tracked() if path.is_relative_to(FOLDER)} == used


def test_what_kustomize_does_not_know_is_an_error(tmp_path: Path) -> None:
    head = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {x: y}\n")
    patch = "resources: [a.yaml]\npatches: [{target: {kind: ConfigMap}, patch: '[%s]'}]\n"
    for text, message in {
        "resource: [a.yaml]\n": "resource",
        "resources: [../a.yaml]\n": "outside",
        "resources: [a.yaml, a.yaml]\n": "more than once",
        "resources: [a.yaml]\npatches: [{target: {kind: Secret}, patch: '[]'}]\n": "finds nothing",
        patch % "{op: replace, path: /data/z, value: 1}": "nothing at /data/z",
        patch % "{op: test, path: /data/x, value: 1}": "test: not known",
        "resources: [a.yaml]\nimages: [{name: b, newName: c, newTag: d}]\n": "no container",
    }.items():
        (tmp_path / "kustomization.yaml").write_text(head + text)
        with pytest.raises(KustomizeError, match=message):
            build(tmp_path)


# --- what they promise


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_stage_is_a_command_that_its_job_reads(overlay: str) -> None:
    paths = of_kind(overlay, "ConfigMap")["paths"]["data"]
    for name, job in of_kind(overlay, "RayJob").items():
        commands = job["spec"]["entrypoint"].split(" || ")
        configs = [check_job(shlex.split(command), paths) for command in commands]
        assert [command.split()[1] for command in commands] == [f"jobs/{name.replace('-', '_')}.py"] * len(commands)
        assert resumes(configs), f"{name}: a second attempt would be refused"
        assert not re.search(r"MODEL_FOLDER|_FOLDER\b", as_text([c.model_dump(mode="json") for c in configs]))


def resumes(configs: list[Any]) -> bool:
    """Whether a command goes on with the output of an earlier attempt: by its mode, or its second half does."""
    if hasattr(configs[0], "train"):
        first, second = (config.model_dump(mode="json") for config in configs)
        resume = [config["train"].pop("resume") for config in (first, second)]
        return first == second and resume == [False, True]
    (config,) = configs
    return getattr(config, "sample", config).mode == "resume"


def test_there_is_a_job_for_every_stage_of_the_house() -> None:
    stages = {path.stem.replace("_", "-") for path in (ROOT / "jobs").glob("*.py")}
    apart = {"bench", "serve", "submit"}  # for one machine; a RayService; the way to a cluster that runs
    assert stages - apart == set(of_kind("mi300x", "RayJob")) == set(of_kind("nvidia", "RayJob"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_starts_by_being_applied_but_the_head_and_the_endpoint(overlay: str) -> None:
    assert all(job["spec"]["suspend"] for job in of_kind(overlay, "RayJob").values())
    (development,) = of_kind(overlay, "RayCluster").values()
    assert [pool["replicas"] for pool in development["spec"]["workerGroupSpecs"]] == [0, 0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_claim_the_nodes_gpus_and_no_other_resource_of_that_kind(overlay: str) -> None:
    for name, cluster in clusters(overlay).items():
        for pool in cluster["workerGroupSpecs"]:
            limits = pool["template"]["spec"]["containers"][0]["resources"]["limits"]
            gpus = {key: value for key, value in limits.items() if key.endswith("gpu")}
            expected = {GPUS[overlay]: "8"} if pool["groupName"] == "gpu" and GPUS[overlay] else {}
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
        worker = template["metadata"]["labels"]["instella-ray/role"] == "worker"
        assert pod.get("automountServiceAccountToken") is (False if worker else None)
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
        assert cluster["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_that_objects_give_each_other_exist(overlay: str) -> None:
    for template in templates(overlay):
        pod, (container,) = template["spec"], template["spec"]["containers"]
        assert pod["serviceAccountName"] in of_kind(overlay, "ServiceAccount")
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        for source in container["envFrom"]:
            assert source["configMapRef"]["name"] in of_kind(overlay, "ConfigMap")
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
    for budget in of_kind(overlay, "PodDisruptionBudget").values():
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        matches = [group for group in groups if wanted <= group["template"]["metadata"]["labels"].items()]
        assert len(matches) == 1


@pytest.mark.parametrize("overlay", ["mi300x", "nvidia"])
def test_the_endpoints_largest_size_fits_its_largest_pool(overlay: str) -> None:
    service = of_kind(overlay, "RayService")["endpoint"]
    args, (pool,) = serve_args(service), service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    stages = [args.text, args.decoder, *args.models.values()]
    container = pool["template"]["spec"]["containers"][0]
    assert sum(s.most_replicas * args.gpus(s) for s in stages) <= 8 * pool["maxReplicas"]
    assert sum(s.most_replicas * args.cpus(s) for s in stages) <= 88 * pool["maxReplicas"]
    assert container["resources"]["limits"]["cpu"] == "88"


@pytest.mark.parametrize("overlay", ["mi300x", "nvidia"])
def test_training_finds_its_workers_places_when_it_starts(overlay: str) -> None:
    """A run that asks for more than is there is refused at once, so the pool must not start smaller."""
    paths = of_kind(overlay, "ConfigMap")["paths"]["data"]
    for name in ("train-tokenizer", "train-generator"):
        spec = of_kind(overlay, "RayJob")[name]["spec"]
        config = check_job(shlex.split(spec["entrypoint"].split(" || ")[0]), paths)
        (pool,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        workers = config.train.workers
        assert workers.gpu and workers.count <= 8 * pool["minReplicas"]
        limits = pool["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert workers.count * workers.cpus <= int(limits["cpu"]) * pool["minReplicas"]
