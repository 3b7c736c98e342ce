"""How images are brought to a metric: one crop, one resize with a named filter, one image format."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic
from PIL import Image

from ...config import Config
from ...data.formats.images import crop_square, decode_rgb
from ...errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class ImageSettings(Config):
    """Part of every result, since FID moves by several points with the filter or with JPEG (Parmar et al. 2022)."""

    size: int | None = pydantic.Field(default=None, ge=1)
    """Square size in pixels: the centre square is cut out and resized. None: images are taken as they are."""
    filter: Literal["bicubic", "lanczos", "bilinear", "box"] = "bicubic"
    """Pillow's filter, which widens when shrinking (antialiased)."""
    format: Literal["pixels", "png", "jpeg"] = "pixels"
    """What images go through before they are measured: nothing, a lossless file, or JPEG."""
    jpeg_quality: int = pydantic.Field(default=95, ge=1, le=100)

    def describe(self) -> dict[str, Any]:
        """For a result's settings."""
        about = self.model_dump()
        if self.format != "jpeg":
            del about["jpeg_quality"]
        if self.size is None:
            about["filter"] = None
        return about

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """uint8 ``[B, H, W, 3]`` in, the same out at this size and through this format."""
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(f"images: expected uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
        lossless = self.format != "jpeg"
        if lossless and self.size in (None, images.shape[1]) and (self.size is None or images.shape[2] == self.size):
            return images
        return np.stack([self._one(image) for image in images])

    def prepare_originals(self, images: np.ndarray) -> np.ndarray:
        """The same for what images are compared with: at this size, but through no lossy format."""
        return self.model_copy(update={"format": "pixels"}).prepare(images)

    def _one(self, pixels: np.ndarray) -> np.ndarray:
        if self.format == "jpeg":
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=self.jpeg_quality)
            pixels = np.asarray(decode_rgb(buffer.getvalue()))
        if self.size is None:
            return pixels
        square = crop_square(pixels, min(pixels.shape[:2]))
        if len(square) == self.size:
            return square
        resample = Image.Resampling[self.filter.upper()]
        return np.asarray(Image.fromarray(square).resize((self.size, self.size), resample))


def to_planes(images: np.ndarray) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to a uint8 tensor ``[B, 3, H, W]``."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
