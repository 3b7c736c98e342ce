"""Counter-based uniforms: a picture's random bits depend on its own seed and on nothing around it.

Philox-4x32-10 (Salmon et al., 2011) in plain integer tensor operations, so that every device gives the same numbers
and a row's numbers are the same alone, in any batch, after a retry, and in another process.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

DIFFUSION, AR = 0, 1
"""Streams: draws for different purposes never share a number. Within one, a draw is told by its count."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four random 32-bit words for each 128-bit ``counter`` and 64-bit ``key``.

    Every word is an int64 tensor with values in [0, 2^32); shapes broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps both 32-bit halves of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: Tensor, draw: Tensor, tokens: int, bits: int, *, stream: int = DIFFUSION) -> Tensor:
    """Float32 ``[B, tokens, bits]`` in [0, 1), a function of (seed, draw, stream, token, bit) alone.

    ``seed [B]`` is any int64 (the key), ``draw [B]`` a count in [0, 2^32) within the stream. In the diffusion
    stream draw 0 is the initial noise and draw k comes after step k - 1; in the AR stream draw i is token i.
    """
    count = tokens * bits
    block = torch.arange((count + 3) // 4, device=seed.device)
    seed, draw = seed.long()[:, None], draw.long()[:, None]
    words = philox(
        (block, draw & _MASK, torch.full_like(block, stream), torch.zeros_like(block)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    # 24 bits are what a float32 in [0, 1) holds evenly, so no value rounds up to 1.
    values = torch.stack(words, dim=-1).flatten(1)[:, :count] >> 8
    return (values.float() * 2.0**-24).unflatten(1, (tokens, bits))
