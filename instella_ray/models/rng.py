"""Counter-based uniform random numbers in torch, which depend only on an image's seed and the draw's index.

Philox (:mod:`.philox`) in integer tensor operations: a row has the same numbers on every device, in any batch, after a
retry and in another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .philox import KEY_STEPS, MASK, MULTIPLIERS, rounds

DIFFUSION, AR, TRAINING = 0, 1, 2
"""Streams of independent random numbers for different purposes. Draws within a stream are numbered."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU within the block, for initial weights; after it, it goes on as if untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four random 32-bit words (Philox-4x32-10) for each 128-bit ``counter`` and 64-bit ``key``.

    Every word is an int64 tensor with values in [0, 2^32); shapes are broadcast.
    """
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(*counter, *key)
    even, odd, k = torch.stack((c0, c2)), torch.stack((c1, c3)), torch.stack((k0, k1))
    multipliers, key_steps = (c.view(2, *[1] * c0.ndim) for c in _constants(even.device))
    even, odd = rounds(even, odd, k, multipliers=multipliers, key_steps=key_steps, flip=lambda words: words.flip(0))
    return even[0], odd[0], even[1], odd[1]


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return multipliers and key steps, ``[2]`` each, cached per device."""
    return torch.tensor(MULTIPLIERS, device=device), torch.tensor(KEY_STEPS, device=device)


def uniforms(seed: Tensor, draw: Tensor, tokens: int, bits: int, *, stream: int = DIFFUSION) -> Tensor:
    """Return uniforms, float32 ``[B, tokens, bits]`` in [0, 1), a function of (seed, draw, stream, token, bit) only.

    ``seed [B]`` is any int64 (the key), ``draw [B]`` an index in [0, 2^32) within the stream. In the diffusion stream
    draw 0 is the initial noise and draw k comes after step k - 1; in the AR stream draw i belongs to token i.
    """
    count = tokens * bits
    block = torch.arange((count + 3) // 4, device=seed.device)
    seed, draw = seed.long()[:, None], draw.long()[:, None]
    words = philox(
        (block, draw & MASK, torch.full_like(block, stream), torch.zeros_like(block)),
        (seed & MASK, (seed >> 32) & MASK),
    )
    # A float32 represents multiples of 2^-24 in [0, 1) exactly, so no value is rounded up to 1.
    values = torch.stack(words, dim=-1).flatten(1)[:, :count] >> 8
    return (values.float() * 2.0**-24).unflatten(1, (tokens, bits))


def sample_seeds(seed: int, step: int, positions: Tensor) -> Tensor:
    """Return a seed, int64 ``[B]``, for each sample of a training step.

    Seeds depend on ``positions [B]`` in the global batch, in [0, 2^32), and therefore neither on the number of workers nor
    on the micro-batch size.
    """
    zero = torch.zeros_like(positions)
    # The last word of the counter differs from that of :func:`uniforms`, where it is 0.
    counter = (positions & MASK, zero + (step & MASK), zero + (step >> 32), zero + MASK)
    high, low, *_ = philox(counter, (zero + (seed & MASK), zero + ((seed >> 32) & MASK)))
    return (high << 32) | low
