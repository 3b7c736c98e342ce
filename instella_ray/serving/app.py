"""The sampling graph on Ray Serve: text encoder -> generator -> decoder behind one HTTP API.

Features and codes go from replica to replica through Ray's object store; only the encoded picture passes the ingress.
"""

from __future__ import annotations

import base64
import io
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ..accelerator import pick_device
from ..config import Config
from ..data.decode import to_pixels
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import load_expected, load_model, read_checkpoint_config, weight_hash
from ..models.text_encoder import TextEncoder, TextEncoderConfig, TextFeatureCache
from ..sampling import SamplingParams
from .batching import MicroBatcher
from .engine import build_engine
from .runner import EngineRunner
from .schema import ImageData, ImageRequest, ImageResponse, error_body


class SamplingDefaults(Config):
    """What a request gets where it says nothing."""

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    temperature: float = 1.0
    rho: float = 1.0
    sampler: str = "simplified"


class ModelArgs(Config):
    """One generator behind the endpoint."""

    path: str
    """Model folder of a diffusion or AR generator."""
    defaults: SamplingDefaults = SamplingDefaults()
    replicas: int = Field(1, ge=1)
    slots: int = Field(8, ge=1)
    """Pictures that share a forward pass."""


class ServeArgs(Config):
    """An endpoint: one tokenizer, one text encoder, any number of generators over its codes."""

    tokenizer: str
    """Model folder of the BIT."""
    models: dict[str, ModelArgs]
    """Generators by the name that requests use; the first is the default."""
    text_length: int = 128
    """Prompt tokens that a slot has room for."""
    sizes: tuple[int, ...] = (512, 768, 1024)
    """Edges (px) that pictures may have; the first is the default."""
    num_cpus: float = 1.0
    """Logical CPUs a replica reserves."""
    threads: int = 1
    """Threads a replica computes with on the CPU."""
    num_gpus: float = 0.0
    """GPU share of each replica."""


