"""SSIM metric (Wang et al. 2004): mean of the local structural similarity over pixels and colour channels.

``SSIM = (2 m1 m2 + C1) (2 s12 + C2) / ((m1^2 + m2^2 + C1) (s1^2 + s2^2 + C2))`` with local means m, variances s^2 and the
covariance s12 under an 11 x 11 Gaussian (sigma 1.5), ``C1 = (0.01 R)^2``, ``C2 = (0.03 R)^2``, R = 255. There is a window
around every pixel, with mirror padding at the image borders. Range -1 to 1. The numbers are torchmetrics', whose
two-dimensional convolution is 20 times slower in float64 on a CPU, and off by 1e-5 in float32.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

from ...errors import UserError
from .base import Batch, Info, version_of
from .images import ImageSettings
from .samples import SampleMetric

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def image_ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Compute SSIM (float64 ``[B]``) of uint8 ``[B, H, W, 3]`` against originals of the same shape.

    Raises UserError for images smaller than 11 pixels a side.
    """
    if min(images.shape[1:3]) < WINDOW:
        raise UserError(
            f"ssim: images of {images.shape[2]}x{images.shape[1]} pixels, expected at least {WINDOW} a side"
        )
    return np.array([_ssim(a / 255.0, b / 255.0) for a, b in zip(images, references, strict=True)])


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _blur(plane: np.ndarray) -> np.ndarray:
    """Filter ``[H, W, C]`` with the Gaussian window."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-((offsets / SIGMA) ** 2) / 2)
    kernel /= kernel.sum()
    return correlate1d(correlate1d(plane, kernel, axis=0, mode="mirror"), kernel, axis=1, mode="mirror")


def ssim(images: ImageSettings = ImageSettings()) -> SampleMetric:
    """Create SSIM of ``images`` against ``references``."""

    def score(batch: Batch) -> np.ndarray:
        return image_ssim(images.prepare(batch.need("images")), images.prepare_originals(batch.need("references")))

    settings = {"images": images.describe(), "window": WINDOW, "sigma": SIGMA, "border": "mirrored", "channels": "rgb"}
    return SampleMetric(Info("ssim", version_of("instella-ray"), settings=settings), score)
