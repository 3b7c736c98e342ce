"""Serving baselines: the same models in one deployment, with one request at a time or static batches.

Both have the same HTTP request and response format as the serving graph, so that the transport cost is equal.
"""

# No ``from __future__ import annotations``: see serving/app.py.

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, Request
from ray import serve
from ray.serve import Application

from ..data.formats.images import to_pixels
from ..models.bit import BIT
from ..models.checkpoint import load_expected, load_model
from ..models.sampling import SamplingParams, generate
from ..models.text_encoder import TextEncoder, TextEncoderConfig, TextFeatureCache
from ..rendering import encode_png
from .load import PATH

FIELDS = ("seed", "num_inference_steps", "guidance_scale", "temperature", "sampler")


class Pipeline:
    """All three models in one process, from request bodies to PNG files, without serving."""

    def __init__(self, tokenizer: str, generator: str, text: TextEncoderConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.bit = load_expected(tokenizer, BIT)
        model = load_model(generator)
        assert not isinstance(model, BIT)
        self.model = model
        self.text = TextFeatureCache(TextEncoder.from_config(text), 256 << 20)

    @torch.no_grad()
    def __call__(self, bodies: Sequence[dict[str, Any]]) -> list[bytes]:
        """Generate one PNG per request; the batch takes as many steps as its longest request."""
        prompts = [body["prompt"] for body in bodies]
        text = self.model.text_kv(*self.text.encode([*prompts, ""]))
        params = SamplingParams.of(len(bodies), **{name: [body[name] for body in bodies] for name in FIELDS})
        codes = generate(self.model, text.rows(slice(-1)), text.rows(slice(-1, None)), params)
        files: list[bytes] = [b""] * len(bodies)
        sizes = [tuple(map(int, body["size"].split("x"))) for body in bodies]
        for width, height in dict.fromkeys(sizes):
            rows = [i for i, size in enumerate(sizes) if size == (width, height)]
            pixels = to_pixels(self.bit.decode(codes[rows], height, width))
            for i, image in zip(rows, pixels, strict=True):
                files[i] = encode_png(image)
        return files


def _answer(file: bytes) -> dict[str, Any]:
    return {"data": [{"b64_json": base64.b64encode(file).decode()}]}


def _application(cls: type, api: FastAPI, max_ongoing_requests: int) -> Application:
    actor = {"num_cpus": 0.1}
    deployment = serve.deployment(max_ongoing_requests=max_ongoing_requests, ray_actor_options=actor)
    return deployment(serve.ingress(api)(cls)).bind()


def one_at_a_time(**models: Any) -> Application:
    """Build an application that processes requests sequentially."""
    api = FastAPI()

    class OneAtATime:
        def __init__(self) -> None:
            self.pipeline = Pipeline(**models)

        @api.post(PATH)
        async def generations(self, request: Request) -> dict[str, Any]:
            (file,) = await asyncio.to_thread(self.pipeline, [await request.json()])
            return _answer(file)

    return _application(OneAtATime, api, 1)


def static_batches(size: int, wait_s: float, **models: Any) -> Application:
    """Build an application with ``@serve.batch``: up to ``size`` requests arriving within ``wait_s`` run as one batch."""
    api = FastAPI()

    class StaticBatches:
        def __init__(self) -> None:
            self.pipeline = Pipeline(**models)

        @serve.batch(max_batch_size=size, batch_wait_timeout_s=wait_s)
        async def batch(self, bodies: list[dict[str, Any]]) -> list[bytes]:
            return await asyncio.to_thread(self.pipeline, bodies)

        @api.post(PATH)
        async def generations(self, request: Request) -> dict[str, Any]:
            return _answer(await self.batch(await request.json()))

    return _application(StaticBatches, api, 4 * size)
