"""The endpoint as ``serve run`` and ``serve deploy`` build it: text encoder -> generator -> decoder behind one HTTP API."""

# No ``from __future__ import annotations`` here: Serve looks at what ``build`` is annotated with, and turns the arguments of
# its file into a ServeArgs only where it finds the class itself.

from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from .. import logs, storage
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import load_expected, read_checkpoint_config, weight_hash
from ..models.text_encoder import TextEncoder, TextEncoderConfig, resolve_name
from .access import ApiKeys
from .api import Served, Service, make_api
from .config import ModelArgs, ServeArgs, StageArgs
from .deployments import DecoderStage, GeneratorStage, TextEncoderStage
from .graph import Graph
from .scaling import generator_scaling, stage_scaling

__all__ = ["ModelArgs", "ServeArgs", "build"]

CALLS = 64
"""Calls that a text encoder's or a decoder's replica holds at once; they are batched there."""
HEALTH_CHECK_PERIOD_S = 2.0
"""Shorter than Serve's 10 s: /healthz knows what these checks found, and a broken replica draws calls until the third."""


@serve.ingress()
class Ingress:
    """The HTTP API's replica. Its routes are made where it runs, because they close over its handles."""

    def __init__(
        self,
        args: ServeArgs,
        served: Served,
        text_config: TextEncoderConfig,
        keys: ApiKeys,
        text: DeploymentHandle,
        decoder: DeploymentHandle,
        generators: dict[str, DeploymentHandle],
    ) -> None:
        logs.set_up({"job": "serve", "stage": "ingress"})
        count = None if args.limits.prompt_tokens is None else partial(_count_tokens, _tokenizer(text_config))
        graph = Graph(text, decoder, generators, served.tokenizer_hash)
        self.service, self.keys = Service(args, served, graph, count), keys

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self.service, self.keys)


def build(args: ServeArgs) -> Application:
    """The application, as ``serve run instella_ray.serving.app:build`` calls it with ``args`` from its file.

    UserError when a folder is missing or its model does not belong to the tokenizer, or settings contradict.
    """
    args.check()
    keys = ApiKeys.load(args.api_keys_file)
    served, text_config = _look_into_folders(args)
    # A longer prompt is cut, with a warning, to what a slot has room for.
    limit = min(text_config.max_length, args.text_length)
    text_config = text_config.model_copy(update={"max_length": limit})
    empty = _empty_prompt(text_config)
    generators = {name: _generator(args, name, model, empty) for name, model in args.models.items()}
    text, decoder = _text(args, text_config), _decoder(args)
    return _ingress(args).bind(args, served, text_config, keys, text, decoder, generators)


def _text(args: ServeArgs, cfg: TextEncoderConfig) -> Application:
    # Prompts in a batch change each other's last digits, and with them a bit of a picture here and there.
    invariant = all(model.batch_invariant for model in args.models.values())
    return _stage(args, TextEncoderStage, "TextEncoder", args.text).bind(
        cfg, args.threads, _device(args, args.text), precision=args.precision, batch_invariant=invariant
    )


def _decoder(args: ServeArgs) -> Application:
    return _stage(args, DecoderStage, "Decoder", args.decoder).bind(
        storage.absolute(args.tokenizer),
        args.threads,
        _device(args, args.decoder),
        precision=args.precision,
        safety=args.safety,
    )


def _generator(args: ServeArgs, name: str, model: ModelArgs, empty_prompt: np.ndarray) -> Application:
    stage = _stage(
        args,
        GeneratorStage,
        f"Generator-{name}",
        model,
        ongoing=model.ongoing,
        # A second bound behind the ingress's own gate, for the time when fewer replicas run than may.
        max_queued_requests=model.capacity,
    )
    return stage.bind(
        storage.absolute(model.path),
        empty_prompt,
        model.options(args.text_length),
        args.threads,
        _device(args, model),
        model.longest_step_s,
        precision=args.precision,
    )


def _stage(
    args: ServeArgs, stage: type, name: str, settings: StageArgs, *, ongoing: int = CALLS, **options: Any
) -> serve.Deployment:
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": args.cpus(settings), "num_gpus": args.gpus(settings)},
        max_ongoing_requests=ongoing,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # Scaling down never ends a request that may still meet its deadline.
        graceful_shutdown_timeout_s=args.limits.timeout_s + 10,
        **_fixed_or_scaled(settings, ongoing),
        **options,
    )(stage)


def _fixed_or_scaled(settings: StageArgs, ongoing: int) -> dict[str, Any]:
    scaling = settings.autoscaling
    if scaling is None:
        return {"num_replicas": settings.replicas}
    between = (scaling.min_replicas, scaling.max_replicas)
    delays: dict[str, Any] = {
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
    }
    if isinstance(settings, ModelArgs):
        return {"autoscaling_config": generator_scaling(*between, utilisation=scaling.target_load, **delays)}
    return {"autoscaling_config": stage_scaling(*between, ongoing=scaling.target_load * ongoing, **delays)}


def _ingress(args: ServeArgs) -> serve.Deployment:
    # Room for every picture that may be under way as a request of its own, and for those that are turned away: a queue
    # in Serve's proxy would keep them waiting for their 429.
    pictures = sum(model.capacity for model in args.models.values()) + args.limits.pictures + args.decoder.queue
    return serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * pictures + 256,
        max_queued_requests=256,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=args.limits.timeout_s + 10,
    )(Ingress)


def _device(args: ServeArgs, stage: StageArgs) -> str:
    return "auto" if args.gpus(stage) else "cpu"


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
