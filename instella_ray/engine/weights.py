"""Which weights a generator replica serves, and whether others may take their place."""

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
from .engine import EngineOptions, StepEngine, build_engine


class Weights(Config):
    """Serve's ``user_config`` of a generator: changing it swaps the weights of running replicas."""

    path: str
    """Model folder."""
    version: str | None = None
    """Anything; another value reads the same folder again."""


@dataclass(frozen=True)
class Identity:
    """What a model has in common with those that can replace it behind the same text encoder and decoder."""

    tokenizer_hash: str | None
    text_encoder: TextEncoderConfig | None
    num_tokens: int
    bits_per_token: int

    @classmethod
    def of(cls, path: str) -> Identity:
        """That of a model folder; UserError where it holds no generator."""
        config = read_checkpoint_config(path)
        if config["model"].get("kind") == "bit":
            raise UserError(f"{path}: holds a tokenizer, expected a generator")
        model, text = GeneratorConfig.model_validate(config["model"]), config.get("text_encoder")
        encoder = TextEncoderConfig.model_validate(text) if text is not None else None
        return cls(config.get("tokenizer_hash"), encoder, model.num_tokens, model.bits_per_token)

    def check(self, other: Identity, path: str) -> None:
        """UserError that says in what the model at ``path``, which is ``other``, differs."""
        if other.tokenizer_hash != self.tokenizer_hash:
            raise UserError(f"{path}: was trained on codes of another tokenizer than the weights that are served")
        if other.text_encoder != self.text_encoder:
            raise UserError(f"{path}: reads another text encoder than the weights that are served")
        mine, its = (f"{m.num_tokens} tokens of {m.bits_per_token} bits" for m in (self, other))
        if mine != its:
            raise UserError(f"{path}: makes {its}, the weights that are served make {mine}")


def serving_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """With ``auto`` bfloat16 on GPUs, float32 on CPUs whichever: replicas on unequal machines must agree bit for bit."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return compute_dtype(device, precision)


def load_engine(
    path: str, empty_prompt: Tensor, options: EngineOptions, device: torch.device, precision: Precision
) -> StepEngine:
    """A new engine over the weights of a model folder; ``empty_prompt [layers, T, width]``."""
    model = load_model(path, device=device)
    if isinstance(model, BIT):
        raise UserError(f"{path}: holds a tokenizer, expected a generator")
    return build_engine(model.to(serving_dtype(device, precision)), empty_prompt, options)
