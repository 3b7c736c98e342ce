"""The processes that train a run together, whatever has started them, and tensors spread over them.

All ranks call these together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 and 1 where there is no process group."""
    distributed = torch.distributed
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU at rank 0, one after another; nothing on the other ranks."""
    found, first = {}, ranks()[0] == 0
    for name, tensor in state.items():
        value = whole(tensor.detach())
        if first:
            found[name] = value.cpu()
    return found


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every rank has whole, laid out, placed and typed as ``like``."""
    value = value.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


@torch.no_grad()
def fill(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite each rank's part of ``state`` with that of the whole tensors of the same names."""
    for name, tensor in state.items():
        local(tensor).copy_(local(part_of(values[name], tensor)))


@torch.no_grad()
def broadcast(model: nn.Module) -> None:
    """Everyone gets rank 0's weights and buffers."""
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor, 0)


T = TypeVar("T", bound=int | str)


class Workers(Protocol):
    """The processes of a run as one of them sees them; all of them call each method together.

    Rank and number of ranks are those of PyTorch's process group, see :func:`.shards.ranks`.
    """

    @property
    def device(self) -> torch.device:
        """What this process computes with."""

    @property
    def local_rank(self) -> int:
        """This process's number among those of its node."""

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""

    def barrier(self) -> None:
        """Wait until all are here."""

    def nodes_to_go(self) -> Collection[str] | None:
        """Their nodes that are about to be taken away; None while there is no notice of any."""


class Alone:
    """One process that trains a run by itself on ``device``."""

    local_rank = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def nodes_to_go(self) -> None:
        return None
