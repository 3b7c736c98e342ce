"""Ray Train on AMD's GPUs: workers of one node see each other's, under the variable that HIP goes by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


def mirror_visible_devices() -> None:
    """Let HIP see the devices that Ray Train shares among a node's workers.

    Ray gives each worker on an AMD node its own GPU in HIP_VISIBLE_DEVICES, Ray Train sets CUDA_VISIBLE_DEVICES to all of
    the node's alone, and HIP ignores that where both are set: the second worker would ask for a device that it cannot see.
    """
    if HIP in os.environ and CUDA in os.environ:
        os.environ[HIP] = os.environ[CUDA]


class RocmTorchBackend(_TorchBackend):
    """The process group of PyTorch, begun when the workers' devices are visible to HIP."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(mirror_visible_devices)
        super().on_start(worker_group, backend_config)


@dataclass
class RocmTorchConfig(TorchConfig):
    """For every run: without AMD's GPUs nothing is mirrored."""

    @property
    def backend_cls(self) -> type[RocmTorchBackend]:
        return RocmTorchBackend
