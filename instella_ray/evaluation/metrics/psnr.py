"""PSNR metric: mean over images of ``10 log10(255^2 / MSE)`` in dB, MSE over all pixels and channels of one image."""

from __future__ import annotations

import numpy as np

from .base import Batch, Info, version_of
from .images import ImageSettings
from .samples import SampleMetric

CEILING = 100.0
"""PSNR (dB) of identical images, the same as in training previews."""


def image_psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Compute PSNR (dB, float64 ``[B]``) of uint8 ``[B, H, W, 3]`` against originals of the same shape.

    Values are at most :data:`CEILING`. The squared error is summed in integers, so it is exact.
    """
    difference = images.astype(np.int64) - references.astype(np.int64)
    mse = np.square(difference).reshape(len(images), -1).mean(1) / 255.0**2
    return -10 * np.log10(np.maximum(mse, 10 ** (-CEILING / 10)))


def psnr(images: ImageSettings = ImageSettings()) -> SampleMetric:
    """Create PSNR of ``images`` against ``references``."""

    def score(batch: Batch) -> np.ndarray:
        return image_psnr(images.prepare(batch.need("images")), images.prepare_originals(batch.need("references")))

    settings = {"images": images.describe(), "unit": "dB", "ceiling": CEILING, "average": "mean of images' dB"}
    return SampleMetric(Info("psnr", version_of("instella-ray"), settings=settings), score)
