"""Tensors of which every rank holds a part, and whole ones. All ranks call these together."""

from __future__ import annotations

from collections.abc import Mapping

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
