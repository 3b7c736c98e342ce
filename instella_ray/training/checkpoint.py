"""Training checkpoints: a model folder plus the optimizer and the step, in safetensors and JSON. No pickles.

A run with a discriminator keeps that and its optimizer beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.checkpoint import EMA as EMA_FILE
from ..models.checkpoint import WEIGHTS, Model, save_model
from .optim import EMA, Optimizers

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
DISCRIMINATOR, DISCRIMINATOR_OPTIMIZER = "discriminator.safetensors", "discriminator_optimizer.safetensors"


def save_checkpoint(
    folder: Path,
    model: Model,
    ema: EMA,
    optimizers: Optimizers,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Write everything that :func:`restore_checkpoint` needs into ``folder``, which must exist."""
    save_model(folder, model, ema=ema.state, extra=extra)
    _save_optimizers(folder / OPTIMIZER, optimizers)
    # Last: a folder with its state is a complete one.
    (folder / STATE).write_text(json.dumps(dict(state), indent=1))


def restore_checkpoint(folder: Path, model: Model, ema: EMA, optimizers: Optimizers) -> dict[str, Any]:
    """Load weights, average and optimizer in place; returns the saved state."""
    model.load_state_dict(load_file(folder / WEIGHTS))
    for name, value in load_file(folder / EMA_FILE).items():
        ema.state[name].copy_(value)
    _restore_optimizers(folder / OPTIMIZER, optimizers)
    return json.loads((folder / STATE).read_text())


def save_discriminator(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Write what :func:`restore_discriminator` needs into ``folder``; before :func:`save_checkpoint` completes it."""
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / DISCRIMINATOR)
    _save_optimizers(folder / DISCRIMINATOR_OPTIMIZER, optimizers)


def restore_discriminator(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Load weights and optimizer in place."""
    model.load_state_dict(load_file(folder / DISCRIMINATOR))
    _restore_optimizers(folder / DISCRIMINATOR_OPTIMIZER, optimizers)


def _save_optimizers(path: Path, optimizers: Optimizers) -> None:
    tensors = {
        f"{number}.{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, member in enumerate(optimizers.members)
        for index, values in member.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, path)


def _restore_optimizers(path: Path, optimizers: Optimizers) -> None:
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers.members]
    for key, value in load_file(path).items():
        number, index, name = key.split(".")
        moments[int(number)].setdefault(int(index), {})[name] = value
    for member, state in zip(optimizers.members, moments, strict=True):
        member.load_state_dict({"state": state, "param_groups": member.state_dict()["param_groups"]})
