"""The sampling graph as the endpoint calls it: one image's way through the stages, with second tries.

Features go from replica to replica through Ray's object store. Codes pass here, because they are 1 KiB and make the
generation and the decoding two calls that are repeated on their own; an image passes here once, as a file.
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
from .retry import CALLS

T = TypeVar("T")


@dataclass(frozen=True)
class GeneratedImage:
    """What to make."""

    index: int
    model: str
    prompt: str
    sampling: Mapping[str, Any]
    """The fields of :class:`..sampling.SamplingParams`."""
    height: int
    width: int
    output_format: str

    def metadata(self, weights: Mapping[str, str]) -> dict[str, Any]:
        """What is written into the file; ``weights`` are the hashes of the models that made it."""
        return {"model": self.model, "prompt": self.prompt, **self.sampling, "weights": dict(weights)}


Report = Callable[[dict[str, Any]], None]
"""Takes ``{"step", "steps", "codes", "weights"}``, once for every ``preview_every`` steps and in their order."""


class Handle(Protocol):
    """Calls a stage: Serve's ``DeploymentHandle``, or :class:`.local.LocalHandle`.

    ``handle.method.remote(...)`` begins a call at once. What it returns is awaited, or iterated over after
    ``options(stream=True)``, and may be an argument of another call before that; ``cancel()`` ends it.
    """

    def options(self, *, stream: bool) -> Handle: ...

    def __getattr__(self, method: str) -> Any: ...


Health = Callable[[Mapping[str, Any]], Awaitable[list[str]]]
"""Takes the stages' handles by name; returns the names of those that are unhealthy, each with what is known of it."""


class Graph:
    """Handles of the stages."""

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

    async def codes(self, image: GeneratedImage, deadline: float) -> Generated:
        """Bits, and whose they are; ``deadline`` in terms of ``time.monotonic()``."""

        async def attempt() -> Generated:
            # The features are made anew for every try: those of the last one may have died with their replica.
            async with _cancelling(self.text.encode.remote(image.prompt)) as features:
                call = self.generators[image.model].generate.remote(
                    features, dict(image.sampling), deadline - time.monotonic()
                )
                async with _cancelling(call) as answer:
                    return await answer

        return await CALLS.call_async(attempt, deadline=deadline)

    async def follow(self, image: GeneratedImage, deadline: float, preview_every: int, report: Report) -> Generated:
        """As :meth:`codes`, with a ``report`` on the way. A second try does not report again what the first one did."""
        reported = 0

        async def attempt() -> Generated:
            nonlocal reported
            generator = self.generators[image.model].options(stream=True)
            async with _cancelling(self.text.encode.remote(image.prompt)) as features:
                call = generator.follow.remote(
                    features, dict(image.sampling), deadline - time.monotonic(), preview_every
                )
                async with _cancelling(call) as updates:
                    async for update in updates:
                        if update.get("done"):
                            return Generated(update["codes"], update["weights"])
                        if update["step"] > reported:
                            reported = update["step"]
                            report(update)
            raise RuntimeError("a followed image ended without its codes")

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
        """The file of an image."""

        async def attempt() -> bytes:
            call = self.decoder.decode.remote(codes, height, width, output_format, metadata)
            async with _cancelling(call) as answer:
                return await answer

        return await CALLS.call_async(attempt, deadline=deadline)

    async def file(self, image: GeneratedImage, made: Generated, deadline: float) -> bytes:
        """The file of ``image``, which has the bits of ``made``."""
        metadata = image.metadata(self.weights(made))
        return await self.decode(made.codes, image.height, image.width, image.output_format, metadata, deadline)

    def weights(self, made: Generated) -> dict[str, str]:
        """Hashes of the models behind an image."""
        return {"generator": made.weights, "tokenizer": self.tokenizer_hash}

    async def unhealthy(self) -> list[str]:
        """Stages that are unhealthy, with what is known of them."""
        return await self.health({"text": self.text, "decoder": self.decoder, **self.generators})


async def all_or_none(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first exception is raised, and so is a cancellation, when all others have ended."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _cancelling(call: Any) -> AsyncIterator[Any]:
    """A call that is cancelled with the block. Serve alone would let it run on, to occupy a slot for nobody."""
    try:
        yield call
    except BaseException:
        call.cancel()
        raise
