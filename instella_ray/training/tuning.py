"""Tuning of the trunk of a classifier: softmax cross entropy of all labels over augmented views of its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .. import logs
from ..config import Config
from ..data.formats.images import to_tensor
from ..data.loading.labelled import LabelledImages
from ..models.classifier import HEAD_WIDTH, Classifier
from ..models.perceptual import LITE_BLOCKS
from ..models.rng import seeded

FIRST = LITE_BLOCKS[1] + 1
"""First block that is tuned: the finest scales are over half of the time, and know lines and gradients already."""
MOMENTUM = 0.1
"""Weight of a batch in the normalization statistics, which are those of photographs at first."""


class TuningConfig(Config):
    """Tuning of EfficientNet-Lite0 by AdamW with cosine decay, before the heads are fitted."""

    epochs: int = Field(8, ge=1)
    """Augmented views of each image; the time is proportional to it."""
    learning_rate: float = Field(1e-3, gt=0)
    """Highest learning rate, after a tenth of the steps."""
    weight_decay: float = Field(0.05, ge=0)
    """Of AdamW: share of the weights, times the learning rate, that is taken off at each step."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the probability that is spread over all values of a label."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the features that the heads do not see at a step."""


def tune(
    model: Classifier,
    images: LabelledImages,
    classes: Mapping[str, Tensor],
    cfg: TuningConfig,
    batch_size: int,
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor],
) -> None:
    """Tune the trunk of ``model`` to ``images`` of ``classes [N]`` by label, in place; its heads are not used.

    The heads of the softmax are temporary, over the features of the whole network. Batches, views and dropout are drawn by
    ``seed``.
    """
    network = model.trunk.network
    tuned = [*network._blocks[FIRST:], network._conv_head, network._bn1]
    norms = [norm for module in tuned for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    parameters = [p.requires_grad_() for module in tuned for p in module.parameters()]
    for norm in norms:
        norm.train().momentum = MOMENTUM
    loss_of = partial(F.cross_entropy, label_smoothing=cfg.label_smoothing)
    with seeded(seed):
        drawn = torch.Generator().manual_seed(seed)
        standard = nn.Sequential(nn.BatchNorm1d(HEAD_WIDTH, affine=False), nn.Dropout(cfg.dropout))
        heads = {name: nn.Linear(HEAD_WIDTH, len(values)) for name, values in model.cfg.labels.items()}
        parameters += [p for head in heads.values() for p in head.parameters()]
        optimizer = torch.optim.AdamW(parameters, cfg.learning_rate, weight_decay=cfg.weight_decay)
        batches = max(1, len(images) // batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, steps=cfg.epochs * batches))
        with logs.progress_bar(total=cfg.epochs * len(images), desc="tune", unit="view") as bar:
            for _ in range(cfg.epochs):
                for rows in torch.randperm(len(images), generator=drawn).tensor_split(batches):
                    views = augment(to_tensor(images.images[rows.numpy()]), drawn)
                    x = standard(model.embed(model.trunk(views.contiguous(memory_format=torch.channels_last))))
                    loss = torch.stack([loss_of(head(x), classes[name][rows]) for name, head in heads.items()]).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                    bar.update(len(views))
    for norm in norms:
        norm.eval()
    model.requires_grad_(False)


def factor(step: int, steps: int) -> float:
    """Return the learning rate of a step relative to the highest one: it rises for a tenth of the steps."""
    rise = max(1, steps // 10)
    return min((step + 1) / rise, (1 + math.cos(math.pi * step / steps)) / 2)
