"""Reconstruction losses, bit usage statistics and differentiable augmentation.

Losses: smooth L1, image gradients, and a perceptual distance of the whole image and of a crop. Bit statistics include a
warning on code collapse. Differentiable augmentation (Zhao et al. 2020) keeps the discriminator from memorizing the
training images: it takes images ``[B, 3, H, W]`` in [-1, 1] and one row of uniform numbers in [0, 1) per image, is the
identity at strength 0, and is differentiable with respect to the images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import Config
from ..data.formats.codes import dead_bits
from ..models.perceptual import PUBLISHED, PerceptualNetwork, WeightsFile, load_perceptual

log = logging.getLogger(__name__)


class PerceptualConfig(Config):
    """Perceptual loss settings. The defaults are the paper's: LPIPS on VGG at 448 px, and on a crop of 224 px."""

    network: PerceptualNetwork | Literal["none"] = "vgg"
    """``vgg``: LPIPS; ``efficientnet_lite0``: an alternative with weights from an installed package; ``none``: no
    perceptual loss."""
    weights: WeightsFile = PUBLISHED
    """``published`` (VGG downloaded from torchvision), ``random`` (for tests), or a local file."""
    size: int = Field(448, ge=16)
    """Side in pixels that both images are resized to for the whole-image distance."""
    crop: int = Field(224, ge=16)
    """Side in pixels of the square crop, at the same random position in both images."""
    weight: float = Field(1.0, ge=0)
    """Weight of the whole-image distance."""
    crop_weight: float = Field(1.0, ge=0)
    """Weight of the crop distance."""


class TokenizerLossConfig(Config):
    """Weights and variants of the reconstruction losses."""

    reconstruction: Literal["smooth_l1", "mse"] = "smooth_l1"
    """Pixel loss. The paper uses smooth L1, because squared error leads to loss spikes at scale."""
    smooth_l1_beta: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Error at which smooth L1 turns from quadratic, ``e^2 / (2 beta)``, to linear, ``|e| - beta / 2``. Pixels are in
    [-1, 1], so that 1 is half the squared error for all but the worst. The paper names no value."""
    gradient_weight: float = 0.0
    """Weight of the pixel loss on horizontal and vertical image gradients, which sharpens edges."""
    code_weight: float = 0.0
    """Weight of ``mean(s (1 - s))``, which pushes bit probabilities to 0 or 1 (binary quantizer). The losses of a one_hot
    quantizer always count as they are."""
    perceptual: PerceptualConfig = PerceptualConfig()


class ReconstructionLoss(nn.Module):
    """Supervised loss between images and targets, both ``[B, 3, H, W]`` in [-1, 1]."""

    def __init__(self, cfg: TokenizerLossConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.distance: Callable[[Tensor, Tensor], Tensor]
        smooth_l1 = partial(F.smooth_l1_loss, beta=cfg.smooth_l1_beta)
        self.distance = smooth_l1 if cfg.reconstruction == "smooth_l1" else F.mse_loss
        look = cfg.perceptual
        self.perceptual = None if look.network == "none" else load_perceptual(look.network, look.weights)

    def forward(self, images: Tensor, targets: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts; ``places [B, 2]`` in [0, 1) are the relative crop positions."""
        images = images.float()  # under autocast the tokenizer's are bfloat16
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
    """Resize ``images [B, 3, H, W]`` to ``size x size`` pixels with antialiasing; returns float32."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)


def cropped(images: Tensor, size: int, places: Tensor) -> Tensor:
    """Crop a square of ``size`` pixels from each image at ``places [B, 2]``: 0 is top or left, 1 bottom or right."""
    for axis, side in enumerate(images.shape[-2:]):
        corner = (places[:, axis] * (side - size + 1)).long().clamp(max=side - size)
        images = take(images, axis, corner[:, None] + torch.arange(size, device=images.device))
    return images


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio ``[B]`` in dB of images in [-1, 1]; ``images`` are clamped first."""
    error = (images.detach().float().clamp(-1, 1) - reference.float()) / 2
    return -10 * error.square().flatten(1).mean(1).clamp(min=1e-10).log10()


BIT_SHARE = "bit_share"
"""Key of the loss part that :func:`bit_summary` summarizes."""


def bit_share(codes: Tensor) -> Tensor:
    """Return the fraction of images in which each bit is set, ``[L, K]``, from ``codes [B, L, K]``."""
    return codes.float().mean(0)


