"""What the overlays of ``cluster/kuberay`` build, sorted for tests."""

from __future__ import annotations

from functools import cache

from .kubernetes import Object, build
from .project import ROOT

FOLDER = ROOT / "cluster" / "kuberay"
OVERLAYS = ("mi300x", "nvidia", "kind")
GPUS = {"mi300x": "amd.com/gpu", "nvidia": "nvidia.com/gpu", "kind": None}


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
