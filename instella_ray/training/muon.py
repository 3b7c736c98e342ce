"""Muon: momentum whose matrices are made orthogonal, so that every direction of a weight learns at the same pace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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