def bit_summary(share: Tensor) -> dict[str, Tensor]:
    """Summarize ``share [L, K]``: averages over the K bits of a position, then the mean or the worst over positions.

    ``bit_entropy`` is in bits, 1 at best. ``dead_bits`` is the fraction of bits that are constant over all images.
    """
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)).mean(1) / torch.log(
        share.new_tensor(2.0)
    )
    dead = dead_bits(share).float().mean(1)
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
    """Code collapse monitor: warns once when the fraction of dead bits exceeds ``limit``."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.warned = False

    def look(self, step: int, summary: Mapping[str, Tensor], share: Tensor) -> None:
        """Check ``summary`` (:func:`bit_summary`) and ``share [L, K]`` of the batch of ``step`` (from 0)."""
        if self.warned or float(summary["dead_bits"]) <= self.limit:
            return
        self.warned = True
        dead = dead_bits(share).float().mean(1)
        log.warning(
            "step %d: code collapse: %.1f %% of all bits are constant over all images since the last logged "
            "line (limit %.1f %%), "
            "all bits are constant at %d of %d positions, mean entropy %.3f bits",
            *(step + 1, 100 * float(summary["dead_bits"]), 100 * self.limit),
            *(int((dead == 1).sum()), len(dead), float(summary["bit_entropy"])),
        )


DRAWS = 7
"""Uniform numbers per image that :func:`augment` uses."""


class AugmentConfig(Config):
    """Strengths of the discriminator's input augmentations; 0 disables one."""

    color: float = Field(1.0, ge=0, le=1)
    """Fraction of the full range: brightness +-0.5, saturation factor 0 to 2, contrast factor 0.5 to 1.5."""
    translation: float = Field(0.125, ge=0, le=1)
    """Largest shift along each axis as a fraction of the side; uncovered pixels are grey."""
    cutout: float = Field(0.25, ge=0, le=1)
    """Side of a grey rectangle as a fraction of the image's side."""


def augment(images: Tensor, draws: Tensor, cfg: AugmentConfig) -> Tensor:
    """Apply all augmentations in sequence, with parameters from uniform ``draws [B, DRAWS]``."""
    changed = color(images, draws[:, :3], cfg.color)
    changed = translate(changed, draws[:, 3:5], cfg.translation)
    return cutout(changed, draws[:, 5:7], cfg.cutout)


def color(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Change brightness, saturation and contrast by ``draws [B, 3]``."""
    brightness, saturation, contrast = (strength * (draws - 0.5)).view(-1, 3, 1, 1, 1).unbind(1)
    x = images + brightness
    x = x + (x - x.mean(1, keepdim=True)) * (2 * saturation)
    return x + (x - x.mean((1, 2, 3), keepdim=True)) * contrast


def translate(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Shift images by whole pixels, up to ``share`` of each side in either direction, by ``draws [B, 2]``."""
    for axis, size in enumerate(images.shape[-2:]):
        furthest = int(share * size + 0.5)
        shifts = (draws[:, axis] * (2 * furthest + 1)).floor().long() - furthest
        source = torch.arange(size, device=images.device) - shifts[:, None]
        images = take(images, axis, source.clamp(0, size - 1)) * _along((source >= 0) & (source < size), axis)
    return images


def cutout(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Cover a rectangle of ``share`` of each side with grey, centred in the image by ``draws [B, 2]``."""
    covered = torch.ones(len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
    for axis, size in enumerate(images.shape[-2:]):
        length = int(share * size + 0.5)
        start = (draws[:, axis] * size).floor().long()[:, None] - length // 2
        places = torch.arange(size, device=images.device)
        covered = covered & _along((places >= start) & (places < start + length), axis)
    return images * ~covered


def take(images: Tensor, axis: int, index: Tensor) -> Tensor:
    """Gather rows (axis 0) or columns (axis 1) ``index [B, n]`` of each image of ``images [B, 3, H, W]``."""
    shape = list(images.shape)
    shape[2 + axis] = index.shape[1]
    return images.gather(2 + axis, _along(index, axis).expand(shape))


def _along(values: Tensor, axis: int) -> Tensor:
    """Reshape ``values [B, size]`` of rows (axis 0) or columns (axis 1) to broadcast over images ``[B, 3, H, W]``."""
    return values[:, None, :, None] if axis == 0 else values[:, None, None, :]
