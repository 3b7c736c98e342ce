"""Model folders: ``model.safetensors``, ``ema.safetensors`` and ``config.yaml``, saved and loaded without pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import read_yaml, validate
from ..errors import UserError
from .bit import BIT, BITConfig
from .generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator

ModelConfig = BITConfig | GeneratorConfig
Model = BIT | DiffusionGenerator | ARGenerator
M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS, EMA = "config.yaml", "model.safetensors", "ema.safetensors"


def save_model(
    folder: str | Path, model: Model, *, ema: Mapping[str, Tensor] | None = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write ``model`` (and its EMA weights) to an existing local ``folder``.

    ``extra`` are further sections of ``config.yaml``, such as the text encoder and tokenizer hash of a generator.
    """
    save_weights(Path(folder), model.cfg, model.state_dict(), ema=ema, extra=extra)


def save_weights(
    folder: Path,
    cfg: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    ema: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's tensors to an existing local ``folder``, as :func:`save_model`."""
    for name, state in ((WEIGHTS, weights), (EMA, ema)):
        if state is not None:
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / name)
    config = {"model": cfg.model_dump(mode="json"), **(extra or {})}
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def add_section(folder: str | Path, name: str, section: Mapping[str, Any]) -> None:
    """Add a section to the ``config.yaml`` of a model folder."""
    config = {**read_checkpoint_config(folder), name: dict(section)}
    (Path(folder) / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def read_checkpoint_config(folder: str | Path) -> dict[str, Any]:
    """Read the folder's ``config.yaml``; UserError if it is not a model folder."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: not a model folder (no {CONFIG}); expected {CONFIG} and {WEIGHTS}")
    config = read_yaml(str(path))
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path}: expected a section 'model' with the sizes of a model")
    return config


def parse_model(section: Mapping[str, Any], source: str | None = None) -> ModelConfig:
    """Validate the ``model`` section of a ``config.yaml``; UserError names ``source`` and the wrong key."""
    if section.get("kind") == "bit":
        return validate(BITConfig, section, source)
    return validate(GeneratorConfig, section, source)


def build_model(section: Mapping[str, Any]) -> Model:
    """Build a new model from the ``model`` section of a ``config.yaml``."""
    return _new(parse_model(section))


def assemble(cfg: ModelConfig, state: Mapping[str, Tensor], source: str | Path) -> Model:
    """Build a model in eval mode from the tensors of ``state``; UserError names ``source`` if they do not fit."""
    with torch.device("meta"):
        model = _new(cfg)
    if problem := misfit(model.state_dict(), state):
        raise UserError(f"{source}: {problem}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def load_model(folder: str | Path, *, ema: bool = True, device: str | torch.device = "cpu") -> Model:
    """Load the model of a folder in eval mode, with EMA weights if it has them and ``ema`` is true.

    Weights are float32, whatever the file's precision.
    """
    cfg = parse_model(read_checkpoint_config(folder)["model"], str(Path(folder) / CONFIG))
    path = _weights_file(folder, ema)
    return assemble(cfg, read_tensors(path, device), path).float()


def load_expected(folder: str | Path, kind: type[M], *, ema: bool = True, device: str | torch.device = "cpu") -> M:
    """Load a model as :func:`load_model`; UserError if it is not a ``kind``."""
    model = load_model(folder, ema=ema, device=device)
    if not isinstance(model, kind):
        raise UserError(f"{folder}: holds a {type(model).__name__}, expected a {kind.__name__}")
    return model


def check_weights(folder: str | Path) -> None:
    """Raise UserError if :func:`load_model` would refuse the folder's weights; reads names and shapes only."""
    cfg = parse_model(read_checkpoint_config(folder)["model"], str(Path(folder) / CONFIG))
    path = _weights_file(folder, ema=True)
    with torch.device("meta"):
        expected = _new(cfg).state_dict()
        with _complete(path), safe_open(path, "pt") as file:
            found = {name: torch.empty(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if problem := misfit(expected, found):
        raise UserError(f"{path}: {problem}")


def read_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; UserError if it is not one or is truncated."""
    with _complete(path):
        return load_file(path, device=str(device))


@contextmanager
def _complete(path: str | Path) -> Iterator[None]:
    """Raise UserError for the errors of a file that is no safetensors file, or not a whole one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a complete safetensors file ({reason})") from None


def weight_hash(source: str | Path | nn.Module, *, ema: bool = True) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of the weights that :func:`load_model` would load.

    Files of less precision have the hash of their values as float32.
    """
    if isinstance(source, nn.Module):
        state = source.state_dict()
    else:
        state = read_tensors(_weights_file(source, ema))
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _new(cfg: ModelConfig) -> Model:
    return BIT(cfg) if isinstance(cfg, BITConfig) else build_generator(cfg)


def misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Describe the first difference in names or shapes in one line; None if ``state`` fits."""
    problems = [f"no tensor {name}" for name in expected if name not in state]
    problems += [f"tensor {name} is not part of the model" for name in state if name not in expected]
    problems += [
        f"tensor {name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if not problems:
        return None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"the weights do not fit the model: {problems[0]}{more}"


def _weights_file(folder: str | Path, ema: bool) -> Path:
    folder = Path(folder)
    for name in (EMA, WEIGHTS) if ema else (WEIGHTS,):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {WEIGHTS} found")
