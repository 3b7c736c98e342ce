"""Sampling graph: calls the stages for each image, with retries.

Features and codes (1 KiB) are returned to this process, so that the features of a prompt are reused and each call is
retried independently; an image is returned once, as a file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from .codes import Generated
from .prompts import PromptFeatures
from .retry import CALLS

T = TypeVar("T")


@dataclass(frozen=True)
class GeneratedImage:
    """Specification of one image of a request."""

    index: int
    """Number of the image within its request, from 0."""
    model: str
    prompt: str
    sampling: Mapping[str, Any]
    """The fields of :class:`..models.sampling.SamplingParams`."""
    height: int
    width: int
    output_format: str

    def metadata(self, weights: Mapping[str, str]) -> dict[str, Any]:
        """Return the metadata written into the file; ``weights`` are the hashes of its models by role."""
        return {"model": self.model, "prompt": self.prompt, **self.sampling, "weights": dict(weights)}


Report = Callable[[dict[str, Any]], None]
"""Receives ``{"step", "steps", "codes", "weights"}`` every ``preview_every`` steps, in order."""


class Handle(Protocol):
    """Handle of a stage: Serve's ``DeploymentHandle`` or :class:`.local.LocalHandle`.

    ``handle.method.remote(...)`` starts a call immediately. The returned object is awaited (iterated over after
    ``options(stream=True)``) and has ``cancel()`` to end the call.
    """

    def options(self, *, stream: bool) -> Handle: ...

    def __getattr__(self, method: str) -> Any: ...


Health = Callable[[Mapping[str, Any]], Awaitable[list[str]]]
"""Receives the stages' handles by name; returns a line ``name: reason`` for each unhealthy stage."""


class Graph:
    """Client of the stages: generates and decodes images through their handles."""

    def __init__(
        self,
        text: Handle,
        decoder: Handle,
        generators: Mapping[str, Handle],
        tokenizer_hash: str,
        health: Health,
    ) -> None:
        self.text, self.decoder, self.generators = text, decoder, generators
        self.tokenizer_hash, self.health = tokenizer_hash, health
        self.features = PromptFeatures(self._encode)

    async def codes(self, image: GeneratedImage, deadline: float) -> Generated:
        """Generate the codes of an image; ``deadline`` in terms of ``time.monotonic()``."""

        async def attempt() -> Generated:
            features, sampling = await self.features(image.prompt), dict(image.sampling)
            call = self.generators[image.model].generate.remote(
                features, sampling, deadline - time.monotonic(), image.prompt
            )
            async with _cancelling(call) as answer:
                return await answer

        return await CALLS.call_async(attempt, deadline=deadline)

    async def follow(self, image: GeneratedImage, deadline: float, preview_every: int, report: Report) -> Generated:
        """Generate as :meth:`codes` and call ``report`` with the progress; a retry does not repeat reported steps."""
        reported = 0

        async def attempt() -> Generated:
            nonlocal reported
            features, sampling = await self.features(image.prompt), dict(image.sampling)
            generator = self.generators[image.model].options(stream=True)
            call = generator.follow.remote(features, sampling, deadline - time.monotonic(), preview_every, image.prompt)
            async with _cancelling(call) as updates:
                async for update in updates:
                    if update.get("done"):
                        return Generated(update["codes"], update["weights"])
                    if update["step"] > reported:
                        reported = update["step"]
                        report(update)
            raise RuntimeError("the stream of an image ended without codes")

        return await CALLS.call_async(attempt, deadline=deadline)

    async def decode(
        self,
        codes: np.ndarray,
        height: int,
        width: int,
        output_format: str,
        metadata: dict[str, Any] | None,
        deadline: float,
    ) -> bytes:
        """Decode ``codes [L, K]`` to an image file; ``deadline`` in terms of ``time.monotonic()``."""

        async def attempt() -> bytes:
            call = self.decoder.decode.remote(codes, height, width, output_format, metadata)
            async with _cancelling(call) as answer:
                return await answer

        return await CALLS.call_async(attempt, deadline=deadline)

    async def file(self, image: GeneratedImage, made: Generated, deadline: float) -> bytes:
        """Decode ``made``, the codes of ``image``, to its file."""
        metadata = image.metadata(self.weights(made))
        return await self.decode(made.codes, image.height, image.width, image.output_format, metadata, deadline)

    def weights(self, made: Generated) -> dict[str, str]:
        """Return the weight hashes of an image's ``generator`` and ``tokenizer``."""
        return {"generator": made.weights, "tokenizer": self.tokenizer_hash}

    async def _encode(self, prompt: str) -> np.ndarray:
        async with _cancelling(self.text.encode.remote(prompt)) as features:
            found: np.ndarray = await features
            return found

    async def unhealthy(self) -> list[str]:
        """Return a line ``name: reason`` for each unhealthy stage."""
        return await self.health({"text": self.text, "decoder": self.decoder, **self.generators})


async def all_or_none(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all coroutines and return results in order; an exception or cancellation is raised after all have ended."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _cancelling(call: Any) -> AsyncIterator[Any]:
    """Cancel ``call`` if the block raises. Serve would let it run on and occupy a slot without a receiver."""
    try:
        yield call
    except BaseException:
        call.cancel()
        raise
