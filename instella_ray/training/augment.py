"""Differentiable augmentation (Zhao et al. 2020): what a discriminator sees is changed, so that it cannot learn by heart.

Each function takes pictures ``[B, 3, H, W]`` in [-1, 1] and uniform numbers in [0, 1), a row a picture, and is the
identity at strength 0. Gradients pass through to the pictures.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..config import Config

DRAWS = 7
"""Uniform numbers that :func:`augment` needs a picture."""


class AugmentConfig(Config):
    """How strongly pictures are changed before the discriminator sees them; 0 leaves a change out."""

    color: float = Field(1.0, ge=0, le=1)
    """Share of the full range: brightness by up to 0.5, saturation 0 to 2 times, contrast 0.5 to 1.5 times."""
    translation: float = Field(0.125, ge=0, le=1)
    """Largest shift along each axis, as a share of the side; what comes in is grey."""
    cutout: float = Field(0.25, ge=0, le=1)
    """Side of a square that is made grey, as a share of the picture's."""


def augment(images: Tensor, draws: Tensor, cfg: AugmentConfig) -> Tensor:
    """All changes, one after another, by uniform ``draws [B, DRAWS]``."""
    changed = color(images, draws[:, :3], cfg.color)
    changed = translate(changed, draws[:, 3:5], cfg.translation)
    return cutout(changed, draws[:, 5:7], cfg.cutout)


def color(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Brightness, saturation and contrast by ``draws [B, 3]``."""
    brightness, saturation, contrast = (strength * (draws - 0.5)).view(-1, 3, 1, 1, 1).unbind(1)
    x = images + brightness
    x = x + (x - x.mean(1, keepdim=True)) * (2 * saturation)
    return x + (x - x.mean((1, 2, 3), keepdim=True)) * contrast


def translate(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Shift by whole pixels, down and right, by up to ``share`` of each side either way, by ``draws [B, 2]``."""
    for axis, size in enumerate(images.shape[-2:]):
        furthest = int(share * size + 0.5)
        shifts = (draws[:, axis] * (2 * furthest + 1)).floor().long() - furthest
        source = torch.arange(size, device=images.device) - shifts[:, None]
        images = take(images, axis, source.clamp(0, size - 1)) * _along((source >= 0) & (source < size), axis)
    return images


def cutout(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """A grey rectangle of ``share`` of each side, centred anywhere in the picture by ``draws [B, 2]``."""
    covered = torch.ones(len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
    for axis, size in enumerate(images.shape[-2:]):
        length = int(share * size + 0.5)
        start = (draws[:, axis] * size).floor().long()[:, None] - length // 2
        places = torch.arange(size, device=images.device)
        covered = covered & _along((places >= start) & (places < start + length), axis)
    return images * ~covered


def take(images: Tensor, axis: int, index: Tensor) -> Tensor:
    """Rows (axis 0) or columns (axis 1) ``index [B, n]`` of each picture of ``images [B, 3, H, W]``."""
    shape = list(images.shape)
    shape[2 + axis] = index.shape[1]
    return images.gather(2 + axis, _along(index, axis).expand(shape))


def _along(values: Tensor, axis: int) -> Tensor:
    """``values [B, size]`` of rows (axis 0) or columns (axis 1), to broadcast over pictures ``[B, 3, H, W]``."""
    return values[:, None, :, None] if axis == 0 else values[:, None, None, :]
