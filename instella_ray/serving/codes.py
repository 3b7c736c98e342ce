"""An image's bits, and the same as text: 1,024 bytes at full size, in base64."""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple

import numpy as np

from ..errors import UserError


class Generated(NamedTuple):
    """What a generator has made of a request."""

    codes: np.ndarray
    """uint8 0/1 ``[L, K]``."""
    weights: str
    """Hash of the weights that made them: they may be swapped at any time."""


def pack(codes: np.ndarray) -> str:
    """Base64 of uint8 0/1 ``[L, K]``, eight bits a byte, the first one highest."""
    return base64.b64encode(np.packbits(codes).tobytes()).decode()


def unpack(text: str, tokens: int, bits: int) -> np.ndarray:
    """Uint8 0/1 ``[tokens, bits]`` of what :func:`pack` gave; UserError that says what was expected for anything else."""
    count = tokens * bits
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("expected base64 text") from None
    if len(data) != (count + 7) // 8:
        raise UserError(f"expected {(count + 7) // 8} bytes for {tokens} tokens of {bits} bits, got {len(data)}")
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if flat[count:].any():
        raise UserError(f"expected zeros after the last of {count} bits")
    return flat[:count].reshape(tokens, bits)
