"""Losses of a reconstruction (smooth L1, edges, a perceptual distance of the whole image and of a crop), and beside them
how bits are used, with a warning when codes collapse, and differentiable augmentation (Zhao et al. 2020): what a
discriminator sees is changed, so that it cannot learn by heart.

Augmentations take images ``[B, 3, H, W]`` in [-1, 1] and uniform numbers in [0, 1), a row an image, and are the identity
at strength 0. Gradients pass through to the images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import Config
from ..models.perceptual import PUBLISHED, PerceptualNetwork, load_perceptual

log = logging.getLogger(__name__)


class PerceptualConfig(Config):
    """The perceptual loss. The defaults are the paper's: LPIPS on VGG at 448 px, and on a crop of 224 px."""

    network: PerceptualNetwork | Literal["none"] = "vgg"
    """``vgg``: LPIPS; ``efficientnet_lite0``: a stand-in whose weights a package carries; ``none``: no such loss."""
    weights: str = PUBLISHED
    """``published`` (VGG from torchvision's address), ``random`` (for tests), or a local file."""
    size: int = Field(448, ge=16)
    """Both images are resized to this for the look at the whole."""
    crop: int = Field(224, ge=16)
    """Side of the square, at the same random place of both images, for the look at details."""
    weight: float = Field(1.0, ge=0)
    """Weight of the distance of the whole."""
    crop_weight: float = Field(1.0, ge=0)
    """Weight of the distance of the crop."""


class TokenizerLossConfig(Config):
    """What a reconstruction is judged by."""

    reconstruction: Literal["smooth_l1", "mse"] = "smooth_l1"
    """The paper's smooth L1: squared error would lead to loss spikes at scale."""
    gradient_weight: float = 0.0
    """Weight of the same loss on the images' horizontal and vertical differences, which sharpens edges."""
    code_weight: float = 0.0
    """Weight of ``mean(s (1 - s))``, which makes bits decided."""
    perceptual: PerceptualConfig = PerceptualConfig()


