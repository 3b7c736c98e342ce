"""HTTP API: routes, validation and request handling, independent of how the graph is deployed."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Lifespan

from ..errors import UserError
from ..rendering import render
from .access import ApiKeys, BodyLimit, KeyCheck
from .admission import Gate
from .api_error import ApiError, refused
from .codes import pack, unpack
from .config import ServeArgs
from .failures import answering, api_error
from .graph import GeneratedImage, Graph, all_or_none
from .schema import DecodeRequest, ImageRequest, ImageResponse, ImageResult
from .stream import EventStream, ImageStream

PAGE = Path(__file__).with_name("playground.html")
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEALTH_FOR_S = 1.0
"""Seconds for which the result of a health check is cached, so that frequent probes cost little."""


@dataclass(frozen=True)
class Served:
    """Properties of the models of an endpoint, read from their folders."""

    tokens: int
    """Tokens per image."""
    bits: int
    """Bits per token."""
    kinds: dict[str, str]
    """``diffusion`` or ``ar``, by model name."""
    tokenizer_hash: str


class Service:
    """Handler of parsed requests: checks them against the limits and runs them on the graph."""

    def __init__(
        self, args: ServeArgs, served: Served, graph: Graph, count_tokens: Callable[[str], int] | None = None
    ) -> None:
        """``count_tokens`` counts the tokens of a prompt; required only if ``limits.prompt_tokens`` is set."""
        self.args, self.served, self.graph, self.count_tokens = args, served, graph, count_tokens
        self.gates = {name: Gate(args.share(model.capacity)) for name, model in args.models.items()}
        self.decoding = Gate(args.share(args.limits.images + args.decoder.queue))
        self._health: tuple[float, list[str]] = (-HEALTH_FOR_S, [])
        self._checking = asyncio.Lock()

    # --- called by the routes

    async def generate(self, request: ImageRequest) -> ImageResponse:
        """Generate all images of a request; raises the first failure."""
        images, deadline = self._images(request), self._deadline(request.timeout_s)
        as_codes = request.response_format == "codes"

        async def one(image: GeneratedImage) -> ImageResult:
            made = await self.graph.codes(image, deadline)
            seen: dict[str, Any] = {"seed": image.sampling["seed"], "prompt": image.prompt}
            seen["weights"] = self.graph.weights(made)
            if as_codes:
                return ImageResult(codes=pack(made.codes), **seen)
            return ImageResult(b64_json=_base64(await self.graph.file(image, made, deadline)), **seen)

        model = images[0].model
        with self.gates[model].enter(len(images)):
            await self._check_tokens(images)
            data = await self._by(deadline, all_or_none(one(image) for image in images))
        return ImageResponse(created=int(time.time()), model=model, data=data)

    async def stream(self, request: ImageRequest) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events, after one empty item that marks the admission of the request."""
        images, deadline = self._images(request), self._deadline(request.timeout_s)
        model = images[0].model
        stream = ImageStream(
            self.graph,
            images,
            steps=self._steps(images[0]),
            partial_images=request.partial_images,
            as_codes=request.response_format == "codes",
            deadline=deadline,
        )
        with self.gates[model].enter(len(images)):
            await self._check_tokens(images)
            yield b""
            async with aclosing(stream.events()) as events:
                async for item in events:
                    yield item

    async def decode(self, request: DecodeRequest) -> ImageResponse:
        """Decode the codes of images that were generated earlier."""
        model, (width, height) = self._model(request.model), self._size(request.size)
        codes = self._codes(request.all_codes)
        deadline = self._deadline(request.timeout_s)

        async def one(row: np.ndarray) -> ImageResult:
            file = await self.graph.decode(row, height, width, request.output_format, None, deadline)
            return ImageResult(b64_json=_base64(file))

        with self.decoding.enter(len(codes)):
            data = await self._by(deadline, all_or_none(one(row) for row in codes))
        return ImageResponse(created=int(time.time()), model=model, data=data)

    def models(self) -> dict[str, Any]:
        """Return the served models in the format of OpenAI's list."""
        return {"object": "list", "data": [self.model(name) for name in self.args.models]}

    def model(self, name: str) -> dict[str, Any]:
        """Return OpenAI's entry of a model, with its settings and limits under the additional key ``instella_ray``."""
        about = {
            "kind": self.served.kinds[self._model(name)],
            "defaults": self.args.models[name].defaults.model_dump(),
            "sizes": list(self.args.sizes),
            "limits": self.args.limits.model_dump(),
            "tokens": self.served.tokens,
            "bits": self.served.bits,
        }
        return {"id": name, "object": "model", "created": 0, "owned_by": "instella-ray", "instella_ray": about}

    async def unhealthy(self) -> list[str]:
        """Return the unhealthy stages; the result is cached for HEALTH_FOR_S."""
        async with self._checking:
            asked, answer = self._health
            if time.monotonic() - asked > HEALTH_FOR_S:
                answer = await self.graph.unhealthy()
                self._health = time.monotonic(), answer
        return answer

    # --- validation

    def _images(self, request: ImageRequest) -> list[GeneratedImage]:
        name, (width, height) = self._model(request.model), self._size(request.size)
        sampling = {**self.args.models[name].defaults.model_dump(), **request.sampling()}
        self._check(request, sampling)
        assert request.seed is not None, "drawn when the request was read"
        seed = request.seed
        return [
            GeneratedImage(
                i, name, prompt, {**sampling, "seed": (seed + i) % 2**63}, height, width, request.output_format
            )
            for i, prompt in enumerate(request.prompts)
        ]

    def _check(self, request: ImageRequest, sampling: dict[str, Any]) -> None:
        limits = self.args.limits
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if request.n > limits.n:
            raise refused("n", f"{request.n} images a prompt, expected at most {limits.n}")
        if (images := request.n * len(prompts)) > limits.images:
            param = "n" if len(prompts) == 1 else "prompt"
            raise refused(param, f"{images} images in all (n times prompts), expected at most {limits.images}")
        if (longest := max(map(len, prompts))) > limits.prompt_characters:
            raise refused("prompt", f"{longest} characters, expected at most {limits.prompt_characters}")
        if (steps := sampling["num_inference_steps"]) > limits.steps:
            raise refused("num_inference_steps", f"{steps}, expected at most {limits.steps}")

    async def _check_tokens(self, images: list[GeneratedImage]) -> None:
        # After admission and in a thread, because it takes longer than all other checks together.
        limit, count = self.args.limits.prompt_tokens, self.count_tokens
        if limit is None or count is None:
            return
        prompts = {image.prompt for image in images}
        tokens = await asyncio.to_thread(lambda: max(map(count, prompts)))
        if tokens > limit:
            raise refused("prompt", f"{tokens} tokens, expected at most {limit}")

    def _model(self, name: str | None) -> str:
        if name is None:
            return next(iter(self.args.models))
        if name not in self.args.models:
            served = ", ".join(self.args.models)
            message = f"model: '{name[:100]}' is not served here, expected one of {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def _size(self, text: str | None) -> tuple[int, int]:
        sizes = self.args.sizes
        if text is None:
            return sizes[0], sizes[0]
        width, height = (int(side) for side in text.split("x"))
        if width not in sizes or height not in sizes:
            raise refused("size", f"{text}, expected sides of {', '.join(map(str, sizes))} pixels")
        return width, height

    def _codes(self, texts: list[str]) -> list[np.ndarray]:
        if len(texts) > self.args.limits.images:
            raise refused("codes", f"{len(texts)} images, expected at most {self.args.limits.images}")
        try:
            return [unpack(text, self.served.tokens, self.served.bits) for text in texts]
        except UserError as error:
            raise refused("codes", str(error)) from None

    def _deadline(self, timeout_s: float | None) -> float:
        longest = self.args.limits.timeout_s
        if timeout_s is not None and timeout_s > longest:
            raise refused("timeout_s", f"{timeout_s:g}, expected at most {longest:g}")
        return time.monotonic() + (timeout_s or longest)

    def _steps(self, image: GeneratedImage) -> int:
        ar = self.served.kinds[image.model] == "ar"
        return self.served.tokens if ar else int(image.sampling["num_inference_steps"])

    @staticmethod
    async def _by(deadline: float, work: Coroutine[Any, Any, list[ImageResult]]) -> list[ImageResult]:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work


