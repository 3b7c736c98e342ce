"""Loss modules of generator training: diffusion (Eq. 5) and AR (Eq. 7), with bit accuracy by timestep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import rng
from ..models.diffusion import TimeDistribution, ar_loss, bit_accuracy, diffusion_loss, flip_noise, timesteps, x0_logits
from ..models.generator import ARGenerator, DiffusionGenerator

TIME_BINS = 5
"""Number of timestep bins for logged bit accuracy: t0 is nearly clean, t4 nearly pure noise."""
BY_TIME = "accuracy_by_time"
TIME_NAMES = (*(f"bit_accuracy_t{i}" for i in range(TIME_BINS)), "bit_accuracy_noisy")
"""Names of the bit accuracies by timestep."""


class DiffusionLoss(nn.Module):
    """Diffusion loss (Eq. 5) of one micro-batch at timesteps drawn from ``times``, shifted by ``shift``."""

    def __init__(self, model: DiffusionGenerator, times: TimeDistribution = "logit_normal", shift: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.times: TimeDistribution = times
        self.shift = shift

    def forward(self, codes: Tensor, features: Tensor, mask: Tensor, seeds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts for ``codes [B, L, K]`` 0/1 and text ``features [layers, B, T, W]``.

        ``mask`` bool ``[B, T]`` is true at real tokens; ``seeds [B]`` determine each sample's timestep and noise.
        """
        t, u = noise(seeds, codes.shape[1], codes.shape[2], self.times, self.shift)
        z_t, target = flip_noise(codes, t, u), self.model.cfg.target
        out = self.model(z_t, t, self.model.text_kv(features, mask))
        accuracy = bit_accuracy(x0_logits(out, z_t, target), codes)
        facts = {"bit_accuracy": accuracy.mean(), BY_TIME: accuracy_by_time(accuracy, t)}
        return diffusion_loss(out, z_t, codes, target), facts


def noise(seeds: Tensor, tokens: int, bits: int, times: TimeDistribution, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw timesteps ``[B]`` and uniforms ``[B, tokens, bits]`` from ``seeds [B]``."""
    first = torch.zeros_like(seeds)
    t = timesteps(rng.uniforms(seeds, first, 1, 1, stream=rng.TRAINING)[:, 0, 0], times, shift)
    return t, rng.uniforms(seeds, first + 1, tokens, bits, stream=rng.TRAINING)


def accuracy_by_time(accuracy: Tensor, t: Tensor) -> Tensor:
    """Return sums and counts ``[2, TIME_BINS + 1]`` of ``accuracy [B]`` in equal bins of ``t [B]``, and for t > 0.5.

    Sums rather than means, because micro-batches and ranks have different numbers of samples in a bin.
    """
    place = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    bins = place[:, None] == torch.arange(TIME_BINS, device=t.device)
    member = torch.cat((bins, (t > 0.5)[:, None]), dim=1).float()
    # Not a matrix product: autocast would round the counts to bfloat16.
    return torch.stack(((accuracy[:, None] * member).sum(0), member.sum(0)))


def accuracy_summary(sums: Tensor) -> dict[str, Tensor]:
    """Return ``bit_accuracy_t0``.. and ``bit_accuracy_noisy`` from sums or means of :func:`accuracy_by_time`.

    Bins without samples are omitted.
    """
    total, count = sums.cpu()
    return {name: total[i] / count[i] for i, name in enumerate(TIME_NAMES) if count[i] > 0}


class ARLoss(nn.Module):
    """AR loss (Eq. 7) of one micro-batch: all tokens at once under the causal mask."""

    def __init__(self, model: ARGenerator) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor, features: Tensor, mask: Tensor, seeds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts; arguments as :class:`DiffusionLoss`, with ``seeds`` unused."""
        out = self.model(codes[:, :-1], self.model.text_kv(features, mask), codes)
        return ar_loss(out, codes), {"bit_accuracy": bit_accuracy(out, codes).mean()}