class ReconstructionLoss(nn.Module):
    """The supervised loss of images against their targets, both ``[B, 3, H, W]`` in [-1, 1]."""

    def __init__(self, cfg: TokenizerLossConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.distance: Callable[[Tensor, Tensor], Tensor]
        self.distance = F.smooth_l1_loss if cfg.reconstruction == "smooth_l1" else F.mse_loss
        look = cfg.perceptual
        self.perceptual = None if look.network == "none" else load_perceptual(look.network, look.weights)

    def forward(self, images: Tensor, targets: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts; crops lie at ``places [B, 2]`` in [0, 1)."""
        reconstruction = self.distance(images, targets)
        loss, parts = reconstruction, {"reconstruction": reconstruction, "psnr": psnr(images, targets).mean()}
        if self.cfg.gradient_weight:
            error = images - targets
            across, down = error.diff(dim=-1), error.diff(dim=-2)
            edges = self.distance(across, torch.zeros_like(across)) + self.distance(down, torch.zeros_like(down))
            loss, parts["edges"] = loss + self.cfg.gradient_weight * edges, edges
        if self.perceptual is not None:
            look, name = self.cfg.perceptual, self.perceptual.name
            whole = self.perceptual(resized(images, look.size), resized(targets, look.size)).mean()
            details = self.perceptual(cropped(images, look.crop, places), cropped(targets, look.crop, places)).mean()
            loss = loss + look.weight * whole + look.crop_weight * details
            parts |= {name: whole, f"{name}_crop": details}
        return loss, parts


def resized(images: Tensor, size: int) -> Tensor:
    """``images [B, 3, H, W]`` at ``size x size`` pixels, antialiased, in float32."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)


def cropped(images: Tensor, size: int, places: Tensor) -> Tensor:
    """The square of ``size`` pixels of each image at ``places [B, 2]``: 0 is the top or left, 1 the bottom or right."""
    for axis, side in enumerate(images.shape[-2:]):
        corner = (places[:, axis] * (side - size + 1)).long().clamp(max=side - size)
        images = take(images, axis, corner[:, None] + torch.arange(size, device=images.device))
    return images


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB ``[B]`` of images in [-1, 1]; the reconstruction is clamped first."""
    error = (images.detach().float().clamp(-1, 1) - reference.float()) / 2
    return -10 * error.square().flatten(1).mean(1).clamp(min=1e-10).log10()


BIT_SHARE = "bit_share"
"""Name of the fact that :func:`bit_summary` makes numbers of."""


def bit_share(logits: Tensor) -> Tensor:
    """Share of images in which each bit is set ``[L, K]``, of ``logits [B, L, K]``."""
    return (logits.detach() > 0).float().mean(0)


def bit_summary(share: Tensor) -> dict[str, Tensor]:
    """Numbers to watch of ``share [L, K]``: each is a mean over the K bits of a position, then over positions or the worst.

    ``bit_entropy`` is in bits, 1 at best. ``dead_bits`` is the share of bits that are the same in every image.
    """
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)).mean(1) / torch.log(
        share.new_tensor(2.0)
    )
    dead = ((share == 0) | (share == 1)).float().mean(1)
    means = share.mean(1)
    return {
        "bit_mean": means.mean(),
        "bit_mean_lowest": means.min(),
        "bit_mean_highest": means.max(),
        "bit_entropy": entropy.mean(),
        "bit_entropy_worst": entropy.min(),
        "dead_bits": dead.mean(),
        "dead_bits_worst": dead.max(),
    }


class CollapseWatch:
    """Warns once when more than ``limit`` of all bits are dead."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.warned = False

    def look(self, step: int, summary: Mapping[str, Tensor], share: Tensor) -> None:
        """``summary`` and ``share [L, K]`` of the batch of ``step`` (counted from 0)."""
        if self.warned or float(summary["dead_bits"]) <= self.limit:
            return
        self.warned = True
        dead = ((share == 0) | (share == 1)).float().mean(1)
        log.warning(
            "step %d: codes collapse: %.1f %% of all bits are the same in every image of the batch (limit %.1f %%), "
            "%d of %d positions have no live bit, mean entropy %.3f bits",
            *(step + 1, 100 * float(summary["dead_bits"]), 100 * self.limit),
            *(int((dead == 1).sum()), len(dead), float(summary["bit_entropy"])),
        )


DRAWS = 7
"""Uniform numbers that :func:`augment` needs an image."""


class AugmentConfig(Config):
    """How strongly images are changed before the discriminator sees them; 0 leaves a change out."""

    color: float = Field(1.0, ge=0, le=1)
    """Share of the full range: brightness by up to 0.5, saturation 0 to 2 times, contrast 0.5 to 1.5 times."""
    translation: float = Field(0.125, ge=0, le=1)
    """Largest shift along each axis, as a share of the side; what comes in is grey."""
    cutout: float = Field(0.25, ge=0, le=1)
    """Side of a square that is made grey, as a share of the image's."""


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
    """A grey rectangle of ``share`` of each side, centred anywhere in the image by ``draws [B, 2]``."""
    covered = torch.ones(len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
    for axis, size in enumerate(images.shape[-2:]):
        length = int(share * size + 0.5)
        start = (draws[:, axis] * size).floor().long()[:, None] - length // 2
        places = torch.arange(size, device=images.device)
        covered = covered & _along((places >= start) & (places < start + length), axis)
    return images * ~covered


def take(images: Tensor, axis: int, index: Tensor) -> Tensor:
    """Rows (axis 0) or columns (axis 1) ``index [B, n]`` of each image of ``images [B, 3, H, W]``."""
    shape = list(images.shape)
    shape[2 + axis] = index.shape[1]
    return images.gather(2 + axis, _along(index, axis).expand(shape))


def _along(values: Tensor, axis: int) -> Tensor:
    """``values [B, size]`` of rows (axis 0) or columns (axis 1), to broadcast over images ``[B, 3, H, W]``."""
    return values[:, None, :, None] if axis == 0 else values[:, None, None, :]
