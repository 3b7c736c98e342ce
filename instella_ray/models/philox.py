"""Philox-4x32-10 (Salmon et al., 2011): random words as a function of a counter and a key.

The rounds are written in integer operations that NumPy arrays and torch tensors share: the same numbers come from
both, and where batches are prepared no torch is needed.
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
    """Words 0 and 2, and words 1 and 3, of the generator's output, ``[2, ...]`` each.

    ``even``, ``odd`` are the same words of the counter and ``key`` the two of the key, int64 with values in [0, 2^32);
    ``multipliers``, ``key_steps`` the constants along the first axis; ``flip`` reverses the first axis.
    """
    # Both halves of a round are in one array, because small arrays cost by the operation. Only the factor of a product
    # must be cut to 32 bits: what stands above them in the other words is cut with it, a round later.
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
    """Four random 32-bit words for each 128-bit ``counter`` and 64-bit ``key``, as :func:`.rng.philox` gives them.

    Every word is an int64 array ``[N]`` with values in [0, 2^32); shapes broadcast against each other.
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
