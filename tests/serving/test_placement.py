"""Stages that share GPUs by fractions: where Ray puts their replicas is where the plan says that they fit.

Each test has a Ray of its own, which knows of GPUs that the one of the other tests does not have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from instella_ray.errors import UserError
from instella_ray.planning.endpoint import plan_endpoint
from instella_ray.planning.plan import PlanOptions
from instella_ray.serving.local import build_local

from ..kit import placement
from ..kit.amd import pretend_two_mi300x
from ..kit.endpoint import KINDS, serve_args
from ..kit.project import ROOT

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU here")


def placed(folder: Path, how: str) -> dict[str, Any]:
    """What the replicas of :func:`.placement.shared_args` have seen."""
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", *placement.VISIBLE)}
    env["PYTHONPATH"] = f"{folder}:{ROOT}"
    command = [sys.executable, "-m", placement.__name__, str(folder), how]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


def check_placed(found: dict[str, Any], variable: str, folder: Path) -> None:
    """Every replica sees one GPU, and each GPU has the replicas that the plan put together."""
    (other,) = set(placement.VISIBLE) - {variable}
    replicas = [(name, seen) for name, each in found["replicas"].items() for seen in each]
    assert all(seen[variable] == seen["ids"][0] and len(seen["ids"]) == 1 and not seen[other] for _, seen in replicas)
    folders = {name: str(folder / name) for name in ("bit", *KINDS)}
    plan = plan_endpoint(placement.shared_args(folders), PlanOptions())
    gpus = [Counter(name for name, seen in replicas if seen["ids"] == [number]) for number in ("0", "1")]
    assert sorted(gpus, key=len) == sorted(plan.least, key=len) and plan.least == plan.most
    assert found["images"] == 3


@pytest.mark.ray
@pytest.mark.nightly
def test_replicas_share_gpus_as_planned(tmp_path: Path) -> None:
    check_placed(placed(tmp_path, "told"), "CUDA_VISIBLE_DEVICES", tmp_path)


@pytest.mark.ray
@pytest.mark.nightly
@without_gpu
def test_replicas_share_amds_gpus_as_planned_and_refuse_to_start_without_them(tmp_path: Path) -> None:
    pretend_two_mi300x(tmp_path)
    found = placed(tmp_path, "found")
    check_placed(found, "HIP_VISIBLE_DEVICES", tmp_path)
    stage, _, reason = found["refusal"].partition(": ")
    assert stage in found["replicas"] and reason == "device 'cuda': PyTorch sees no GPU on this machine"


@without_gpu
def test_a_stage_with_a_share_of_a_gpu_never_computes_on_the_cpu_unnoticed(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match="device 'cuda': PyTorch sees no GPU on this machine"):
        build_local(serve_args(folders, decoder={"num_gpus": 0.5}))
