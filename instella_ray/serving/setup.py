"""Setup of an endpoint before its stages start: reads model folders and checks settings, with and without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..engine.weights import Identity
from ..errors import UserError
from ..models.bit import BIT, BITConfig
from ..models.card import GeneratorCard
from ..models.checkpoint import check_weights, load_expected, read_checkpoint_config, weight_hash
from ..models.folders import find_model
from ..models.text_encoder import TextEncoder, TextEncoderConfig, resolve_name
from .api import Served, Service
from .config import ServeArgs, StageArgs
from .graph import Graph
from .keys import ApiKeys


@dataclass(frozen=True)
class Setup:
    """Inputs of the stages and the API of an endpoint."""

    args: ServeArgs
    keys: ApiKeys
    served: Served
    text_config: TextEncoderConfig
    empty_prompt: np.ndarray
    """Features of the unconditional prompt, float32 ``[layers, T, width]``."""

    @classmethod
    def of(cls, args: ServeArgs) -> Setup:
        """Read the model folders of ``args``.

        Raises UserError for missing folders, generators of another tokenizer and contradictory settings.
        """
        args.check()
        args = located(args)
        keys = ApiKeys.load(args.api_keys_file, args.models)
        served, text_config = _read_folders(args)
        args = _with_defaults(args, served.cards)
        args.check()
        # Longer prompts are truncated, with a warning, to the length of a slot.
        limit = min(text_config.max_length, args.text_length)
        text_config = text_config.model_copy(update={"max_length": limit})
        return cls(args, keys, served, text_config, _empty_prompt(text_config))

    def text(self) -> dict[str, Any]:
        """Return the arguments of :class:`.deployments.TextEncoderStage`."""
        args = self.args
        return {
            "cfg": self.text_config,
            "threads": args.threads,
            "device": self._device(args.text),
            "precision": args.precision,
            # Batching changes the last digits of the features, which can flip bits of an image.
            "batch_invariant": all(model.batch_invariant for model in args.models.values()),
        }

    def decoder(self) -> dict[str, Any]:
        """Return the arguments of :class:`.deployments.DecoderStage`."""
        args = self.args
        return {
            "path": args.tokenizer,
            "threads": args.threads,
            "device": self._device(args.decoder),
            "precision": args.precision,
            "file_threads": args.decoder.file_threads,
            "safety": args.safety,
        }

    def generator(self, name: str) -> dict[str, Any]:
        """Return the arguments of :class:`.deployments.GeneratorStage` for the model ``name``."""
        args, model = self.args, self.args.models[name]
        return {
            "path": model.path,
            "empty_prompt": self.empty_prompt,
            "options": model.options(args.text_length),
            "threads": args.threads,
            "device": self._device(model),
            "longest_step_s": model.longest_step_s,
            "precision": args.precision,
        }

    def service(self, graph: Graph) -> Service:
        """Return the request handler of one replica of the API, on top of ``graph``."""
        limited = self.args.limits.prompt_tokens is not None
        count = partial(_count_tokens, _tokenizer(self.text_config)) if limited else None
        return Service(self.args, self.served, graph, count)

    def _device(self, stage: StageArgs) -> str:
        # Not auto: a replica that reserves a GPU and finds none would compute on the CPU unnoticed.
        return "cuda" if self.args.gpus(stage) else "cpu"


def located(args: ServeArgs) -> ServeArgs:
    """Return ``args`` with the absolute paths of its model folders, which all stages then load, whatever is saved later."""
    models = {name: model.model_copy(update={"path": find_model(model.path)}) for name, model in args.models.items()}
    return args.model_copy(update={"tokenizer": find_model(args.tokenizer), "models": models})


def check_sizes(args: ServeArgs, tokenizer: BITConfig) -> None:
    """Raise UserError for a size at which ``tokenizer`` cannot decode."""
    multiple = tokenizer.decode_multiple
    wrong = next((size for size in args.sizes if size % multiple), None)
    if wrong is not None:
        raise UserError(f"sizes {wrong}: not a multiple of {multiple}, as tokenizer {args.tokenizer} requires")


def one_text_encoder(args: ServeArgs) -> TextEncoderConfig:
    """Return the text encoder of all generators; UserError if a model folder names none, or they differ."""
    encoders = []
    for name, model in args.models.items():
        encoder = Identity.of(model.path).text_encoder
        if encoder is None:
            raise UserError(f"models.{name}: {model.path} names no text encoder")
        encoders.append(encoder)
    if any(encoder != encoders[0] for encoder in encoders):
        raise UserError("models: the generators use different text encoders, expected the same one for all")
    return encoders[0]


def _with_defaults(args: ServeArgs, cards: Mapping[str, GeneratorCard]) -> ServeArgs:
    """Return ``args`` with the sampling settings of the models' cards where it sets none."""
    defaults = {name: cards[name].defaults(model.defaults) for name, model in args.models.items()}
    models = {name: model.model_copy(update={"defaults": defaults[name]}) for name, model in args.models.items()}
    return args.model_copy(update={"models": models})


def _empty_prompt(cfg: TextEncoderConfig) -> np.ndarray:
    return TextEncoder.from_config(cfg).encode_prompt("").numpy()


def _tokenizer(cfg: TextEncoderConfig) -> Any:
    from transformers import AutoTokenizer

    extra = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
    return AutoTokenizer.from_pretrained(resolve_name(cfg.name), **extra)


def _count_tokens(tokenizer: Any, prompt: str) -> int:
    return len(tokenizer(prompt, truncation=False)["input_ids"])


def _read_folders(args: ServeArgs) -> tuple[Served, TextEncoderConfig]:
    bit = load_expected(args.tokenizer, BIT)
    bit_hash = weight_hash(bit)
    check_sizes(args, bit.cfg)
    kinds, cards = {}, {}
    for name, model in args.models.items():
        config = read_checkpoint_config(model.path)
        if config.get("tokenizer_hash") != bit_hash:
            raise UserError(
                f"models.{name}: {model.path} was trained on codes of another tokenizer than {args.tokenizer}"
            )
        check_weights(model.path)
        generator = Identity.of(model.path)
        if (generator.num_tokens, generator.bits_per_token) != (bit.cfg.num_tokens, bit.cfg.bits_per_token):
            raise UserError(
                f"models.{name}: {model.path} generates {generator.num_tokens} tokens of {generator.bits_per_token} bits, "
                f"tokenizer {args.tokenizer} has {bit.cfg.num_tokens} of {bit.cfg.bits_per_token}"
            )
        kinds[name], cards[name] = str(config["model"].get("kind")), GeneratorCard.of(config, model.path)
    served = Served(bit.cfg.num_tokens, bit.cfg.bits_per_token, kinds, bit_hash, cards)
    return served, one_text_encoder(args)
