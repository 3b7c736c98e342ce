"""Discriminator with small heads on frozen DINO features (section 2.1, third stage), and its hinge loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError
from .perceptual import PUBLISHED, RANDOM, WeightsFile
from .rng import seeded


class DiscriminatorConfig(Config):
    """Settings of the discriminator: frozen backbone and trained heads."""

    backbone: str = "vit_small_patch16_224.dino"
    """timm's name of a vision transformer; the default is the paper's DINO-S."""
    weights: WeightsFile = PUBLISHED
    """``published``: from the hub; ``random``: untrained, for tests; or a local file (safetensors, pth)."""
    size: int = Field(224, ge=8)
    """Side in pixels of the backbone's input: the resized whole image, and a crop of larger ones."""
    blocks: tuple[int, ...] = Field((2, 5, 8, 11), min_length=1)
    """Transformer blocks, from 0, whose tokens are the input of one head each."""
    width: int = Field(64, ge=1)
    """Hidden channels of a head."""


class FrozenFeatures(nn.Module):
    """Frozen vision transformer: images in [-1, 1] to one feature map ``[B, C, h, w]`` per selected block."""

    def __init__(self, cfg: DiscriminatorConfig, seed: int = 0) -> None:
        super().__init__()
        self.backbone = _load_backbone(cfg, seed)
        if max(cfg.blocks) >= len(self.backbone.blocks):
            raise UserError(
                f"discriminator.blocks {list(cfg.blocks)}: {cfg.backbone} has blocks 0..{len(self.backbone.blocks) - 1}"
            )
        patch = self.backbone.patch_embed.patch_size[0]
        if cfg.size % patch:
            raise UserError(f"discriminator.size {cfg.size}: expected a multiple of {cfg.backbone}'s patch of {patch}")
        self.blocks = list(cfg.blocks)
        facts = self.backbone.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(facts[name]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def channels(self) -> int:
        """Channels C of each feature map."""
        return int(self.backbone.embed_dim)

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Keep eval mode when an enclosing module is trained."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        scaled = (images.float() / 2 + 0.5 - self.get_buffer("mean")) / self.get_buffer("std")
        maps: list[Tensor] = self.backbone.forward_intermediates(
            scaled, indices=self.blocks, output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        return maps


class DiscriminatorHeads(nn.Module):
    """One convolutional head per map: maps ``[B, C, h, w]`` to logits ``[B, maps * h * w]``, high for real images."""

    def __init__(self, channels: int, maps: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, channels),  # blocks differ in scale by orders of magnitude
                nn.Conv2d(channels, width, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 1),
            )
            for _ in range(maps)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)


def hinge_loss(true: Tensor, restored: Tensor) -> Tensor:
    """Return the discriminator's hinge loss ``mean(max(0, 1 - true)) / 2 + mean(max(0, 1 + restored)) / 2`` over logits."""
    return (F.relu(1 - true).mean() + F.relu(1 + restored).mean()) / 2


def _load_backbone(cfg: DiscriminatorConfig, seed: int) -> Any:
    import timm

    source: dict[str, Any] = {"pretrained": cfg.weights != RANDOM}
    if cfg.weights not in (PUBLISHED, RANDOM):
        if not Path(cfg.weights).is_file():
            raise UserError(f"discriminator: weights {cfg.weights}: expected published, random or a local file")
        source["pretrained_cfg_overlay"] = {"file": cfg.weights}
    try:
        with seeded(seed):
            model = timm.create_model(cfg.backbone, num_classes=0, dynamic_img_size=True, **source)
    except Exception as error:  # timm, the hub and the file readers raise unrelated error types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"discriminator: {cfg.backbone} with weights {cfg.weights}: {reason}") from None
    if not hasattr(model, "blocks") or not hasattr(model, "forward_intermediates"):
        raise UserError(f"discriminator.backbone {cfg.backbone}: expected a timm vision transformer")
    return model
