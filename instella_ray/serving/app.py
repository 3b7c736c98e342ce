"""The endpoint: text encoder -> generator -> decoder behind one HTTP API, as ``serve run`` builds it.

Features and codes go from replica to replica through Ray's object store; only the encoded picture passes the ingress.
"""

# No ``from __future__ import annotations`` here: the ingress class travels to its replica without the names that only
# its annotations mention, and FastAPI must still know that a request is a body.

import base64
import secrets
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from .. import storage
from ..config import Config
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import load_expected, read_checkpoint_config, weight_hash
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from .deployments import DecoderStage, GeneratorStage, TextEncoderStage
from .engine import EngineOptions
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
    # A longer prompt is cut, with a warning, to what a slot has room for.
    limit = min(text_config.max_length, args.text_length)
    text_config = text_config.model_copy(update={"max_length": limit})
    device = "auto" if args.num_gpus else "cpu"
    actor = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    stage = {"ray_actor_options": actor, "max_ongoing_requests": 64}
    empty = TextEncoder.from_config(text_config).encode([""])
    empty_prompt = empty.features[:, 0, empty.mask[0]].numpy()
    generators = {
        name: _deployment(GeneratorStage, f"Generator-{name}", num_replicas=model.replicas, **stage).bind(
            storage.absolute(model.path),
            empty_prompt,
            EngineOptions(slots=model.slots, text_length=args.text_length),
            args.threads,
            device,
        )
        for name, model in args.models.items()
    }
    text = _deployment(TextEncoderStage, "TextEncoder", **stage).bind(text_config, args.threads, device)
    decoder = _deployment(DecoderStage, "Decoder", **stage).bind(storage.absolute(args.tokenizer), args.threads, device)
    ingress = _deployment(Ingress, "Ingress", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=256)
    return ingress.bind(args, text, decoder, generators)


def _deployment(stage: type, name: str, **options: Any) -> serve.Deployment:
    return serve.deployment(name=name, **options)(stage)


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
            raise UserError(
                f"models.{name}: {model.path} was trained on codes of another tokenizer than {args.tokenizer}"
            )
        encoders.append(TextEncoderConfig.model_validate(config["text_encoder"]))
    if any(encoder != encoders[0] for encoder in encoders):
        raise UserError("models: all generators of one endpoint must read the same text encoder")
    return encoders[0]
