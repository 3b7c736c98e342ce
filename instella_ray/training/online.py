"""Online encoding: images to codes by a frozen tokenizer during a generator's training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..accelerator import upload
from ..data.formats.images import to_tensor
from ..data.formats.patterns import Pattern
from ..data.loading.image_data import require_images
from ..errors import UserError
from ..flops import bit_encode
from ..models.bit import BIT, BITConfig
from ..models.checkpoint import load_expected

ENCODE_BATCH = 64
"""Images per tokenizer batch, independent of the micro-batch size; equals the encoding job's batch size."""


class OnlineEncoder:
    """Online image encoder: a tokenizer with EMA weights, which computes in ``dtype``.

    In float32 it gives the same codes as the encoding job, in bfloat16 other bits where a logit is close to 0.
    """

    def __init__(self, folder: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.bit = load_expected(folder, BIT, device=device)
        self.device, self.dtype, self.size = device, dtype, self.bit.cfg.image_size
        self.flops = bit_encode(self.bit.cfg, self.size, self.size).forward
        """FLOP per image."""

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Encode pixels, uint8 ``[B, size, size, 3]``, to codes 0/1, float32 ``[B, L, K]``, on the device."""
        parts = torch.from_numpy(pixels).split(ENCODE_BATCH)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return torch.cat([self.bit.encode(to_tensor(upload(part, self.device))) for part in parts]).float()


def require_encodable(pattern: Pattern, folder: str) -> BITConfig:
    """Return the configuration of the tokenizer in ``folder``.

    UserError if it cannot encode its own image_size, or the shards have no images.
    """
    cfg = load_expected(folder, BIT).cfg
    if cfg.image_size % cfg.encode_multiple:
        raise UserError(
            f"tokenizer {folder}: its image_size {cfg.image_size} is not a multiple of {cfg.encode_multiple}"
        )
    require_images(pattern)
    return cfg
