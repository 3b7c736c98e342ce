"""Pictures that become codes while a generator trains on them, by the frozen tokenizer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.formats.images import to_tensor
from ..data.loading.image_data import require_pictures
from ..errors import UserError
from ..flops import bit_encode
from ..models.bit import BIT, BITConfig
from ..models.checkpoint import load_expected

AT_ONCE = 64
"""Pictures encoded together, however large the micro-batch: as many as the encoding job takes."""


class OnlineEncoder:
    """The tokenizer of a model folder, with its averaged weights, in float32: the codes are those of the encoding job."""

    def __init__(self, folder: str, device: torch.device) -> None:
        self.bit = load_expected(folder, BIT, device=device)
        self.device, self.size = device, self.bit.cfg.image_size
        self.flops = bit_encode(self.bit.cfg, self.size, self.size).forward
        """FLOP a picture."""

    def encode(self, pixels: np.ndarray) -> Tensor:
        """0/1 float32 ``[B, L, K]``, on the device, of uint8 ``[B, size, size, 3]``."""
        parts = torch.from_numpy(pixels).split(AT_ONCE)
        return torch.cat([self.bit.encode(to_tensor(part.to(self.device))) for part in parts]).float()


def require_encodable(pattern: str, folder: str) -> BITConfig:
    """The sizes of the tokenizer in ``folder``; UserError for one that cannot encode, and for shards without pictures."""
    cfg = load_expected(folder, BIT).cfg
    if cfg.image_size % cfg.encode_multiple:
        raise UserError(
            f"tokenizer {folder}: its image_size {cfg.image_size} is not a multiple of {cfg.encode_multiple}"
        )
    require_pictures(pattern)
    return cfg
