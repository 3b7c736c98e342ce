"""Image preprocessing of the metrics: crop, resize filter and image format."""

from __future__ import annotations

import io
from collections.abc import Sequence
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
    """Image preprocessing settings.

    They are part of every result, since FID changes by several points with the filter or JPEG (Parmar et al. 2022).
    """

    size: int | None = pydantic.Field(default=None, ge=1)
    """Size in pixels to which the centre square is resized. None: no crop and no resize."""
    filter: Literal["bicubic", "lanczos", "bilinear", "box"] = "bicubic"
    """Pillow's resize filter, which is antialiased when shrinking."""
    format: Literal["pixels", "png", "jpeg"] = "pixels"
    """Image format applied before measuring: none, lossless PNG, or JPEG compression."""
    jpeg_quality: int = pydantic.Field(default=95, ge=1, le=100)

    def describe(self) -> dict[str, Any]:
        """Return the settings as part of a result's settings."""
        about = self.model_dump()
        if self.format != "jpeg":
            del about["jpeg_quality"]
        if self.size is None:
            about["filter"] = None
        return about

    def prepare(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Preprocess images, each uint8 ``[H, W, 3]``, to uint8 ``[B, size, size, 3]``.

        Raises UserError for other inputs, and for images of several sizes if ``size`` is None.
        """
        for image in images:
            if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
                raise UserError(f"images: expected uint8 [H, W, 3] each, got {image.dtype} {list(image.shape)}")
        sizes = {image.shape[:2] for image in images}
        if self.size is None and len(sizes) > 1:
            raise UserError(f"images: of {len(sizes)} sizes; expected images.size")
        if self.format != "jpeg" and len(sizes) == 1 and (self.size is None or sizes == {(self.size, self.size)}):
            return np.asarray(images)
        return np.stack([self._one(image) for image in images])

    def prepare_originals(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Preprocess originals: the same as :meth:`prepare`, but without lossy compression."""
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
    """Convert uint8 ``[B, H, W, 3]`` to a uint8 tensor ``[B, 3, H, W]``."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
