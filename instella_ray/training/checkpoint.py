"""Training checkpoints: a model folder plus the optimizer and the step, in safetensors and JSON. No pickles.

Tensors are whole, however they were spread over the ranks: a run goes on with another number of those, or sharding. A run
with a discriminator keeps that and its optimizer beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from ..models.checkpoint import EMA, WEIGHTS, ModelConfig, read_tensors, save_weights
from .run_dir import STATE

OPTIMIZER = "optimizer.safetensors"
DISCRIMINATOR, DISCRIMINATOR_OPTIMIZER = "discriminator.safetensors", "discriminator_optimizer.safetensors"


class Discriminator(NamedTuple):
    """What is kept of a second model: its state, and its optimizer's."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


class Checkpoint(NamedTuple):
    """All that a run needs to go on."""

    step: int
    """Steps that it has behind it."""
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    """The optimizer's state, as :meth:`.learner.Learner.moments`."""
    discriminator: Discriminator | None


def save_checkpoint(folder: Path, cfg: ModelConfig, checkpoint: Checkpoint, extra: Mapping[str, Any]) -> None:
    """Write what :func:`read_checkpoint` reads into ``folder``, which must exist."""
    save_weights(folder, cfg, checkpoint.weights, ema=checkpoint.average, extra=extra)
    save_file(dict(checkpoint.moments), folder / OPTIMIZER)
    if checkpoint.discriminator is not None:
        save_file(dict(checkpoint.discriminator.weights), folder / DISCRIMINATOR)
        save_file(dict(checkpoint.discriminator.moments), folder / DISCRIMINATOR_OPTIMIZER)
    # Last: a folder with its state is a complete one.
    (folder / STATE).write_text(json.dumps({"step": checkpoint.step}, indent=1))


def read_checkpoint(folder: Path) -> Checkpoint:
    """What is in ``folder``; tensors are mapped into memory, and read where they are used."""
    rival = None
    if (folder / DISCRIMINATOR).is_file():
        rival = Discriminator(read_tensors(folder / DISCRIMINATOR), read_tensors(folder / DISCRIMINATOR_OPTIMIZER))
    step = json.loads((folder / STATE).read_text())["step"]
    weights, average, moments = (read_tensors(folder / name) for name in (WEIGHTS, EMA, OPTIMIZER))
    return Checkpoint(step, weights, average, moments, rival)
