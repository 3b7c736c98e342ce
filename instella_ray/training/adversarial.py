"""Adversarial training of the tokenizer's third stage: discriminator loss and adaptive weight of the adversarial loss."""

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
"""Uniform numbers per image: two for the crop position, the rest for the augmentation."""


class AdversarialConfig(Config):
    """Settings of adversarial training against a discriminator on frozen features."""

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    start_step: int = Field(1000, ge=1)
    """First step (from 0) with the adversarial loss; the discriminator itself is trained from step 0."""
    weight: float = Field(0.1, ge=0)
    """Weight of the adversarial loss, times the ratio of gradient norms at the last layer (supervised : adversarial)."""
    largest_ratio: float = Field(1e4, gt=0)
    """Upper limit of the ratio, because the adversarial gradient of an undecided discriminator is nearly zero."""
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer of the discriminator heads."""


class DiscriminatorLoss(nn.Module):
    """Hinge loss of the discriminator heads on one micro-batch; also contains the frozen features."""

    def __init__(self, cfg: AdversarialConfig, features: FrozenFeatures, heads: nn.Module) -> None:
        super().__init__()
        self.cfg, self.features, self.heads = cfg, features, heads

    def forward(self, images: Tensor, targets: Tensor, draws: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts of detached reconstructions ``images`` and ``targets``, ``[B, 3, H, W]``.

        Both are augmented identically by ``draws [B, DRAWS]``.
        """
        with torch.no_grad():
            seen = [self.maps(view, draws) for view in (targets, images)]
        true, restored = (self.heads(maps).float() for maps in seen)
        loss = hinge_loss(true, restored)
        return loss, {"discriminator": loss, "logits_true": true.mean(), "logits_restored": restored.mean()}

    def maps(self, images: Tensor, draws: Tensor) -> list[Tensor]:
        """Return the features of the augmented whole image and, for a larger image, of a crop at ``draws[:, :2]``."""
        size = self.cfg.discriminator.size
        views = [resized(images, size)]
        if min(images.shape[-2:]) > size:
            views.append(cropped(images.float(), size, draws[:, :2]))
        return self.features(torch.cat([augment(view, draws[:, 2:], self.cfg.augment) for view in views]))


class DiscriminatorState(nn.Module):
    """Checkpointed state of the discriminator: the heads, and the gradient norm ratio of each output size."""

    def __init__(self, heads: DiscriminatorHeads, output_sizes: int) -> None:
        super().__init__()
        self.heads = heads
        self.ratios: Tensor
        self.register_buffer("ratios", torch.zeros(output_sizes))


class Adversary:
    """The discriminator of a run; implements :class:`.trainer.DiscriminatorTask`.

    The adaptive weight comes from the previous step of the same output size (0 in the first): a ratio of gradients of the
    global batch, so that it depends neither on the micro-batch size nor on the number of workers.
    """

    def __init__(self, cfg: AdversarialConfig, output_sizes: int, seed: int) -> None:
        self.cfg = cfg
        self.optimizer = cfg.optimizer
        features = FrozenFeatures(cfg.discriminator, seed)
        heads = DiscriminatorHeads(features.channels, len(cfg.discriminator.blocks), cfg.discriminator.width)
        self.model = DiscriminatorState(heads, output_sizes)
        self.step_module = DiscriminatorLoss(cfg, features, heads)
        self.step, self.size_index = 0, 0
        self._gradients: Tensor | None = None
        self._pair: dict[str, Tensor] = {}

    def before_step(self, step: int, size_index: int) -> None:
        """Start step ``step`` with the output size of index ``size_index``; called before every step."""
        self.step, self.size_index = step, size_index
        self._gradients = None

    def add_loss(
        self, loss: Tensor, images: Tensor, targets: Tensor, draws: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the weighted adversarial loss to the supervised ``loss``; returns the sum and the parts to log.

        Accumulates the gradients of both losses with respect to ``last_layer`` for the next step's weight.
        """
        self._pair = {"images": images.detach(), "targets": targets, "draws": draws}
        if self.step < self.cfg.start_step - 1:
            return loss, {}
        # Detached parameters: this loss trains the tokenizer and must not add gradients to the heads.
        heads = self.model.heads
        constant = {name: value.detach() for name, value in heads.named_parameters()}
        maps = self.step_module.maps(images, draws)
        adversarial = -functional_call(heads, constant, (maps,)).float().mean()
        self._accumulate(last_layer_gradients(loss, adversarial, last_layer))
        weight = self.cfg.weight * self.model.ratios[self.size_index] * (self.step >= self.cfg.start_step)
        return loss + weight * adversarial, {"adversarial": adversarial, "adversarial_weight": weight}

    def inputs(self) -> dict[str, Any]:
        """Return the step module's arguments: the tokenizer's latest reconstructions and their targets."""
        pair, self._pair = self._pair, {}
        return pair

    def after_backward(self) -> None:
        """Compute the weight of the next step of this output size; called once per step on every rank."""
        if self._gradients is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._gradients)
        self.model.ratios[self.size_index] = gradient_ratio(self._gradients, self.cfg.largest_ratio)

    def _accumulate(self, gradients: Tensor) -> None:
        self._gradients = gradients if self._gradients is None else self._gradients + gradients


def last_layer_gradients(supervised: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return gradients ``[2, *]`` of both losses with respect to the last layer's weights; retains the graph."""
    losses = (supervised, adversarial)
    found = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].detach().float() for loss in losses]
    return torch.stack(found)


def gradient_ratio(gradients: Tensor, largest: float) -> Tensor:
    """Return the norm of the first gradient divided by that of the second (VQGAN's adaptive weight), up to ``largest``."""
    supervised, adversarial = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return (supervised / adversarial.clamp(min=1e-12)).clamp(max=largest)
