"""The programs that read ``cluster/``, where this machine has them, and what ``kubectl kustomize`` makes of a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from .project import ROOT

Object = dict[str, Any]


class KubernetesError(Exception):
    """What a program prints when it refuses its input."""


def program(name: str) -> str:
    """The path of a program: that of the variable ``KUBECTL`` (or ``HELM`` ...), the PATH's, or that of ``.ci/tools.sh``.

    A test that needs one is skipped where there is none.
    """
    places = [os.environ.get(name.upper().replace("-", "_")), shutil.which(name), shutil.which(ROOT / ".tools" / name)]
    found = next((place for place in places if place), None)
    if found is None:
        pytest.skip(f"no {name} here: bash .ci/tools.sh fetches it")
    return found


def run(name: str, *arguments: str | Path, given: str | None = None) -> str:
    """What a program prints; KubernetesError if it fails. It sees no cluster that this machine's user may have."""
    environment = {**os.environ, "KUBECONFIG": os.devnull}
    command = [program(name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, input=given)
    if done.returncode:
        raise KubernetesError(done.stderr + done.stdout)
    return done.stdout


@cache
def _built(folder: Path) -> str:
    return run("kubectl", "kustomize", folder)


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization."""
    return load_documents(_built(folder))


def build_with(overlay: Path, components: list[Path], scratch: Path) -> list[Object]:
    """The objects of an overlay of one's own in ``scratch``: another one, and components on top of it."""
    settings = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(overlay, scratch.resolve())],
        "components": [os.path.relpath(component, scratch.resolve()) for component in components],
    }
    (scratch / "kustomization.yaml").write_text(yaml.safe_dump(settings))
    return load_documents(run("kubectl", "kustomize", scratch))


def load_documents(text: str) -> list[Any]:
    """YAML documents, empty ones left out."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document is not None]


def walk(node: Any, visit: Callable[[Object], None]) -> None:
    """Call ``visit`` for every mapping within ``node``, itself included."""
    if isinstance(node, dict):
        visit(node)
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        walk(item, visit)
