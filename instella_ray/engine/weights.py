"""Weights of a generator replica: loading them into an engine, and compatibility checks before a swap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..accelerator import Precision, compute_dtype
from ..config import Config
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import load_model, read_checkpoint_config
from ..models.generator import GeneratorConfig
from ..models.text_encoder import TextEncoderConfig
from .engine import StepEngine
from .kinds import build_engine
from .slots import EngineOptions


class Weights(Config):
    """Serve's ``user_config`` of a generator deployment; changing it swaps the weights of running replicas."""

    path: str
    """Model folder."""
    version: str | None = None
    """Any text; a new value reloads the weights from the same folder."""


@dataclass(frozen=True)
class Identity:
    """Properties that two generators must share to be interchangeable behind one text encoder and decoder."""

    tokenizer_hash: str | None
    text_encoder: TextEncoderConfig | None
    num_tokens: int
    bits_per_token: int

    @classmethod
    def of(cls, path: str) -> Identity:
        """Read the identity of a model folder; raises UserError if it holds no generator."""
        config = read_checkpoint_config(path)
        if config["model"].get("kind") == "bit":
            raise UserError(f"{path}: holds a tokenizer, expected a generator")
        model, text = GeneratorConfig.model_validate(config["model"]), config.get("text_encoder")
        encoder = TextEncoderConfig.model_validate(text) if text is not None else None
        return cls(config.get("tokenizer_hash"), encoder, model.num_tokens, model.bits_per_token)

    def check(self, other: Identity, path: str) -> None:
        """Raise UserError with the difference if ``other``, the identity of the model at ``path``, is incompatible."""
        if other.tokenizer_hash != self.tokenizer_hash:
            raise UserError(f"{path}: was trained on codes of another tokenizer than the served weights")
        if other.text_encoder != self.text_encoder:
            raise UserError(f"{path}: uses another text encoder than the served weights")
        mine, its = (f"{m.num_tokens} tokens of {m.bits_per_token} bits" for m in (self, other))
        if mine != its:
            raise UserError(f"{path}: generates {its}, expected {mine} as the served weights")


def serving_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Return the dtype of weights; ``auto`` is bfloat16 on GPUs and float32 on all CPUs.

    It ignores what a CPU supports, because replicas on different machines must give identical bits.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return compute_dtype(device, precision)


def load_engine(
    path: str, empty_prompt: Tensor, options: EngineOptions, device: torch.device, precision: Precision
) -> StepEngine:
    """Load the generator of a model folder into a new engine; ``empty_prompt [layers, T, width]``.

    Raises UserError for a folder that holds a tokenizer.
    """
    model = load_model(path, device=device)
    if isinstance(model, BIT):
        raise UserError(f"{path}: holds a tokenizer, expected a generator")
    return build_engine(model.to(serving_dtype(device, precision)), empty_prompt, options)
