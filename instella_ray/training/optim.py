"""Learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .muon import Muon
from .settings import OptimizerConfig
from .shards import local


def rate_share(step: int, steps: int, cfg: OptimizerConfig) -> float:
    """Share of the peak rate at ``step`` (from 0) of ``steps``: ``(k + 1) / (warmup + 1)``, then 1, then a linear fall."""
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    if not cfg.decay_fraction:
        return warmup
    left = (1 - step / steps) / cfg.decay_fraction
    return warmup * min(1.0, left + 0.02)


class Optimizers:
    """One optimizer, or two that share the weights between them; every group has its own peak rate."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = list(members)
        self.peaks = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all members."""
        return [group for member in self.members for group in member.param_groups]

    def step(self, share: float) -> None:
        """Update with ``share`` of the peak rates, and drop the gradients."""
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * share
        for member in self.members:
            member.step()
            member.zero_grad(set_to_none=True)


def build_optimizers(model: nn.Module, cfg: OptimizerConfig) -> Optimizers:
    """AdamW for all that learns; with ``muon``, Muon for the matrices inside the blocks."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in parameters.items() if cfg.name == "muon" and p.ndim == 2 and _is_inner(name)]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters.values() if id(p) not in taken]
    adamw = torch.optim.AdamW(rest, cfg.lr, betas=cfg.betas, eps=1e-8, weight_decay=cfg.weight_decay, fused=True)
    return Optimizers([adamw, Muon(matrices, cfg.matrix_lr)] if matrices else [adamw])


def _is_inner(name: str) -> bool:
    """Matrices between features: attention, feed-forward, text projections. Not those that read bits, pixels or time."""
    return any(f".{part}." in name for part in ("attn", "ff", "mlp", "proj_cond"))


class EMA:
    """Exponential moving average of a model's weights, by name, of as much as this rank holds; buffers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimizer step ``step`` (from 0). Early steps use a smaller decay, to forget the start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        parameters = dict(model.named_parameters())
        for name, value in model.state_dict().items():
            if name in parameters:
                averaged.append(local(self.state[name]))
                current.append(local(value))
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averaged, current, 1 - decay)