def make_api(service: Service, keys: ApiKeys, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Build the FastAPI application over ``service``, protected by ``keys``; ``lifespan`` as FastAPI defines it."""
    api = FastAPI(
        title="instella-ray",
        description="Text to image over binary tokens.",
        # The documentation pages load scripts from other sites. /openapi.json remains available.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    api.add_middleware(BodyLimit, max_bytes=service.args.limits.body_bytes)
    # Added last, so it runs first: the body of a request without a key is never read.
    api.add_middleware(KeyCheck, keys=keys)
    _add_error_answers(api)
    playground = render(PAGE) if PAGE.is_file() else None

    @api.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        if playground is None:
            raise ApiError(404, "the playground page is not installed; the API is at /v1", code="not_found")
        return HTMLResponse(playground, headers={"Content-Security-Policy": PAGE_POLICY})

    @api.get("/healthz")
    async def healthz() -> JSONResponse:
        unhealthy = await service.unhealthy()
        if unhealthy:
            message = f"unhealthy: {', '.join(unhealthy)}"
            raise ApiError(503, message, kind="server_error", code="unhealthy", retry_after_s=5)
        return JSONResponse({"status": "ok"})

    @api.get("/v1/models")
    def models() -> dict[str, Any]:
        return service.models()

    @api.get("/v1/models/{name}")
    def model(name: str) -> dict[str, Any]:
        return service.model(name)

    @api.post("/v1/images/generations", response_model=ImageResponse, response_model_exclude_none=True)
    async def generations(request: ImageRequest) -> Any:
        with answering():
            if not request.stream:
                return _json(await service.generate(request))
            events = service.stream(request)
            # The first item marks admission: failures before it can still set the HTTP status.
            await anext(events)
        return EventStream(events, request.seed)

    @api.post("/v1/codes/decode", response_model=ImageResponse, response_model_exclude_none=True)
    async def decode(request: DecodeRequest) -> Any:
        with answering():
            return _json(await service.decode(request))

    return api


def _add_error_answers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def _expected(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @api.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        location = [] if first["type"] == "json_invalid" else [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(location)[:200] or "body"
        message = first["msg"].removeprefix("Value error, ")
        return refused(param, message).response

    @api.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response


def _json(answer: ImageResponse) -> Response:
    # Not returned as it is: FastAPI would validate and copy megabytes of base64 before it writes them.
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
