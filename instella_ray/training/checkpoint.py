"""Training checkpoints: a model folder plus the optimizer and the step, in safetensors and JSON. No pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.checkpoint import EMA as EMA_FILE
from ..models.checkpoint import WEIGHTS, Model, save_model
from .optim import EMA

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    model: Model,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Write everything that :func:`restore_checkpoint` needs into ``folder``, which must exist."""
    save_model(folder, model, ema=ema.state, extra=extra)
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, folder / OPTIMIZER)
    # Last: a folder with its state is a complete one.
    (folder / STATE).write_text(json.dumps(dict(state), indent=1))


def restore_checkpoint(folder: Path, model: Model, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights, average and optimizer in place; returns the saved state."""
    model.load_state_dict(load_file(folder / WEIGHTS))
    for name, value in load_file(folder / EMA_FILE).items():
        ema.state[name].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / OPTIMIZER).items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return json.loads((folder / STATE).read_text())
