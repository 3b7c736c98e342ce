"""Building blocks shared by the tokenizer and the generators.

Parameter names follow the published checkpoints, so that a published file loads without a renaming table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.Module):
    """``w * x / sqrt(mean(x^2) + 1e-6)`` over the last axis; statistics in float32 whatever the input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, EPS)
        return F.rms_norm(x.float(), self.weight.shape, None, EPS).to(x.dtype) * self.weight


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without affine parameters: adaLN supplies scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class Attention(nn.Module):
    """Projections of a multi-head attention: no biases, RMSNorm on q and k after the split into heads.

    The three callers (tokenizer self-attention, joint text-image attention, cached AR attention) differ only in
    which keys they bring, so this class offers the projections and :meth:`attend`, and they compose them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm_q = RMSNorm(width // heads)
        self.norm_k = RMSNorm(width // heads)

    def split(self, x: Tensor) -> Tensor:
        """``[B, S, width] -> [B, heads, S, D]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """Normalised queries ``[B, heads, S, D]`` of ``x [B, S, width]``."""
        return self.norm_q(self.split(self.q_proj(x)))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys and plain values, each ``[B, heads, S, D]``, of ``x [B, S, width]``."""
        return self.norm_k(self.split(self.k_proj(x))), self.split(self.v_proj(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention, heads merged and projected: ``[B, Sq, width]``. ``mask`` is true where a key is seen."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """``W_down(silu(W_gate y) * W_up y)`` without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class _GELUProjection(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, y: Tensor) -> Tensor:
        return F.gelu(self.proj(y), approximate="tanh")


class FeedForward(nn.Module):
    """``d -> 4d -> d`` with tanh-approximated GELU and biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The middle Identity (dropout elsewhere) keeps the published names net.0.proj and net.2.
        self.net = nn.Sequential(_GELUProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y)


class TimestepEmbedding(nn.Module):
    """``t [B] in [0, 1] -> [B, width]``: the raw scalar through two linear layers, no sinusoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(1, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(t[:, None])))


class Modulation(nn.Module):
    """adaLN: the timestep embedding mapped to ``parts`` vectors, each ``[B, 1, width]`` to broadcast over tokens."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(embedding))[:, None].chunk(self.parts, dim=-1)
