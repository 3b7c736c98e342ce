"""Layers shared by the tokenizer and the generators: norms, attention, feed-forward, timestep embedding, adaLN.

Parameter names follow the published checkpoints, so that a published file loads without renaming.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.Module):
    """RMS norm ``w * x / sqrt(mean(x^2) + 1e-6)`` over the last axis; statistics in float32 for every input dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, EPS)
        return F.rms_norm(x.float(), self.weight.shape, None, EPS).to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm with scale and shift over the last axis; statistics in float32 for every input dtype."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the products of ``x`` keep its precision under autocast; meta tensors have none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Apply adaLN: ``layer_norm(x) * (1 + scale) + shift``, in the dtype of the residual stream ``x``."""
    x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    # In bfloat16 ``1 + scale`` would be rounded to a multiple of 1/128.
    return x * (1 + scale.to(x.dtype)) + shift


class Attention(nn.Module):
    """Multi-head attention projections: no biases, RMSNorm on q and k after the split into heads.

    Tokenizer self-attention, joint text-image attention and cached AR attention differ only in their keys and values, so
    this class provides the projections and :meth:`attend`, which they combine.
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
        """Split the heads, ``[B, S, width] -> [B, heads, S, D]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """Return normalized queries ``[B, heads, S, D]`` of ``x [B, S, width]``."""
        return self.norm_q(self.split(self.q_proj(x)))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized keys, and values, each ``[B, heads, S, D]``, of ``x [B, S, width]``."""
        return self.norm_k(self.split(self.k_proj(x))), self.split(self.v_proj(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply softmax attention, merge and project the heads: ``[B, Sq, width]``. ``mask`` is true for visible keys."""
        return self.o_proj(softmax_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Apply softmax attention to ``[B, heads, S, D]``; in float32 for training on CPUs, and else in the inputs' dtype."""
    if q.requires_grad and q.device.type == "cpu" and v.dtype != torch.float32:
        # The backward pass of PyTorch's attention on CPUs takes four times as long in bfloat16 as in float32.
        with without_autocast(q):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class SwiGLU(nn.Module):
    """SwiGLU feed-forward ``W_down(silu(W_gate y) * W_up y)`` without biases."""

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
    """Feed-forward ``d -> 4d -> d`` with tanh-approximated GELU and biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Identity in place of the dropout layer keeps the published names net.0.proj and net.2.
        self.net = nn.Sequential(_GELUProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y)


class TimestepEmbedding(nn.Module):
    """Timestep embedding ``t [B] in [0, 1] -> [B, width]``: linear layers on the raw scalar, no sinusoids.

    One layer as in the paper, or two as published, with a SiLU between them.
    """

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(1, width)
        self.linear_2 = nn.Linear(width, width) if layers == 2 else None

    def forward(self, t: Tensor) -> Tensor:
        with without_autocast(t):  # which would round t to 8 bits
            first = self.linear_1(t[:, None])
            return first if self.linear_2 is None else self.linear_2(F.silu(first))


class Modulation(nn.Module):
    """adaLN modulation: timestep embedding ``[B, width]`` to vectors of scale, shift or gate, ``[B, parts, width]``."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear(F.silu(embedding)).unflatten(-1, (self.parts, -1))
