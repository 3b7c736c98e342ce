"""Classifier of labelled images: EfficientNet-Lite0 with a head for each label, its folder and its predictions.

Features are those of the whole network, the mean and the spread of each of its scales, and how the channels of the fine
scales go together (their Gram matrices, as in style transfer): what an image shows is in the former, how it is drawn in the
latter. They are standardized, and the heads are linear.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import yaml
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import Config, validate
from ..errors import UserError
from .checkpoint import CONFIG, WEIGHTS, misfit, read_checkpoint_config, read_tensors
from .perceptual import LITE_SCALES, LiteTrunk, WeightsFile, load_lite_trunk, new_lite_trunk
from .rng import seeded

Label = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
"""Name of a field of the metadata that classes images."""
IDENTITY = "config_sha256"
"""Key of the weights file's metadata with the hash of the configuration that belongs to it."""
HEAD_WIDTH = 1280
FINE = 3
"""Number of scales, from the finest, whose channels are compared with each other."""
SPREAD = 1e-4
"""Variance that is added to that of a scale, so that the gradient of its root is finite."""


class ClassifierConfig(Config):
    """Labels and input of a classifier."""

    kind: Literal["classifier"] = "classifier"
    size: int = Field(96, ge=32)
    """Side to which images are resized (px)."""
    labels: Annotated[dict[Label, tuple[str, ...]], Field(min_length=1)]
    """Values of each label in the order of its head's outputs."""

    @model_validator(mode="after")
    def _distinct(self) -> ClassifierConfig:
        for name, values in self.labels.items():
            if len(set(values)) != len(values) or len(values) < 2:
                raise ValueError(f"labels.{name}: expected at least two values, each once")
        return self


class Classifier(nn.Module):
    """Classifier of images ``[B, 3, S, S]`` in [-1, 1]; without a ``trunk``, all weights are random by ``seed``."""

    def __init__(self, cfg: ClassifierConfig, trunk: LiteTrunk | None = None, seed: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.trunk = trunk or new_lite_trunk("classifier", seed)
        self.trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs
        self.width = 2 * sum(LITE_SCALES) + HEAD_WIDTH + sum(n * (n - 1) // 2 for n in LITE_SCALES[:FINE])
        self.register_buffer("shift", torch.zeros(self.width))
        self.register_buffer("scale", torch.ones(self.width))
        with seeded(seed):
            self.heads = nn.ModuleDict({name: nn.Linear(self.width, len(each)) for name, each in cfg.labels.items()})

    def features(self, images: Tensor) -> Tensor:
        """Compute features ``[B, D]`` of images."""
        scales = self.trunk(images.contiguous(memory_format=torch.channels_last))
        parts = [scale.mean((2, 3)) for scale in scales]
        parts += [(scale.var((2, 3), unbiased=False) + SPREAD).sqrt() for scale in scales]
        return torch.cat([*parts, self.embed(scales), *(_covariances(scale) for scale in scales[:FINE])], 1)

    def embed(self, scales: list[Tensor]) -> Tensor:
        """Compute the features ``[B, HEAD_WIDTH]`` of the whole network from those of its scales."""
        network = self.trunk.network
        return network._swish(network._bn1(network._conv_head(scales[-1]))).mean((2, 3))

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Compute the logits ``[B, values]`` of each label from ``features [B, D]``."""
        x = (features - self.get_buffer("shift")) * self.get_buffer("scale")
        return {name: head(x) for name, head in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.classify(self.features(images))

    def set_heads(self, shift: Tensor, scale: Tensor, heads: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set shift and scale ``[D]`` of the features, and weights ``[values, D]`` and biases of each label's head."""
        state = {"shift": shift, "scale": scale}
        for name, (weight, bias) in heads.items():
            state |= {f"heads.{name}.weight": weight, f"heads.{name}.bias": bias}
        self.load_state_dict(state, strict=False)

    def train(self, mode: bool = True) -> Classifier:
        """Keep eval mode, so that the trunk's normalization statistics stay those of its weights."""
        return super().train(False)


def _covariances(scale: Tensor) -> Tensor:
    """Compute the signed roots of the covariances over positions of each two channels of ``[B, C, H, W]``."""
    apart = scale.flatten(2) - scale.mean((2, 3)).unsqueeze(2)
    first, second = torch.triu_indices(scale.shape[1], scale.shape[1], 1)
    found = (apart @ apart.transpose(1, 2) / apart.shape[2])[:, first, second]
    return found.sign() * found.abs().sqrt()


def new_classifier(cfg: ClassifierConfig, weights: WeightsFile, seed: int = 0) -> Classifier:
    """Create a classifier over EfficientNet-Lite0 with ``weights``; its heads are random by ``seed``.

    The weights are ``published``, ``random`` (by ``seed`` too) or a local file.
    """
    return Classifier(cfg, load_lite_trunk(weights, "classifier", seed), seed).eval().requires_grad_(False)


def save_classifier(folder: Path, model: Classifier, about: Mapping[str, Any]) -> None:
    """Write a classifier to an existing local ``folder``; ``about`` are further sections of ``config.yaml``."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    config = {"model": model.cfg.model_dump(mode="json"), **about}
    save_file(state, folder / WEIGHTS, metadata={IDENTITY: _identity(config)})
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def load_classifier(folder: str | Path, device: str = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """Load a classifier in eval mode, and its whole configuration with data and accuracy.

    Raises UserError if the folder holds another model, and if configuration and weights do not belong together.
    """
    config = read_checkpoint_config(folder)
    path = Path(folder) / WEIGHTS
    if config["model"].get("kind") != "classifier":
        raise UserError(f"{folder}: holds a model of kind {config['model'].get('kind')}, expected a classifier")
    cfg = validate(ClassifierConfig, config["model"], str(Path(folder) / CONFIG))
    state = read_tensors(path, device)
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get(IDENTITY) != _identity(config):
            raise UserError(f"{folder}: {CONFIG} is not the one that {WEIGHTS} was written with")
    model = Classifier(cfg)
    if problem := misfit(model.state_dict(), state):
        raise UserError(f"{path}: {problem}")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False).to(device), config


def resized(images: Tensor, size: int) -> Tensor:
    """Resize ``[B, 3, H, W]`` to ``size`` with antialiasing; unchanged if they have it."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


def _identity(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
