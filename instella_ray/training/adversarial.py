"""The third stage's discriminator: how it learns, and how much of its verdict the decoder gets to hear."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ..config import Config
from ..models.discriminator import DiscriminatorConfig, DiscriminatorHeads, FrozenFeatures, hinge_loss
from .losses import DRAWS as AUGMENT_DRAWS
from .losses import AugmentConfig, augment, cropped, resized
from .settings import OptimizerConfig

DRAWS = 2 + AUGMENT_DRAWS
"""Uniform numbers an image: the crop's place, and the augmentation's."""


class AdversarialConfig(Config):
    """Training against a discriminator on frozen features."""

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    start_step: int = Field(1000, ge=1)
    """First step (from 0) at which the tokenizer learns from the discriminator, which itself learns from step 0."""
    weight: float = Field(0.1, ge=0)
    """Weight of the adversarial loss, times the ratio of gradient norms at the last layer (supervised : adversarial)."""
    largest_ratio: float = Field(1e4, gt=0)
    """The ratio is cut here: a discriminator without an opinion has hardly any gradient."""
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the discriminator's heads."""


class DiscriminatorLoss(nn.Module):
    """Hinge loss of the heads on one micro-batch; wraps the frozen features too."""

    def __init__(self, cfg: AdversarialConfig, features: FrozenFeatures, heads: nn.Module) -> None:
        super().__init__()
        self.cfg, self.features, self.heads = cfg, features, heads

    def forward(self, images: Tensor, targets: Tensor, draws: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of restored ``images`` without gradient and their ``targets``, both changed in the same way by ``draws``."""
        with torch.no_grad():
            seen = [self.maps(view, draws) for view in (targets, images)]
        true, restored = (self.heads(maps).float() for maps in seen)
        loss = hinge_loss(true, restored)
        return loss, {"discriminator": loss, "logits_true": true.mean(), "logits_restored": restored.mean()}

    def maps(self, images: Tensor, draws: Tensor) -> list[Tensor]:
        """Features of the whole image, and of the crop at ``draws[:, :2]`` of a large one, both augmented."""
        size = self.cfg.discriminator.size
        views = [resized(images, size)]
        if min(images.shape[-2:]) > size:
            views.append(cropped(images.float(), size, draws[:, :2]))
        return self.features(torch.cat([augment(view, draws[:, 2:], self.cfg.augment) for view in views]))


class Learned(nn.Module):
    """What a checkpoint keeps of the discriminator: the heads, and the ratio of gradient norms of each output size."""

    def __init__(self, heads: DiscriminatorHeads, output_sizes: int) -> None:
        super().__init__()
        self.heads = heads
        self.ratios: Tensor
        self.register_buffer("ratios", torch.zeros(output_sizes))


class Adversary:
    """The discriminator of a run; satisfies :class:`.task.DiscriminatorTask`.

    The adaptive weight is that of the last step of the same output size (0 before there is one): a ratio of the whole batch's
    gradients, so that it depends neither on how the batch is cut into micro-batches nor on the number of workers.
    """

    def __init__(self, cfg: AdversarialConfig, output_sizes: int, seed: int) -> None:
        self.cfg = cfg
        self.optimizer = cfg.optimizer
        features = FrozenFeatures(cfg.discriminator, seed)
        heads = DiscriminatorHeads(features.channels, len(cfg.discriminator.blocks), cfg.discriminator.width)
        self.model = Learned(heads, output_sizes)
        self.step_module = DiscriminatorLoss(cfg, features, heads)
        self.step, self.size_index = 0, 0
        self._gradients: Tensor | None = None
        self._pair: dict[str, Tensor] = {}

    def before_step(self, step: int, size_index: int) -> None:
        """Called before every step: its number, and which of the output sizes it has."""
        self.step, self.size_index = step, size_index
        self._gradients = None

    def judge(
        self, loss: Tensor, images: Tensor, targets: Tensor, draws: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The supervised ``loss`` with the adversarial one added, and what to log of it.

        Gradients of both by ``last_layer`` are noted for the next step's weight.
        """
        self._pair = {"images": images.detach(), "targets": targets, "draws": draws}
        if self.step < self.cfg.start_step - 1:
            return loss, {}
        # Constants in place of the heads' weights: this loss is the tokenizer's, and must leave them no gradient.
        heads = self.model.heads
        constant = {name: value.detach() for name, value in heads.named_parameters()}
        maps = self.step_module.maps(images, draws)
        adversarial = -functional_call(heads, constant, (maps,)).float().mean()
        self._note(last_layer_gradients(loss, adversarial, last_layer))
        weight = self.cfg.weight * self.model.ratios[self.size_index] * (self.step >= self.cfg.start_step)
        return loss + weight * adversarial, {"adversarial": adversarial, "adversarial_weight": weight}

    def inputs(self) -> dict[str, Any]:
        """Arguments for the step module: what the tokenizer has just restored."""
        pair, self._pair = self._pair, {}
        return pair

    def after_backward(self) -> None:
        """Called once a step on every worker: the weight for the next one of this output size."""
        if self._gradients is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._gradients)
        self.model.ratios[self.size_index] = gradient_ratio(self._gradients, self.cfg.largest_ratio)

    def _note(self, gradients: Tensor) -> None:
        self._gradients = gradients if self._gradients is None else self._gradients + gradients


def last_layer_gradients(supervised: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Gradients ``[2, *]`` of both losses by the last layer's weights; the graph is kept."""
    losses = (supervised, adversarial)
    found = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].detach().float() for loss in losses]
    return torch.stack(found)


def gradient_ratio(gradients: Tensor, largest: float) -> Tensor:
    """Norm of the first gradient over that of the second (VQGAN's adaptive weight), ``largest`` at most."""
    supervised, adversarial = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return (supervised / adversarial.clamp(min=1e-12)).clamp(max=largest)
