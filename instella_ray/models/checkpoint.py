"""Model folders: ``model.safetensors``, ``ema.safetensors`` and ``config.yaml``. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from .bit import BIT, BITConfig
from .generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator

Model = BIT | DiffusionGenerator | ARGenerator
M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS, EMA = "config.yaml", "model.safetensors", "ema.safetensors"


def save_model(
    folder: str | Path, model: Model, *, ema: Mapping[str, Tensor] | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write ``model`` (and its moving average) into an existing local ``folder``.

    ``extra`` are further sections of ``config.yaml``: the text encoder and tokenizer hash of a generator, say.
    """
    folder = Path(folder)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    if ema is not None:
        save_file({k: v.detach().cpu().contiguous() for k, v in ema.items()}, folder / EMA)
    config = {"model": model.cfg.model_dump(mode="json"), **(extra or {})}
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def read_checkpoint_config(folder: str | Path) -> dict[str, Any]:
    """The folder's ``config.yaml``; UserError where it is no model folder."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: not a model folder (no {CONFIG}); expected {CONFIG} and {WEIGHTS}")
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or "model" not in config:
        raise UserError(f"{path}: expected a section 'model'")
    return config


def build_model(section: Mapping[str, Any]) -> Model:
    """A new model from the ``model`` section of a ``config.yaml``."""
    if section.get("kind") == "bit":
        return BIT(BITConfig(**section))
    return build_generator(GeneratorConfig(**section))


def load_model(folder: str | Path, *, ema: bool = True, device: str | torch.device = "cpu") -> Model:
    """The model of a folder in eval mode, with its moving average where there is one and ``ema`` is true."""
    with torch.device("meta"):
        model = build_model(read_checkpoint_config(folder)["model"])
    model.load_state_dict(load_file(_weights_file(folder, ema), device=str(device)), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def load_expected(folder: str | Path, kind: type[M], *, ema: bool = True, device: str | torch.device = "cpu") -> M:
    """:meth:`load_model`, refusing a folder that holds another kind of model."""
    model = load_model(folder, ema=ema, device=device)
    if not isinstance(model, kind):
        raise UserError(f"{folder}: holds a {type(model).__name__}, expected a {kind.__name__}")
    return model


def weight_hash(source: str | Path | nn.Module, *, ema: bool = True) -> str:
    """Sha256 over names and bytes of the weights that :func:`load_model` would load: a model's identity."""
    if isinstance(source, nn.Module):
        state = source.state_dict()
    else:
        state = load_file(_weights_file(source, ema))
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights_file(folder: str | Path, ema: bool) -> Path:
    folder = Path(folder)
    for name in (EMA, WEIGHTS) if ema else (WEIGHTS,):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {WEIGHTS} found")
