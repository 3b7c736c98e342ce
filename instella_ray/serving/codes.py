"""Codes of generated images and their base64 form: 1,024 bytes before encoding at full size."""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple

import numpy as np

from ..errors import UserError


class Generated(NamedTuple):
    """Result of a generator call."""

    codes: np.ndarray
    """Bits of the image, uint8 0/1 ``[L, K]``."""
    weights: str
    """Hash of the weights that generated ``codes``; kept per image because weights may be swapped at any time."""


def pack(codes: np.ndarray) -> str:
    """Encode uint8 0/1 ``[L, K]`` as base64, eight bits per byte, most significant bit first."""
    return base64.b64encode(np.packbits(codes).tobytes()).decode()


def unpack(text: str, tokens: int, bits: int) -> np.ndarray:
    """Decode the output of :func:`pack` to uint8 0/1 ``[tokens, bits]``; raises UserError for any other text."""
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