@serve.deployment
class TextEncoderDeployment:
    """Prompts to features of every layer, micro-batched and cached."""

    def __init__(self, cfg: TextEncoderConfig, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.cache = TextFeatureCache(TextEncoder.from_config(cfg, device=pick_device(device)), 256 << 20)
        self.batcher: MicroBatcher[str, np.ndarray] = MicroBatcher(self._encode, size=32)

    async def encode(self, prompt: str) -> np.ndarray:
        """Float32 ``[layers, T, width]``, without padding."""
        return await self.batcher(prompt)

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        features, mask = self.cache.encode(prompts)
        return [features[:, i, mask[i]].cpu().numpy() for i in range(len(prompts))]


@serve.deployment
class GeneratorDeployment:
    """Features to codes, in the step engine."""

    def __init__(self, path: str, empty_prompt: np.ndarray, slots: int, text_length: int, threads: int, device: str):
        torch.set_num_threads(threads)
        model = load_model(path, device=pick_device(device))
        assert not isinstance(model, BIT)
        engine = build_engine(model, torch.tensor(empty_prompt), slots=slots, text_length=text_length)
        self.runner = EngineRunner(engine)

    async def generate(self, features: np.ndarray, sampling: dict[str, Any]) -> np.ndarray:
        """Codes, uint8 0/1 ``[L, K]``; ``sampling`` holds the fields of :class:`SamplingParams`."""
        # A copy: arrays from the object store are read-only.
        codes = await self.runner.generate(torch.tensor(features), SamplingParams.of(1, **sampling))
        return codes.numpy()

    def check_health(self) -> None:
        if not self.runner.alive:
            raise RuntimeError("the step engine's thread has died")


@serve.deployment
class DecoderDeployment:
    """Codes to encoded pictures, micro-batched by size."""

    def __init__(self, path: str, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.device = pick_device(device)
        self.bit = load_expected(path, BIT, device=self.device)
        self.batchers: dict[tuple[int, int, str], MicroBatcher[np.ndarray, bytes]] = {}

    async def decode(self, codes: np.ndarray, height: int, width: int, output_format: str) -> bytes:
        """The encoded file of a picture of ``height x width`` pixels."""
        key = (height, width, output_format)
        if key not in self.batchers:
            self.batchers[key] = MicroBatcher(lambda batch: self._decode(batch, *key), size=8)
        return await self.batchers[key](codes)

    def _decode(self, batch: Sequence[np.ndarray], height: int, width: int, output_format: str) -> list[bytes]:
        codes = torch.from_numpy(np.stack(batch)).to(self.device)
        return [encode_image(picture, output_format) for picture in to_pixels(self.bit.decode(codes, height, width))]


api = FastAPI(title="instella-ray", description="Text to image over binary tokens.")


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    message = first["msg"].removeprefix("Value error, ")
    return JSONResponse(error_body(f"{field or 'body'}: {message}", param=field or None), 400)


@api.exception_handler(UserError)
async def _refused(request: Request, error: UserError) -> JSONResponse:
    return JSONResponse(error_body(str(error)), 400)


@serve.deployment
@serve.ingress(api)
class Ingress:
    """The HTTP API."""

    def __init__(
        self,
        args: ServeArgs,
        text: DeploymentHandle,
        decoder: DeploymentHandle,
        generators: dict[str, DeploymentHandle],
    ) -> None:
        self.args = args
        self.text, self.decoder, self.generators = text, decoder, generators

    @api.get("/healthz")
    def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    def models(self) -> dict[str, Any]:
        entries = [{"id": name, "object": "model", "owned_by": "instella-ray"} for name in self.args.models]
        return {"object": "list", "data": entries}

    @api.post("/v1/images/generations")
    async def generations(self, request: ImageRequest) -> ImageResponse:
        name = request.model or next(iter(self.args.models))
        if name not in self.args.models:
            raise UserError(f"model '{name}': not served here, expected one of {', '.join(self.args.models)}")
        width, height = self._size(request.size)
        defaults = self.args.models[name].defaults.model_dump()
        seed = secrets.randbelow(2**62) if request.seed is None else request.seed
        answers, seeds = [], []
        for i, prompt in enumerate(request.prompts):
            seeds.append((seed + i) % 2**63)
            features = self.text.encode.remote(prompt)
            sampling = {**defaults, **request.sampling(), "seed": seeds[-1]}
            codes = self.generators[name].generate.remote(features, sampling)
            answers.append(self.decoder.decode.remote(codes, height, width, request.output_format))
        pictures = [base64.b64encode(await answer).decode() for answer in answers]
        rows = zip(pictures, seeds, request.prompts, strict=True)
        data = [ImageData(b64_json=picture, seed=s, prompt=p) for picture, s, p in rows]
        return ImageResponse(created=int(time.time()), model=name, data=data)

    def _size(self, text: str | None) -> tuple[int, int]:
        if text is None:
            return self.args.sizes[0], self.args.sizes[0]
        width, height = (int(side) for side in text.split("x"))
        if width not in self.args.sizes or height not in self.args.sizes:
            raise UserError(f"size {text}: expected sides of {', '.join(map(str, self.args.sizes))} pixels")
        return width, height


def build(args: ServeArgs | dict[str, Any]) -> Application:
    """The application, as ``serve run instella_ray.serving.app:build`` calls it with ``args`` from its file.

    UserError when a folder is missing or its model does not belong to the tokenizer.
    """
    args = args if isinstance(args, ServeArgs) else ServeArgs.model_validate(args)
    text_config = _check(args)
    device = "auto" if args.num_gpus else "cpu"
    options = {"ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}, "max_ongoing_requests": 64}
    empty = TextEncoder.from_config(text_config).encode([""])
    empty_prompt = empty.features[:, 0, empty.mask[0]].numpy()
    generators = {
        name: GeneratorDeployment.options(name=f"Generator-{name}", num_replicas=model.replicas, **options).bind(
            model.path, empty_prompt, model.slots, args.text_length, args.threads, device
        )
        for name, model in args.models.items()
    }
    text = TextEncoderDeployment.options(name="TextEncoder", **options).bind(text_config, args.threads, device)
    decoder = DecoderDeployment.options(name="Decoder", **options).bind(args.tokenizer, args.threads, device)
    ingress = Ingress.options(name="Ingress", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=256)
    return ingress.bind(args, text, decoder, generators)


def encode_image(picture: np.ndarray, output_format: str) -> bytes:
    """File bytes of uint8 ``[H, W, 3]``."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 1} if output_format == "png" else {"quality": 92}
    Image.fromarray(picture).save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def _check(args: ServeArgs) -> TextEncoderConfig:
    bit = load_expected(args.tokenizer, BIT)
    bit_hash, multiple = weight_hash(bit), bit.cfg.size_multiple
    wrong = next((size for size in args.sizes if size % multiple), None)
    if wrong is not None:
        raise UserError(f"sizes {wrong}: not a multiple of {multiple}, as tokenizer {args.tokenizer} needs")
    if not args.models:
        raise UserError("models: expected at least one generator")
    encoders = []
    for name, model in args.models.items():
        config = read_checkpoint_config(model.path)
        if config.get("tokenizer_hash") != bit_hash:
            raise UserError(f"models.{name}: {model.path} was trained on codes of another tokenizer than {args.tokenizer}")
        encoders.append(TextEncoderConfig.model_validate(config["text_encoder"]))
    if any(encoder != encoders[0] for encoder in encoders):
        raise UserError("models: all generators of one endpoint must read the same text encoder")
    return encoders[0]
