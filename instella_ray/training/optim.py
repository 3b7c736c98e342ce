"""Optimizers (AdamW, Muon), learning-rate schedule and EMA.

Muon orthogonalizes the momentum of each weight matrix, so that all singular directions are updated at the same rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .distributed import local
from .settings import OptimizerConfig


def lr_scale(step: int, steps: int, cfg: OptimizerConfig) -> float:
    """Return the factor on the peak learning rate at ``step`` (from 0) of ``steps``.

    Linear warm-up ``(k + 1) / (warmup + 1)``, then 1, then linear decay over the last ``decay_fraction`` of the run.
    """
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    if not cfg.decay_fraction:
        return warmup
    left = (1 - step / steps) / cfg.decay_fraction
    return warmup * min(1.0, left + 0.02)


class Optimizers:
    """One or two optimizers over disjoint parameters; every parameter group has its own peak learning rate."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = list(members)
        self.peaks = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimizers."""
        return [group for member in self.members for group in member.param_groups]

    def step(self, share: float) -> None:
        """Update the parameters with ``share`` times the peak learning rates, and clear the gradients."""
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * share
        for member in self.members:
            member.step()
            member.zero_grad(set_to_none=True)


def build_optimizers(model: nn.Module, cfg: OptimizerConfig, dtype: torch.dtype = torch.float32) -> Optimizers:
    """Build AdamW for all trainable parameters; with ``muon``, Muon for the matrices inside the blocks.

    ``dtype`` is that of Muon's matrix products.

    Weights of linear and convolutional layers decay, norms, biases, positions, learned tokens and the quantizer's vectors of
    bits do not: those are added or scale as they are, and decay would only draw them to zero.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in parameters.items() if cfg.name == "muon" and p.ndim == 2 and _is_inner(name)]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters.values() if id(p) not in taken]
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))}
    groups: list[dict[str, Any]] = [{"params": rest}]
    if cfg.weight_decay:
        groups = [
            {"params": [p for p in rest if (id(p) in decayed) == decays], "weight_decay": cfg.weight_decay * decays}
            for decays in (True, False)
        ]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, cfg.lr, betas=cfg.betas, eps=1e-8, weight_decay=0.0, fused=True)
    if not matrices:
        return Optimizers([adamw])
    return Optimizers([adamw, Muon(matrices, cfg.matrix_lr, weight_decay=cfg.weight_decay, dtype=dtype)])


def _is_inner(name: str) -> bool:
    """Return whether ``name`` is a matrix of an attention, feed-forward or text projection layer.

    Input layers of bits, pixels and timesteps are excluded.
    """
    return any(f".{part}." in name for part in ("attn", "ff", "mlp", "proj_cond"))


class EMA:
    """Exponential moving average of a model's weights by name; covers this rank's shard, and copies buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average after optimizer step ``step`` (from 0).

        The decay is at most ``(1 + step) / (10 + step)``, so that the initial weights are forgotten quickly.
        """
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

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Exchange the model's weights with their average during the block, one tensor at a time, and back exactly."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            mine, theirs = local(self.state[name]), local(value)
            before = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(before)


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, tuned for fast convergence to about 1 rather than exactly 1."""


class Muon(torch.optim.Optimizer):
    """Muon optimizer (Jordan et al., 2024): Nesterov momentum orthogonalized by Newton-Schulz iterations.

    ``W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) O``, with O approximately the nearest orthogonal matrix to the
    momentum.
    Matrices must not be sharded, because a shard has different singular values. The default is three iterations
    instead of the usual five: as accurate for matrices of the demo's size, and cheaper. ``dtype`` is that of the
    iterations' products.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        iterations: int = 3,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "iterations": iterations, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; matrices of the same shape are orthogonalized in one batch."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                directions = [self._nesterov(parameter, group["momentum"]) for parameter in parameters]
                updates = orthogonalize(torch.stack(directions), group["iterations"], self.dtype)
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return torch.lerp(parameter.grad, state["momentum"], momentum)


def orthogonalize(matrices: Tensor, iterations: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``matrices [N, R, C]`` with singular values near 1 and unchanged singular vectors; products in ``dtype``."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if tall else x
