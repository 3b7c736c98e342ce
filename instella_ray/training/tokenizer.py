"""Tokenizer training: pictures in, the same pictures out through the bits (section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import storage
from ..config import Config
from ..data.decode import to_pixels, to_tensor
from ..data.image_data import ImageBatch, ImageData, require_pictures
from ..data.loader import Data
from ..errors import UserError
from ..flops import tokenizer_training
from ..models.bit import BIT, BITConfig
from ..models.checkpoint import Model, build_model
from .launch import launch
from .settings import TrainingRun


class TokenizerLossConfig(Config):
    """What a reconstruction is judged by."""

    reconstruction: Literal["smooth_l1", "mse"] = "smooth_l1"
    """The paper's smooth L1: squared error would lead to loss spikes at scale."""
    gradient_weight: float = 0.0
    """Weight of the same loss on the pictures' horizontal and vertical differences, which sharpens edges."""
    code_weight: float = 0.0
    """Weight of ``mean(s (1 - s))``, which makes bits decided."""


class TokenizerConfig(TrainingRun):
    """A tokenizer run."""

    model: BITConfig
    data: str
    """Curated WebDataset tars (path, glob, commas between several)."""
    temperature: float = 0.5
    """Quantizer temperature tau in training (0.5 in the paper's first stage: it prevents code collapse)."""
    late_temperature: float = 0.1
    """Temperature of the run's last part (the paper's second stage)."""
    late_fraction: float = 0.3
    """Share of the run that uses ``late_temperature``."""
    freeze_norm_fraction: float = 0.5
    """Share of the run after which the logits' batch statistics stay as they are (with normalize_logits)."""
    loss: TokenizerLossConfig = TokenizerLossConfig()


