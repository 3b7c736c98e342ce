"""What a reconstruction is judged by: smooth L1, edges, and a perceptual distance of the whole picture and of a crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import Config
from ..models.perceptual import PUBLISHED, PerceptualNetwork, load_perceptual
from .augment import take


class PerceptualConfig(Config):
    """The perceptual loss. The defaults are the paper's: LPIPS on VGG at 448 px, and on a crop of 224 px."""

    network: PerceptualNetwork | Literal["none"] = "vgg"
    """``vgg``: LPIPS; ``efficientnet_lite0``: a stand-in whose weights a package carries; ``none``: no such loss."""
    weights: str = PUBLISHED
    """``published`` (VGG from torchvision's address), ``random`` (for tests), or a local file."""
    size: int = Field(448, ge=16)
    """Both pictures are resized to this for the look at the whole."""
    crop: int = Field(224, ge=16)
    """Side of the square, at the same random place of both pictures, for the look at details."""
    weight: float = Field(1.0, ge=0)
    """Weight of the distance of the whole."""
    crop_weight: float = Field(1.0, ge=0)
    """Weight of the distance of the crop."""


class TokenizerLossConfig(Config):
    """What a reconstruction is judged by."""

    reconstruction: Literal["smooth_l1", "mse"] = "smooth_l1"
    """The paper's smooth L1: squared error would lead to loss spikes at scale."""
    gradient_weight: float = 0.0
    """Weight of the same loss on the pictures' horizontal and vertical differences, which sharpens edges."""
    code_weight: float = 0.0
    """Weight of ``mean(s (1 - s))``, which makes bits decided."""
    perceptual: PerceptualConfig = PerceptualConfig()


class ReconstructionLoss(nn.Module):
    """The supervised loss of pictures against their targets, both ``[B, 3, H, W]`` in [-1, 1]."""

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
    """The square of ``size`` pixels of each picture at ``places [B, 2]``: 0 is the top or left, 1 the bottom or right."""
    for axis, side in enumerate(images.shape[-2:]):
        corner = (places[:, axis] * (side - size + 1)).long().clamp(max=side - size)
        images = take(images, axis, corner[:, None] + torch.arange(size, device=images.device))
    return images


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB ``[B]`` of pictures in [-1, 1]; the reconstruction is clamped first."""
    error = (images.detach().float().clamp(-1, 1) - reference.float()) / 2
    return -10 * error.square().flatten(1).mean(1).clamp(min=1e-10).log10()
