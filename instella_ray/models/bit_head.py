"""Autoregressive head over the bits of a token: a conditional NADE (Larochelle and Murray, 2011)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BitHead(nn.Module):
    """Logits of a token's bits, each of which depends on the token's bits before it.

    Adds ``w_k . gelu(c + sum_{j < k} (2 b_j - 1) v_j)`` to the independent logit of bit k, with a context c of the hidden
    state. An output layer alone draws a token's bits independently of each other, and so mixes what it has to choose from.
    ``w`` is initialized to zero: training starts with independent bits.
    """

    def __init__(self, width: int, bits: int, hidden: int) -> None:
        super().__init__()
        self.context = nn.Linear(width, hidden)
        self.bits_in = nn.Parameter(torch.randn(bits, hidden) * bits**-0.5)
        self.bits_out = nn.Parameter(torch.zeros(bits, hidden))

    def forward(self, logits: Tensor, x: Tensor, bits: Tensor) -> Tensor:
        """Return logits ``[B, n, K]``, each given the true bits before it (teacher forcing), of known ``bits`` 0/1.

        ``logits [B, n, K]`` are those of independent bits, ``x [B, n, width]`` hidden states.
        """
        earlier = bits.new_ones(bits.shape[-1], bits.shape[-1]).tril(-1)
        before = ((2 * bits - 1)[..., None, :] * earlier) @ self.bits_in
        hidden = F.gelu(self.context(x)[..., None, :] + before)
        return logits + torch.einsum("bnkh,kh->bnk", hidden, self.bits_out)

    def logit(self, bit: int, logits: Tensor, state: Tensor) -> Tensor:
        """Return the logit ``[..., B]`` of one bit: ``logits [..., B, K]`` of independent bits, ``state [..., B, hidden]``.

        The state starts as the context, and :meth:`given` adds every drawn bit to it.
        """
        return logits[..., bit] + (F.gelu(state) * self.bits_out[bit]).sum(-1)

    def given(self, bit: int, state: Tensor, drawn: Tensor) -> Tensor:
        """Return the next ``state [..., B, hidden]`` after ``bit`` was drawn as ``drawn [B]`` 0/1."""
        return state + (2 * drawn - 1)[:, None] * self.bits_in[bit]
