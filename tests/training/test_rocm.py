"""Workers on AMD's GPUs, which are simulated: Ray is told of two, and asked what it lets each worker see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from instella_ray.training.ray_train import mirror_visible_devices

from ..kit.amd import pretend_two_mi300x
from ..kit.project import ROOT

RUN = """
import json, os, sys
import ray, ray.train.torch
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer
from instella_ray.training.ray_train import RocmTorchConfig

def worker(folder):
    rank = ray.train.get_context().get_world_rank()
    seen = {name: os.environ.get(name) for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")}
    # PyTorch finds no GPU here: the number is told by what Ray Train would ask on a machine with some.
    from ray.air._internal.device_manager.nvidia_gpu import CUDATorchDeviceManager
    seen |= {"device": str(CUDATorchDeviceManager().get_devices()[0]), "ids": ray.get_gpu_ids()}
    with open(f"{folder}/{rank}.json", "w") as stream:
        json.dump(seen, stream)

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
assert ray.cluster_resources()["GPU"] == 2, ray.cluster_resources()
TorchTrainer(
    worker,
    train_loop_config=sys.argv[1],
    torch_config=RocmTorchConfig(backend="gloo"),
    scaling_config=ScalingConfig(num_workers=2, use_gpu=True, resources_per_worker={"CPU": 0.5, "GPU": 1}),
    run_config=RunConfig(name="run", storage_path=sys.argv[1]),
).fit()
"""


@pytest.mark.nightly
@pytest.mark.ray
def test_workers_of_a_node_see_each_others_gpus_and_take_their_own(tmp_path: Path) -> None:
    pretend_two_mi300x(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    # A Ray of its own, whose node is told of AMD's GPUs when it starts.
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(out)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    seen = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(own["HIP_VISIBLE_DEVICES"], own["CUDA_VISIBLE_DEVICES"]) for own in seen] == [("0,1", "0,1")] * 2
    assert sorted(own["device"] for own in seen) == ["cuda:0", "cuda:1"]
    assert [own["device"] for own in seen] == [f"cuda:{own['ids'][0]}" for own in seen]


def test_devices_are_mirrored_only_where_hip_goes_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    mirror_visible_devices()
    assert "HIP_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    mirror_visible_devices()
    assert os.environ["HIP_VISIBLE_DEVICES"] == "0,1"
