"""A request's images as server-sent events, in OpenAI's names and with their progress."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .codes import Generated, pack
from .failures import ApiError, api_error
from .graph import GeneratedImage, Graph, all_or_none

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still there\n\n"
KEEP_ALIVE_S = 15.0
"""Proxies on the way close a connection that is silent for long, and an image may wait for its slot."""
REPORTS = 20
"""About as many progress events an image, however many steps it takes."""


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def report_every(steps: int, partial_images: int) -> int:
    """Steps between two reports: few enough events, and one wherever a preview is due."""
    return max(1, min(steps // REPORTS, steps // (partial_images + 1)))


def due(step: int, steps: int, partial_images: int) -> int:
    """How many previews should have been seen after ``step``, when they are spread evenly before the image."""
    return min(partial_images, step * (partial_images + 1) // steps)


class ImageStream:
    """Follows the images of one request and gathers their events, in order for each image."""

    def __init__(
        self,
        graph: Graph,
        images: Sequence[GeneratedImage],
        *,
        steps: int,
        partial_images: int,
        as_codes: bool,
        deadline: float,
    ) -> None:
        self.graph, self.images, self.deadline = graph, images, deadline
        self.partial_images, self.as_codes = partial_images, as_codes
        self.every = report_every(steps, partial_images)
        self._events: asyncio.Queue[bytes | ApiError | None] = asyncio.Queue()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Events as bytes, ``[DONE]`` last. Closing it early cancels what is under way."""
        work = asyncio.create_task(self._run())
        try:
            while (item := await self._next()) is not None:
                yield event("error", item.body) if isinstance(item, ApiError) else item
            yield DONE
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _next(self) -> bytes | ApiError | None:
        try:
            return await asyncio.wait_for(self._events.get(), KEEP_ALIVE_S)
        except TimeoutError:
            return KEEP_ALIVE

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                await all_or_none(self._follow(image) for image in self.images)
        except Exception as error:
            self._events.put_nowait(api_error(error))
        self._events.put_nowait(None)

    async def _follow(self, image: GeneratedImage) -> None:
        previews: list[asyncio.Task[None]] = []

        def report(update: dict[str, Any]) -> None:
            step, steps = update["step"], update["steps"]
            self._tell("progress", image, step=step, steps=steps)
            if len(previews) < due(step, steps, self.partial_images):
                # Not awaited: the next events, and the image itself, need not wait for a preview.
                before = previews[-1] if previews else None
                previews.append(asyncio.create_task(self._preview(image, update, len(previews), before)))

        try:
            made = await self.graph.follow(image, self.deadline, self.every, report)
            shown = await self._shown(image, made)
            await asyncio.gather(*previews)
        finally:
            for preview in previews:
                preview.cancel()
        # The codes stand beside the file: 1 KiB that can be decoded again at another size.
        more = {
            "codes": pack(made.codes),
            "weights": self.graph.weights(made),
            "seed": image.sampling["seed"],
            "prompt": image.prompt,
            "model": image.model,
        }
        self._tell("completed", image, created_at=int(time.time()), **{**self._format(image), **shown, **more})

    async def _preview(
        self, image: GeneratedImage, update: dict[str, Any], number: int, before: asyncio.Task[None] | None
    ) -> None:
        shown = await self._shown(image, Generated(update["codes"], update["weights"]))
        if before is not None:
            await before
        self._tell(
            "partial_image",
            image,
            created_at=int(time.time()),
            partial_image_index=number,
            step=update["step"],
            steps=update["steps"],
            **self._format(image),
            **shown,
        )

    async def _shown(self, image: GeneratedImage, made: Generated) -> dict[str, str]:
        if self.as_codes:
            return {"codes": pack(made.codes)}
        return {"b64_json": base64.b64encode(await self.graph.file(image, made, self.deadline)).decode()}

    def _format(self, image: GeneratedImage) -> dict[str, str]:
        return {"size": f"{image.width}x{image.height}", "output_format": image.output_format}

    def _tell(self, name: str, image: GeneratedImage, **data: Any) -> None:
        name = f"image_generation.{name}"
        self._events.put_nowait(event(name, {"type": name, "index": image.index, **data}))


class EventStream(StreamingResponse):
    """A response of server-sent events that ends its source when the client leaves, not when garbage is collected."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.source.aclose()
