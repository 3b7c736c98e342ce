"""Counter-based uniforms: a picture's random bits depend on its own seed and on nothing around it.

Philox-4x32-10 (Salmon et al., 2011) in plain integer tensor operations, so that every device gives the same numbers
and a row's numbers are the same alone, in any batch, after a retry, and in another process.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

DIFFUSION, AR, TRAINING = 0, 1, 2
"""Streams: draws for different purposes never share a number. Within one, a draw is told by its count."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four random 32-bit words for each 128-bit ``counter`` and 64-bit ``key``.

    Every word is an int64 tensor with values in [0, 2^32); shapes broadcast against each other.
    """
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(*counter, *key)
    # Both halves of a round in one tensor, because small tensors cost by the operation. Only the factor of a product
    # must be cut to 32 bits: what stands above them in the other words is cut with it, a round later.
    factor, other, k = torch.stack((c0, c2)), torch.stack((c1, c3)), torch.stack((k0, k1))
    multipliers, key_steps = _constants(factor.device)
    multipliers, key_steps = (c.view(2, *[1] * (factor.ndim - 1)) for c in (multipliers, key_steps))
    for number in range(10):
        # int64 products wrap modulo 2^64, which keeps both 32-bit halves of the unsigned product.
        product = (factor * multipliers).flip(0)
        factor = (product >> 32).bitwise_xor_(other).bitwise_xor_(k + number * key_steps).bitwise_and_(_MASK)
        other = product
    other = other & _MASK
    return factor[0], other[0], factor[1], other[1]


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers and key steps, ``[2]`` each, copied to a device once."""
    return torch.tensor(_MULTIPLIERS, device=device), torch.tensor(_KEY_STEPS, device=device)


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


def sample_seeds(seed: int, step: int, positions: Tensor) -> Tensor:
    """A seed for each sample of a training step, int64 ``[B]``: of its place in the global batch, ``positions [B]``.

    So what is random about a sample depends neither on the number of workers nor on how they cut their shares.
    """
    zero = torch.zeros_like(positions)
    # The last word of the counter sets these apart from the draws of :func:`uniforms`, where it is 0.
    counter = (positions & _MASK, zero + (step & _MASK), zero + (step >> 32), zero + _MASK)
    high, low, *_ = philox(counter, (zero + (seed & _MASK), zero + ((seed >> 32) & _MASK)))
    return (high << 32) | low
