"""Optimizers (AdamW, Muon), the learning-rate schedule and the moving average of the weights.

Muon is momentum whose matrices are made orthogonal, so that every direction of a weight learns at the same pace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import local
from .settings import OptimizerConfig


def lr_scale(step: int, steps: int, cfg: OptimizerConfig) -> float:
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


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; they drive singular values to about 1 quickly rather than to 1 exactly."""


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), for matrices inside a network.

    ``W <- W - lr sqrt(max(1, rows / columns)) O``, with O about the nearest orthogonal matrix to the Nesterov momentum.
    Matrices must be whole: a sharded one has other singular values. Three iterations, where five are usual, learn as
    well for matrices as small as the demo's and cost less.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, *, momentum: float = 0.95, iterations: int = 3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                directions = [self._nesterov(parameter, group["momentum"]) for parameter in parameters]
                updates = orthogonalize(torch.stack(directions), group["iterations"])
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return torch.lerp(parameter.grad, state["momentum"], momentum)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """``[N, R, C]`` with singular values near 1 and the singular vectors of the input."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
