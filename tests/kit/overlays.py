"""What the overlays of ``cluster/kuberay`` build, sorted for tests."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

from .kubernetes import Object, build
from .project import ROOT

FOLDER = ROOT / "cluster" / "kuberay"
OVERLAYS = ("mi300x", "nvidia", "kind")
GPUS = {"mi300x": "amd.com/gpu", "nvidia": "nvidia.com/gpu", "kind": None}


def applied(overlay: str) -> list[Object]:
    """What ``kubectl apply`` is given."""
    return build(FOLDER / "overlays" / overlay)


def created(overlay: str) -> list[Object]:
    """What ``kubectl create`` starts jobs from."""
    return build(FOLDER / "overlays" / overlay / "jobs")


@cache
def objects(overlay: str) -> tuple[Object, ...]:
    return (*applied(overlay), *created(overlay))


def options(overlay: str) -> list[str]:
    """The components that an overlay, or its jobs, names in a comment."""
    text = (FOLDER / "overlays" / overlay / "kustomization.yaml").read_text()
    text += (FOLDER / "overlays" / overlay / "jobs" / "kustomization.yaml").read_text()
    return re.findall(r"^# - (?:\.\./)+components/(\S+)$", text, re.M)


def with_options(overlay: str, chosen: set[str], scratch: Path) -> list[Object]:
    """What a site makes of an overlay and its jobs, in a copy: ``site.env`` filled in, the comments of options lifted."""
    copied = scratch / "kuberay"
    shutil.copytree(FOLDER, copied)
    site = copied / "components" / "site" / "site.env"
    site.write_text(re.sub(r"(?<==)\S+", lambda value: value[0].lower(), site.read_text()))
    folders = [copied / "overlays" / overlay, copied / "overlays" / overlay / "jobs"]
    for path in [folder / "kustomization.yaml" for folder in folders]:
        lifted = re.sub(rf"^# (- (?:\.\./)+components/(?:{'|'.join(chosen)}))$", r"\1", path.read_text(), flags=re.M)
        path.write_text(lifted)
    return [target for folder in folders for target in build(folder)]


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
