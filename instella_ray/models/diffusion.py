"""The Bernoulli diffusion process over bits (section 2.2): noise, target, loss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Literal["flip", "x0"]
TimeDistribution = Literal["logit_normal", "uniform"]


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """``value [B]`` shaped to broadcast over the other axes of ``like [B, ...]``."""
    return value.view(-1, *[1] * (like.ndim - 1))


def timesteps(u: Tensor, kind: TimeDistribution = "logit_normal") -> Tensor:
    """Training times in (0, 1) of uniforms ``u``: sigmoid of a standard normal (Esser et al., 2024), or ``u`` itself."""
    u = u.clamp(1e-7, 1 - 1e-7)
    return u if kind == "uniform" else torch.special.ndtri(u).sigmoid()


def noise_probability(z: Tensor, t: Tensor) -> Tensor:
    """``P(z_t = 1) = 0.5 t + (1 - t) z`` for bits or probabilities ``z [B, L, K]`` at ``t [B]``."""
    t = per_row(t, z)
    return 0.5 * t + (1 - t) * z


def flip_noise(z: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """Noisy bits ``z_t ~ B(0.5 t + (1 - t) z)``, drawn with uniforms ``u`` of the same shape; float 0/1."""
    return (u < noise_probability(z, t)).to(z.dtype)


def x0_logits(out: Tensor, z_t: Tensor, target: Target = "flip") -> Tensor:
    """Logits of ``P(z = 1)`` from the network's output.

    ``flip``: the output is the logit that the bit was flipped, ``sigma(out) xor z_t``. ``x0``: it is the answer.
    """
    return torch.where(z_t > 0.5, -out, out) if target == "flip" else out


def diffusion_loss(out: Tensor, z_t: Tensor, z: Tensor, target: Target = "flip") -> Tensor:
    """Eq. 5: mean binary cross-entropy between ``sigma(out) xor z_t`` and the clean bits ``z [B, L, K]``."""
    return F.binary_cross_entropy_with_logits(x0_logits(out, z_t, target), z)


def ar_loss(out: Tensor, z: Tensor) -> Tensor:
    """Eq. 7: mean binary cross-entropy of each token's bits given the tokens before it, both ``[B, L, K]``."""
    return F.binary_cross_entropy_with_logits(out, z)


def bit_accuracy(logits: Tensor, z: Tensor) -> Tensor:
    """Share of right bits in each row, ``[B]``."""
    return ((logits > 0) == (z > 0.5)).float().flatten(1).mean(1)
