"""Process groups and sharded tensors, independent of the launcher.

All functions are collective: all ranks call them together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .interrupts import StopRequest


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; 0 and 1 without a process group."""
    distributed = torch.distributed
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of ``tensor``, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the unsharded ``tensor`` on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather unsharded tensors on rank 0's CPU, one at a time; returns an empty dict on other ranks."""
    found, first = {}, ranks()[0] == 0
    for name, tensor in state.items():
        value = whole(tensor.detach())
        if first:
            found[name] = value.cpu()
    return found


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value``, unsharded on every rank, with the device, dtype and sharding of ``like``."""
    value = value.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


@torch.no_grad()
def fill(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite each rank's shards in ``state`` from the unsharded ``values`` of the same names."""
    for name, tensor in state.items():
        local(tensor).copy_(local(part_of(values[name], tensor)))


@torch.no_grad()
def broadcast(model: nn.Module) -> None:
    """Broadcast rank 0's parameters and buffers to all ranks."""
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor, 0)


T = TypeVar("T", bound=int | str)


class Workers(Protocol):
    """Interface of a worker to its worker group; all methods are collective.

    Rank and number of ranks are those of PyTorch's process group, see :func:`ranks`.
    """

    poll_interval: float
    """Seconds between two checks of :meth:`nodes_to_preempt` and :meth:`stop_requested`; 0 checks after every step."""

    @property
    def device(self) -> torch.device:
        """Compute device of this process."""

    @property
    def local_rank(self) -> int:
        """Rank of this process within its node."""

    def broadcast(self, value: T) -> T:
        """Return rank 0's ``value`` on every rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def nodes_to_preempt(self) -> Collection[str] | None:
        """Return ids of the group's nodes that are about to be preempted; None without a notice."""

    def stop_requested(self) -> bool:
        """Return whether the run was asked to stop; rank 0's answer counts."""


class SingleProcess:
    """Worker group of a single process on ``device``, which ``stop`` may ask to stop."""

    local_rank = 0
    poll_interval = 0.0

    def __init__(self, device: torch.device, stop: StopRequest | None = None) -> None:
        self.device, self.stop = device, stop

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        """Return immediately: there is only one rank."""

    def nodes_to_preempt(self) -> None:
        return None

    def stop_requested(self) -> bool:
        return self.stop is not None and self.stop.made
