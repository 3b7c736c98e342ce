"""Server-sent events of a request: progress, previews and images, with OpenAI's event names."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .api_error import ApiError
from .codes import Generated, pack
from .event_stream import DONE, SEED_HEADER, event
from .failures import api_error
from .graph import GeneratedImage, Graph, all_or_none

KEEP_ALIVE = b": still there\n\n"
KEEP_ALIVE_S = 15.0
"""Seconds without an event before a keep-alive, because proxies close idle connections while an image is queued."""
REPORTS = 20
"""Approximate number of progress events per image, independent of its steps."""


def report_every(steps: int, partial_images: int) -> int:
    """Return the steps between two progress events: about REPORTS per image, but at least one per preview."""
    return max(1, min(steps // REPORTS, steps // (partial_images + 1)))


def due(step: int, steps: int, partial_images: int) -> int:
    """Return how many previews are due after ``step`` if they are evenly spaced before the image."""
    return min(partial_images, step * (partial_images + 1) // steps)


class ImageStream:
    """Event stream of one request: generates its images concurrently; events are in order per image."""

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
        self.error: ApiError | None = None
        """Error that has ended the stream."""
        self._events: asyncio.Queue[bytes | ApiError | None] = asyncio.Queue()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the encoded events, ``[DONE]`` last. Closing the generator early cancels the images in progress."""
        work = asyncio.create_task(self._run())
        try:
            while (item := await self._next()) is not None:
                if isinstance(item, ApiError):
                    self.error, item = item, event("error", item.body)
                yield item
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
            self._emit("progress", image, step=step, steps=steps)
            if len(previews) < due(step, steps, self.partial_images):
                # Decoded in a task, so that a preview delays neither later events nor the image.
                before = previews[-1] if previews else None
                previews.append(asyncio.create_task(self._preview(image, update, len(previews), before)))

        try:
            made = await self.graph.follow(image, self.deadline, self.every, report)
            shown = await self._shown(image, made)
            await asyncio.gather(*previews)
        finally:
            for preview in previews:
                preview.cancel()
        # The codes (1 KiB) are always included, so that the image can be decoded again at another size.
        more = {
            "codes": pack(made.codes),
            "weights": self.graph.weights(made),
            "seed": image.sampling["seed"],
            "prompt": image.prompt,
            "model": image.model,
        }
        self._emit("completed", image, created_at=int(time.time()), **{**self._format(image), **shown, **more})

    async def _preview(
        self, image: GeneratedImage, update: dict[str, Any], number: int, before: asyncio.Task[None] | None
    ) -> None:
        shown = await self._shown(image, Generated(update["codes"], update["weights"]))
        if before is not None:
            await before
        self._emit(
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

    def _emit(self, name: str, image: GeneratedImage, **data: Any) -> None:
        name = f"image_generation.{name}"
        self._events.put_nowait(event(name, {"type": name, "index": image.index, **data}))


class EventStream(StreamingResponse):
    """Server-sent event response that closes its source when the client disconnects, not at garbage collection."""

    def __init__(self, source: AsyncGenerator[bytes, None], seed: int | None) -> None:
        """``seed`` of the request: whoever makes it again gets the same events (:mod:`.proxy`)."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", SEED_HEADER: str(seed)}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.source.aclose()
