"""Learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .settings import OptimizerConfig


def learning_rate(step: int, steps: int, cfg: OptimizerConfig) -> float:
    """Rate at ``step`` (from 0) of ``steps``: ``lr (k + 1) / (warmup + 1)``, then constant, then a linear fall."""
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    if not cfg.decay_fraction:
        return cfg.lr * warmup
    left = (1 - step / steps) / cfg.decay_fraction
    return cfg.lr * warmup * min(1.0, left + 0.02)


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, cfg.lr, betas=cfg.betas, eps=1e-8, weight_decay=cfg.weight_decay, fused=True)


class EMA:
    """Exponential moving average of a model's weights, by name; buffers are copied."""

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
                averaged.append(self.state[name])
                current.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averaged, current, 1 - decay)