class TokenizerLoss(nn.Module):
    """One micro-batch: forward pass at a temperature, loss, and the numbers to watch."""

    def __init__(self, bit: BIT, cfg: TokenizerLossConfig) -> None:
        super().__init__()
        self.bit, self.cfg = bit, cfg

    def forward(self, images: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``images [B, 3, H, W]`` in [-1, 1], and its parts."""
        out = self.bit(images, temperature=temperature)
        distance = F.smooth_l1_loss if self.cfg.reconstruction == "smooth_l1" else F.mse_loss
        error = out.images - images
        reconstruction = distance(out.images, images)
        loss = reconstruction
        parts = {"reconstruction": reconstruction, "psnr": psnr(out.images, images).mean(), "code_loss": out.code_loss}
        if self.cfg.gradient_weight:
            across, down = error.diff(dim=-1), error.diff(dim=-2)
            edges = distance(across, torch.zeros_like(across)) + distance(down, torch.zeros_like(down))
            loss, parts["edges"] = loss + self.cfg.gradient_weight * edges, edges
        if self.cfg.code_weight:
            loss = loss + self.cfg.code_weight * out.code_loss
        return loss, {**parts, **bit_statistics(out.logits)}


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB ``[B]`` of pictures in [-1, 1]; the reconstruction is clamped first."""
    error = (images.detach().float().clamp(-1, 1) - reference.float()) / 2
    return -10 * error.square().flatten(1).mean(1).clamp(min=1e-10).log10()


def bit_statistics(logits: Tensor) -> dict[str, Tensor]:
    """How bits are used in a batch of ``logits [B, L, K]``: mean, entropy in bits, and the share that never changes."""
    share = (logits.detach() > 0).float().mean(0)
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / np.log(2)
    dead = ((share == 0) | (share == 1)).float().mean()
    return {"bit_mean": share.mean(), "bit_entropy": entropy.mean(), "dead_bits": dead}


class TokenizerTask:
    """Trains a :class:`BIT`; satisfies :class:`.loop.Task`."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        torch.manual_seed(cfg.train.seed)
        self.cfg = cfg
        self.data: Data = ImageData(cfg.data, (cfg.model.image_size,), cfg.train.seed)
        model = build_model(cfg.model.model_dump())
        assert isinstance(model, BIT)
        if model.cfg.repa_layer is not None:
            # No loss reads the projection, and DistributedDataParallel would wait for its gradients.
            model.decoder.repa_proj.requires_grad_(False)
        self.model: Model = model
        self.bit = model
        self.step_module: nn.Module = TokenizerLoss(model, cfg.loss)
        self.temperature = cfg.temperature

    def micro_batches(self, batch: ImageBatch, size: int, generator: torch.Generator) -> list[dict[str, Any]]:
        parts = self._images(batch).split(size)
        return [{"images": part, "temperature": self.temperature} for part in parts]

    def begin(self, batch: ImageBatch) -> None:
        self.bit.calibrate(self._images(batch).to(next(self.bit.parameters()).device))

    def before_step(self, step: int) -> None:
        done = step / self.cfg.train.steps
        late = done >= 1 - self.cfg.late_fraction
        self.temperature = self.cfg.late_temperature if late else self.cfg.temperature
        if self.bit.quantizer.norm is not None:
            self.bit.quantizer.norm.train(done < self.cfg.freeze_norm_fraction)

    def flops(self, parts: list[dict[str, Any]]) -> float:
        count = sum(len(part["images"]) for part in parts)
        return count * tokenizer_training(self.cfg.model, self.cfg.model.image_size, self.cfg.model.image_size).model

    def summary(self, step: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """All that a step gives is a single number already."""
        return means

    def preview(self, ema_model: Model) -> np.ndarray:
        """Originals above their reconstructions."""
        assert isinstance(ema_model, BIT)
        originals = self._images(self.data.batch(0, np.arange(min(8, len(self.data)))))
        restored = reconstruct(ema_model, originals)
        rows = [np.concatenate(list(to_pixels(x)), axis=1) for x in (originals, restored)]
        return np.concatenate(rows, axis=0)

    def _images(self, batch: ImageBatch) -> Tensor:
        return to_tensor(batch.pixels[self.cfg.model.image_size])

    def keys(self, batch: ImageBatch) -> list[str]:
        return batch.keys

    def extra(self) -> Mapping[str, Any]:
        return {}


def reconstruct(bit: BIT, images: Tensor) -> Tensor:
    """``images [B, 3, H, W]`` through the hard bits and back, on the CPU."""
    device = next(bit.parameters()).device
    return bit.decode(bit.encode(images.to(device)), *images.shape[-2:]).float().cpu()


class ReconstructionQuality(NamedTuple):
    psnr: float
    """Mean over pictures, dB."""
    dead_bits: float
    """Share of bits that are the same in every picture."""


def evaluate_tokenizer(bit: BIT, images: Tensor, batch_size: int = 64, *, title: str) -> ReconstructionQuality:
    """Quality of ``bit`` on ``images [N, 3, H, W]`` in [-1, 1], with hard bits, under a progress bar."""
    device = next(bit.parameters()).device
    values, codes = [], []
    for part in tqdm(images.split(batch_size), desc=title, unit="batch"):
        code = bit.encode(part.to(device))
        values.append(psnr(bit.decode(code, *part.shape[-2:]).cpu(), part))
        codes.append(code.cpu())
    share = torch.cat(codes).float().mean(0)
    return ReconstructionQuality(float(torch.cat(values).mean()), float(((share == 0) | (share == 1)).float().mean()))


def run_tokenizer(cfg: TokenizerConfig) -> Path:
    """Train on Ray Train; returns the final checkpoint's folder, which is a model folder."""
    if cfg.model.image_size % cfg.model.size_multiple:
        raise UserError(f"model.image_size {cfg.model.image_size}: not a multiple of {cfg.model.size_multiple}")
    require_pictures(cfg.data)  # here, before anything is written and any worker starts
    cfg = cfg.model_copy(update={"data": storage.absolute(cfg.data)})
    return launch(cfg, lambda device: TokenizerTask(cfg), description="tokenizer")
