"""Bernoulli diffusion process over bits (section 2.2): noise, prediction target and losses, also of AR (Eq. 7)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Literal["flip", "x0"]
TimeDistribution = Literal["logit_normal", "uniform"]


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """Reshape ``value [B]`` to broadcast over ``like [B, ...]``."""
    return value.view(-1, *[1] * (like.ndim - 1))


def timesteps(u: Tensor, kind: TimeDistribution = "logit_normal", shift: float = 1.0) -> Tensor:
    """Map uniforms ``u`` to training timesteps in (0, 1): sigmoid of a standard normal (Esser et al., 2024), or ``u``.

    A ``shift`` above 1 moves them towards noise, ``t -> shift t / (1 + (shift - 1) t)`` (Eq. 23 there).
    """
    u = u.clamp(1e-7, 1 - 1e-7)
    t = u if kind == "uniform" else torch.special.ndtri(u).sigmoid()
    return shift * t / (1 + (shift - 1) * t)


def noise_probability(z: Tensor, t: Tensor) -> Tensor:
    """Return ``P(z_t = 1) = 0.5 t + (1 - t) z`` for bits or probabilities ``z [B, L, K]`` at timesteps ``t [B]``."""
    t = per_row(t, z)
    return 0.5 * t + (1 - t) * z


def flip_noise(z: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """Sample noisy bits ``z_t ~ B(0.5 t + (1 - t) z)`` with uniforms ``u`` of the same shape; returns float 0/1."""
    return (u < noise_probability(z, t)).to(z.dtype)


def x0_logits(out: Tensor, z_t: Tensor, target: Target = "flip") -> Tensor:
    """Return the logits of ``P(z = 1)`` from the network's output.

    ``flip``: the output is the logit that the bit was flipped, ``sigma(out) xor z_t``. ``x0``: it is returned unchanged.
    """
    return torch.where(z_t > 0.5, -out, out) if target == "flip" else out


def x0_probability(probability: Tensor, z_t: Tensor, target: Target = "flip") -> Tensor:
    """Return ``P(z = 1)`` from the probability of the network's target, given the noisy bits ``z_t``."""
    return z_t * (1 - probability) + (1 - z_t) * probability if target == "flip" else probability


def diffusion_loss(out: Tensor, z_t: Tensor, z: Tensor, target: Target = "flip") -> Tensor:
    """Return the mean binary cross-entropy between the predicted and the clean bits ``z [B, L, K]`` (Eq. 5)."""
    return F.binary_cross_entropy_with_logits(x0_logits(out, z_t, target).float(), z)


def ar_loss(out: Tensor, z: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of logits ``out`` and bits ``z``, both ``[B, L, K]`` (Eq. 7)."""
    return F.binary_cross_entropy_with_logits(out.float(), z)


def bit_accuracy(logits: Tensor, z: Tensor) -> Tensor:
    """Return the fraction of correct bits in each row, ``[B]``."""
    return ((logits > 0) == (z > 0.5)).float().flatten(1).mean(1)
