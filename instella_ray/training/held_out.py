"""Held-out loss: samples that are never trained on, evaluated with the same random numbers each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.formats.patterns import Pattern, absolute_pattern
from ..data.loading.loader import Data, Mixture, Prefetcher
from ..data.loading.split import ColumnData, FileData, split_off
from ..errors import UserError
from ..models import rng
from .distributed import ranks
from .learner import Learner
from .means import Means
from .optim import EMA
from .settings import HELD_OUT, HeldOutConfig

SEED = 0
"""Seed of timesteps, noise and crops: the run's seed may be changed when it is resumed."""


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out samples of a task, and how their loss is computed."""

    data: Data
    count: int
    """Number of samples: those at 0 to ``count - 1``."""
    module: nn.Module
    """``forward(**inputs) -> (loss, parts)`` in evaluation mode; shares the weights that are trained. Scalar parts are means
    over the batch, others sums."""
    inputs: Callable[[Any, Tensor], dict[str, Any]]
    """Returns keyword arguments of ``module`` from a batch and the seeds of its samples, int64 ``[B]``."""
    summary: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict
    """Reduces the parts' means to scalars."""


def hold_out(
    sources: Sequence[FileData], weights: Sequence[int], cfg: HeldOutConfig | None, load: Callable[[Pattern], FileData]
) -> tuple[Sequence[ColumnData], Data | None]:
    """Return ``sources`` without their held-out samples, and these: split off by ``weights``, or from ``load(cfg.data)``.

    UserError if a source has too few samples.
    """
    if cfg is None:
        return sources, None
    if cfg.data is not None:
        return sources, load(cfg.data).with_seed(SEED)
    counts = shares(cfg, [len(source) for source in sources], weights)
    pairs = [split_off(source, count, SEED) for source, count in zip(sources, counts, strict=True)]
    rest, held_out = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return rest, Mixture(held_out, weights, SEED) if len(held_out) > 1 else held_out[0]


def shares(cfg: HeldOutConfig | None, lengths: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Return the number of samples to split off sources of these ``lengths``, by ``weights``; UserError for too many."""
    if cfg is None or cfg.data is not None:
        return [0] * len(lengths)
    counts = [math.ceil(cfg.samples * weight / sum(weights)) for weight in weights]
    for count, length in zip(counts, lengths, strict=True):
        if count >= length:
            found = f"{count} of the {length} samples of a source, none would be left to train on"
            raise UserError(f"train.held_out.samples {cfg.samples}: {found}")
    return counts


def complete_held_out(cfg: HeldOutConfig | None, check: Callable[[Pattern], None]) -> HeldOutConfig | None:
    """Return ``cfg`` with absolute paths, as workers need it; ``check`` raises UserError for data that cannot be used."""
    if cfg is None or cfg.data is None:
        return cfg
    check(cfg.data)
    return cfg.model_copy(update={"data": absolute_pattern(cfg.data)})


def held_out_set(
    cfg: HeldOutConfig | None,
    data: Data | None,
    module: nn.Module,
    inputs: Callable[[Any, Tensor], dict[str, Any]],
    summary: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> HeldOutSet | None:
    """Return the held-out set of a task from its configuration; None without one."""
    if cfg is None or data is None:
        return None
    return HeldOutSet(data, min(cfg.samples, len(data)), module, inputs, summary)


def held_out_metrics(held_out: HeldOutSet, learner: Learner, ema: EMA, size: int) -> dict[str, float]:
    """Evaluate the EMA weights, and the loss of the raw ones, in batches of ``size``; collective.

    The ranks share the batches. Returns the same metrics on every rank:
    ``held_out_NAME`` for each part, and ``held_out_loss_raw``.
    """
    with ema.swapped(learner.model):
        averaged = _means(held_out, learner, size)
    raw = _means(held_out, learner, size)["loss"]
    metrics = {**held_out.summary(averaged), "loss_raw": raw}
    return {HELD_OUT + name: round(float(value), 6) for name, value in metrics.items()}


def _means(held_out: HeldOutSet, learner: Learner, size: int) -> dict[str, Tensor]:
    (rank, world), batches, means = ranks(), math.ceil(held_out.count / size), Means()
    # Sharded weights are gathered by all ranks together: each has as many turns, even if there is no batch left for it.
    turns = math.ceil(batches / world)

    def indices(turn: int) -> np.ndarray:
        first = size * ((turn * world + rank) % batches)
        return np.arange(first, min(first + size, held_out.count))

    training = learner.model.training
    held_out.module.eval()
    try:
        with closing(Prefetcher(lambda turn: held_out.data.batch(0, indices(turn)), 0, turns)) as loaded:
            for turn, batch in enumerate(loaded):
                index = indices(turn)
                seeds = rng.sample_seeds(SEED, 0, torch.from_numpy(index))
                loss, parts = learner.evaluate(held_out.module, held_out.inputs(batch, seeds))
                values = {"loss": loss, **parts}
                values = {name: v if v.ndim == 0 else v / len(index) for name, v in values.items()}
                means.add(values, torch.tensor(len(index) if turn * world + rank < batches else 0))
    finally:
        held_out.module.train(training)
    return means.means()
