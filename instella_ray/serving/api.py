"""HTTP API: routes, validation and request handling, independent of how the graph is deployed."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Lifespan

from ..errors import UserError
from ..models.card import GeneratorCard
from ..rendering import render
from .access import OPEN_PATHS, BodyLimit, KeyCheck
from .admission import Gate
from .api_error import ApiError, refused
from .caller import Caller, CallerLimits
from .codes import pack, unpack
from .config import ServeArgs
from .failures import answering, api_error
from .graph import GeneratedImage, Graph, all_or_none
from .keys import ApiKeys
from .schema import DecodeRequest, ImageRequest, ImageResponse, ImageResult
from .stream import EventStream, ImageStream
from .usage import RequestUsage, Usage

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
    cards: dict[str, GeneratorCard]
    """What the models know, by their names."""


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["caller"]
    return caller


def _usage(request: Request) -> RequestUsage:
    usage: RequestUsage = request.scope["usage"]
    return usage


CallerOfRequest = Annotated[Caller, Depends(_caller)]
UsageOfRequest = Annotated[RequestUsage, Depends(_usage)]


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

    async def generate(self, request: ImageRequest, caller: Caller, usage: RequestUsage) -> ImageResponse:
        """Generate all images of a request; raises the first failure. ``usage`` is filled in."""
        images, deadline = self._images(request, caller), self._deadline(request.timeout_s)
        self._note(usage, images)
        as_codes = request.response_format == "codes"

        async def one(image: GeneratedImage) -> ImageResult:
            made = await self.graph.codes(image, deadline)
            seen: dict[str, Any] = {"seed": image.sampling["seed"], "prompt": image.prompt}
            seen["weights"] = self.graph.weights(made)
            if as_codes:
                return ImageResult(codes=pack(made.codes), **seen)
            return ImageResult(b64_json=_base64(await self.graph.file(image, made, deadline)), **seen)

        model = images[0].model
        with caller.images.enter(len(images)), self.gates[model].enter(len(images)):
            await self._check_tokens(images)
            data = await self._by(deadline, all_or_none(one(image) for image in images))
        return ImageResponse(created=int(time.time()), model=model, data=data)

    async def stream(self, request: ImageRequest, caller: Caller, usage: RequestUsage) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events, after one empty item that marks the admission of the request.

        ``usage`` is filled in, at the end with the status of an error that ended the stream.
        """
        images, deadline = self._images(request, caller), self._deadline(request.timeout_s)
        self._note(usage, images)
        model = images[0].model
        stream = ImageStream(
            self.graph,
            images,
            steps=self._steps(images[0]),
            partial_images=request.partial_images,
            as_codes=request.response_format == "codes",
            deadline=deadline,
        )
        with caller.images.enter(len(images)), self.gates[model].enter(len(images)):
            await self._check_tokens(images)
            yield b""
            async with aclosing(stream.events()) as events:
                async for item in events:
                    if stream.error is not None:
                        usage.status, usage.code = stream.error.status, stream.error.code
                    yield item

    async def decode(self, request: DecodeRequest, caller: Caller, usage: RequestUsage) -> ImageResponse:
        """Decode the codes of images that were generated earlier. ``usage`` is filled in."""
        model, (width, height) = self._model(request.model, caller), self._size(request.size)
        self._check_images(len(request.all_codes), "codes", caller)
        codes = self._codes(request.all_codes)
        usage.model, usage.images, usage.size, usage.steps = model, len(codes), f"{width}x{height}", 0
        deadline = self._deadline(request.timeout_s)

        async def one(row: np.ndarray) -> ImageResult:
            file = await self.graph.decode(row, height, width, request.output_format, None, deadline)
            return ImageResult(b64_json=_base64(file))

        with caller.images.enter(len(codes)), self.decoding.enter(len(codes)):
            data = await self._by(deadline, all_or_none(one(row) for row in codes))
        return ImageResponse(created=int(time.time()), model=model, data=data)

    def models(self, caller: Caller) -> dict[str, Any]:
        """Return the models that ``caller`` may use in the format of OpenAI's list."""
        return {"object": "list", "data": [self.model(name, caller) for name in self._models(caller)]}

    def model(self, name: str, caller: Caller) -> dict[str, Any]:
        """Return OpenAI's entry of a model, with its settings and limits under the additional key ``instella_ray``."""
        about = {
            "kind": self.served.kinds[self._model(name, caller)],
            "about": self.served.cards[name].about,
            "prompts": list(self.served.cards[name].prompts),
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

    def _images(self, request: ImageRequest, caller: Caller) -> list[GeneratedImage]:
        name, (width, height) = self._model(request.model, caller), self._size(request.size)
        sampling = {**self.args.models[name].defaults.model_dump(), **request.sampling()}
        self._check(request, sampling, caller)
        assert request.seed is not None, "drawn when the request was read"
        seed = request.seed
        return [
            GeneratedImage(
                i, name, prompt, {**sampling, "seed": (seed + i) % 2**63}, height, width, request.output_format
            )
            for i, prompt in enumerate(request.prompts)
        ]

    def _check(self, request: ImageRequest, sampling: dict[str, Any], caller: Caller) -> None:
        limits = self.args.limits
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if request.n > limits.n:
            raise refused("n", f"{request.n} images a prompt, expected at most {limits.n}")
        self._check_images(request.n * len(prompts), "n" if len(prompts) == 1 else "prompt", caller)
        if (longest := max(map(len, prompts))) > limits.prompt_characters:
            raise refused("prompt", f"{longest} characters, expected at most {limits.prompt_characters}")
        if (steps := sampling["num_inference_steps"]) > limits.steps:
            raise refused("num_inference_steps", f"{steps}, expected at most {limits.steps}")

    def _check_images(self, images: int, param: str, caller: Caller) -> None:
        limit = min(self.args.limits.images, caller.images.largest)
        if images > limit:
            raise refused(param, f"{images} images in all, expected at most {limit}")

    async def _check_tokens(self, images: list[GeneratedImage]) -> None:
        # After admission and in a thread, because it takes longer than all other checks together.
        limit, count = self.args.limits.prompt_tokens, self.count_tokens
        if limit is None or count is None:
            return
        prompts = {image.prompt for image in images}
        tokens = await asyncio.to_thread(lambda: max(map(count, prompts)))
        if tokens > limit:
            raise refused("prompt", f"{tokens} tokens, expected at most {limit}")

    def _models(self, caller: Caller) -> list[str]:
        return [name for name in self.args.models if caller.may_use(name)]

    def _model(self, name: str | None, caller: Caller) -> str:
        models = self._models(caller)
        if name is None and models:
            return models[0]
        if name not in models:
            # As at OpenAI, a model that the key may not use is answered as one that there is not.
            message = f"model: '{(name or '')[:100]}' is not served here, expected one of {', '.join(models)}"
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
        try:
            return [unpack(text, self.served.tokens, self.served.bits) for text in texts]
        except UserError as error:
            raise refused("codes", str(error)) from None

    def _deadline(self, timeout_s: float | None) -> float:
        longest = self.args.limits.timeout_s
        if timeout_s is not None and timeout_s > longest:
            raise refused("timeout_s", f"{timeout_s:g}, expected at most {longest:g}")
        return time.monotonic() + (timeout_s or longest)

    def _note(self, usage: RequestUsage, images: list[GeneratedImage]) -> None:
        first = images[0]
        usage.model, usage.images, usage.steps = first.model, len(images), self._steps(first)
        usage.size = f"{first.width}x{first.height}"

    def _steps(self, image: GeneratedImage) -> int:
        ar = self.served.kinds[image.model] == "ar"
        return self.served.tokens if ar else int(image.sampling["num_inference_steps"])

    @staticmethod
    async def _by(deadline: float, work: Coroutine[Any, Any, list[ImageResult]]) -> list[ImageResult]:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await work


def make_api(service: Service, keys: ApiKeys, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Build the FastAPI application over ``service``, protected by ``keys``, which it watches while it runs.

    ``lifespan`` as FastAPI defines it.
    """

    @asynccontextmanager
    async def watching(api: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.create_task(keys.watch())
        try:
            async with lifespan(api) if lifespan is not None else nullcontext():
                yield
        finally:
            watcher.cancel()

    api = FastAPI(
        title="instella-ray",
        description="Text to image over binary tokens.",
        # The documentation pages load scripts from other sites. /openapi.json remains available.
        docs_url=None,
        redoc_url=None,
        lifespan=watching,
    )
    api.add_middleware(BodyLimit, max_bytes=service.args.limits.body_bytes)
    # Added later, so it runs earlier: the body of a request without a key is never read.
    api.add_middleware(KeyCheck, keys=keys, limits=CallerLimits(service.args.ingress_replicas))
    api.add_middleware(Usage, open_paths=OPEN_PATHS)
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
    def models(caller: CallerOfRequest) -> dict[str, Any]:
        return service.models(caller)

    @api.get("/v1/models/{name}")
    def model(name: str, caller: CallerOfRequest) -> dict[str, Any]:
        return service.model(name, caller)

    @api.post("/v1/images/generations", response_model=ImageResponse, response_model_exclude_none=True)
    async def generations(request: ImageRequest, caller: CallerOfRequest, usage: UsageOfRequest) -> Any:
        with answering():
            if not request.stream:
                return _json(await service.generate(request, caller, usage))
            events = service.stream(request, caller, usage)
            # The first item marks admission: failures before it can still set the HTTP status.
            await anext(events)
        return EventStream(events, request.seed)

    @api.post("/v1/codes/decode", response_model=ImageResponse, response_model_exclude_none=True)
    async def decode(request: DecodeRequest, caller: CallerOfRequest, usage: UsageOfRequest) -> Any:
        with answering():
            return _json(await service.decode(request, caller, usage))

    return api


def _add_error_answers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def _expected(request: Request, error: ApiError) -> JSONResponse:
        if usage := request.scope.get("usage"):  # the page and health probes have none
            usage.code = error.code
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
