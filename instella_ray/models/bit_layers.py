"""Layers of the tokenizer: transformer block, 2x2 resampling, pixel heads and binary quantizer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, RMSNorm, SwiGLU
from .rope import RopeStyle, apply_rope


class BITBlock(nn.Module):
    """Pre-norm transformer block: self-attention over [latent; image] tokens, then SwiGLU."""

    def __init__(self, width: int, heads: int, rope: RopeStyle) -> None:
        super().__init__()
        self.rope: RopeStyle = rope
        self.input_layernorm = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = SwiGLU(width, 4 * width)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        y = self.input_layernorm(x)
        k, v = self.attn.key_value(y)
        q = apply_rope(self.attn.query(y), table, self.rope)
        x = x + self.attn.attend(q, apply_rope(k, table, self.rope), v)
        return x + self.mlp(self.post_attention_layernorm(x))


class LinearDown(nn.Module):
    """Linear 2x2 merge (Eq. 2): the concatenated tokens of a cell through one linear map.

    ``[B,d,H,W] -> [B,d,H/2,W/2]``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.pixel_unshuffle(x, 2).movedim(1, -1)).movedim(-1, 1)


class LinearUp(nn.Module):
    """Linear 2x2 expansion (Eq. 3): a token expanded to 4 d channels and split into a cell.

    ``[B,d,H,W] -> [B,d,2H,2W]``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.linear(x.movedim(1, -1)).movedim(-1, 1), 2)


class ConvDown(nn.Module):
    """Published 2x2 merge: a strided 3x3 convolution plus an average-pooling shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.avg_pool2d(x, 2)


class ConvUp(nn.Module):
    """Published 2x2 expansion: 3x3 convolution and pixel shuffle plus a nearest-neighbour shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(x, scale_factor=2, mode="nearest")


DOWN = {"linear": LinearDown, "conv": ConvDown}
UP = {"linear": LinearUp, "conv": ConvUp}


class LinearPixelHead(nn.Linear):
    """Linear map from a token to its patch; the output vector is laid out as (row, column, channel)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(width, patch * patch * 3)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, d, H, W]`` to pixels ``[B, 3, H * patch, W * patch]``."""
        y = super().forward(x.movedim(1, -1)).unflatten(-1, (self.patch, self.patch, 3))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class ConvPixelHead(nn.Sequential):
    """Light convolutional decoder: (transposed convolution, norm, ReLU) per doubling, then a 3x3 convolution.

    The paper reports that it is clearly better than the linear head on text and faces.
    """

    def __init__(self, width: int, patch: int) -> None:
        layers: list[nn.Module] = []
        channels = width
        for _ in range(int(math.log2(patch))):
            narrower = max(channels // 2, 16)
            layers += [
                nn.ConvTranspose2d(channels, narrower, 4, stride=2, padding=1),
                nn.GroupNorm(math.gcd(8, narrower), narrower),
                nn.ReLU(),
            ]
            channels = narrower
        super().__init__(*layers, nn.Conv2d(channels, 3, 3, padding=1))


PIXEL_HEADS = {"linear": LinearPixelHead, "conv": ConvPixelHead}


class BinaryQuantizer(nn.Module):
    """Binary quantizer (Eq. 4).

    ``codes ~ Bernoulli(sigmoid(R(z) / tau))`` in training, ``sigmoid(R(z)) > 0.5`` otherwise (tau = 0). ``embed [K, d]``
    maps bits back to vectors: a token is the sum of the rows of its set bits.
    """

    def __init__(self, width: int, bits: int, *, normalized_tokens: int | None = None) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, bits))
        self.embed = nn.Parameter(torch.randn(bits, width) * 0.02)
        self.norm = nn.BatchNorm1d(normalized_tokens * bits, affine=False, momentum=0.05) if normalized_tokens else None

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits, float32 ``[B, L, K]``, of encoder tokens ``[B, L, width]``."""
        logits = self.proj(tokens)
        if self.norm is not None:
            statistics = self.norm.running_mean
            assert statistics is not None
            logits = self.norm(logits.flatten(1).to(statistics.dtype)).view_as(logits)
        return logits.float()

    def quantize(self, logits: Tensor, temperature: float, u: Tensor | None = None) -> Tensor:
        """Quantize ``logits [B, L, K]`` to bits, float32 0/1, with the straight-through gradient of ``sigmoid(logits)``.

        A positive temperature samples with uniforms ``u`` of the same shape, or with torch's generator if None.
        """
        # In bfloat16 a sigmoid over 0.998 would be 1: a set bit's gradient would vanish where a cleared one's does not.
        logits = logits.float()
        soft = logits.sigmoid()
        if temperature > 0:
            # Not torch.bernoulli, which raises on NaN: the training loop reports a loss that is not finite.
            u = torch.rand_like(logits) if u is None else u
            bits = (u < (logits / temperature).sigmoid()).to(logits.dtype)
        else:
            bits = (soft > 0.5).to(logits.dtype)
        return bits + (soft - soft.detach())  # the difference is 0, so bits are exactly 0 or 1
