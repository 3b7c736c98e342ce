"""Philox-4x32-10 (Salmon et al., 2011): counter-based random numbers in NumPy.

The rounds use integer operations common to NumPy arrays and torch tensors, so that both give the same numbers, and data
loading does not need torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def rounds(
    even: Any, odd: Any, key: Any, *, multipliers: Any, key_steps: Any, flip: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Apply the ten rounds; returns words 0 and 2, and words 1 and 3, of the output, ``[2, ...]`` each.

    ``even``, ``odd`` are the same words of the counter and ``key`` the two words of the key, int64 in [0, 2^32);
    ``multipliers``, ``key_steps`` are the constants along the first axis; ``flip`` reverses the first axis.
    """
    # Both halves of a round share one array, because the cost of small arrays is per operation. Only the factor of a
    # product must be masked to 32 bits: higher bits of the other words are masked with it in the next round.
    for number in range(10):
        # int64 products wrap modulo 2^64, which keeps both 32-bit halves of the unsigned product.
        product = flip(even * multipliers)
        even = product >> 32
        even ^= odd
        even ^= key + number * key_steps
        even &= MASK
        odd = product
    return even, odd & MASK


def philox(counter: Words, key: tuple[np.ndarray, np.ndarray]) -> Words:
    """Return four random 32-bit words for each 128-bit ``counter`` and 64-bit ``key``, equal to :func:`.rng.philox`.

    Every word is an int64 array ``[N]`` with values in [0, 2^32); shapes are broadcast.
    """
    c0, c1, c2, c3, k0, k1 = np.broadcast_arrays(*counter, *key)
    even, odd = rounds(
        np.stack((c0, c2)),
        np.stack((c1, c3)),
        np.stack((k0, k1)),
        multipliers=np.array(MULTIPLIERS)[:, None],
        key_steps=np.array(KEY_STEPS)[:, None],
        flip=lambda words: words[::-1],
    )
    return even[0], odd[0], even[1], odd[1]
