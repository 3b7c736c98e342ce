"""An endpoint before any stage runs: its folders looked into, its settings checked. The same on Serve and in one process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import storage
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import load_expected, read_checkpoint_config, weight_hash
from ..models.text_encoder import TextEncoder, TextEncoderConfig, resolve_name
from .access import ApiKeys
from .api import Served, Service
from .config import ServeArgs, StageArgs
from .graph import Graph


@dataclass(frozen=True)
class Setup:
    """What the stages and the API of an endpoint are made with."""

    args: ServeArgs
    keys: ApiKeys
    served: Served
    text_config: TextEncoderConfig
    empty_prompt: np.ndarray
    """Features of the unconditional prompt, float32 ``[layers, T, width]``."""

    @classmethod
    def of(cls, args: ServeArgs) -> Setup:
        """Look into the folders of ``args``.

        UserError when one is missing or its model does not belong to the tokenizer, or settings contradict.
        """
        args.check()
        keys = ApiKeys.load(args.api_keys_file)
        served, text_config = _look_into_folders(args)
        # A longer prompt is cut, with a warning, to what a slot has room for.
        limit = min(text_config.max_length, args.text_length)
        text_config = text_config.model_copy(update={"max_length": limit})
        return cls(args, keys, served, text_config, _empty_prompt(text_config))

    def text(self) -> dict[str, Any]:
        """Arguments of :class:`.deployments.TextEncoderStage`."""
        args = self.args
        return {
            "cfg": self.text_config,
            "threads": args.threads,
            "device": self._device(args.text),
            "precision": args.precision,
            # Prompts in a batch change each other's last digits, and with them a bit of an image here and there.
            "batch_invariant": all(model.batch_invariant for model in args.models.values()),
        }

    def decoder(self) -> dict[str, Any]:
        """Arguments of :class:`.deployments.DecoderStage`."""
        args = self.args
        return {
            "path": storage.absolute(args.tokenizer),
            "threads": args.threads,
            "device": self._device(args.decoder),
            "precision": args.precision,
            "safety": args.safety,
        }

    def generator(self, name: str) -> dict[str, Any]:
        """Arguments of :class:`.deployments.GeneratorStage` for one of the models."""
        args, model = self.args, self.args.models[name]
        return {
            "path": storage.absolute(model.path),
            "empty_prompt": self.empty_prompt,
            "options": model.options(args.text_length),
            "threads": args.threads,
            "device": self._device(model),
            "longest_step_s": model.longest_step_s,
            "precision": args.precision,
        }

    def service(self, graph: Graph) -> Service:
        """What the API's routes call, over the stages of ``graph``."""
        limited = self.args.limits.prompt_tokens is not None
        count = partial(_count_tokens, _tokenizer(self.text_config)) if limited else None
        return Service(self.args, self.served, graph, count)

    def _device(self, stage: StageArgs) -> str:
        return "auto" if self.args.gpus(stage) else "cpu"


def _empty_prompt(cfg: TextEncoderConfig) -> np.ndarray:
    empty = TextEncoder.from_config(cfg).encode([""])
    return empty.features[:, 0, empty.mask[0]].numpy()


def _tokenizer(cfg: TextEncoderConfig) -> Any:
    from transformers import AutoTokenizer

    extra = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
    return AutoTokenizer.from_pretrained(resolve_name(cfg.name), **extra)


def _count_tokens(tokenizer: Any, prompt: str) -> int:
    return len(tokenizer(prompt, truncation=False)["input_ids"])


def _look_into_folders(args: ServeArgs) -> tuple[Served, TextEncoderConfig]:
    bit = load_expected(args.tokenizer, BIT)
    bit_hash, multiple = weight_hash(bit), bit.cfg.decode_multiple
    wrong = next((size for size in args.sizes if size % multiple), None)
    if wrong is not None:
        raise UserError(f"sizes {wrong}: not a multiple of {multiple}, as tokenizer {args.tokenizer} needs to decode")
    encoders, kinds = [], {}
    for name, model in args.models.items():
        config = read_checkpoint_config(model.path)
        if config.get("tokenizer_hash") != bit_hash:
            raise UserError(
                f"models.{name}: {model.path} was trained on codes of another tokenizer than {args.tokenizer}"
            )
        kinds[name] = str(config["model"].get("kind"))
        encoders.append(TextEncoderConfig.model_validate(config["text_encoder"]))
    if any(encoder != encoders[0] for encoder in encoders):
        raise UserError("models: all generators of one endpoint must read the same text encoder")
    return Served(bit.cfg.num_tokens, bit.cfg.bits_per_token, kinds, bit_hash), encoders[0]
