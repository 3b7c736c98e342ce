"""Micro-batching of concurrent calls, for stages whose cost is dominated by the number of calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class MicroBatcher(Generic[A, B]):
    """Batcher that collects items for ``wait_s`` seconds or up to ``size`` and runs ``call(items)`` in a thread.

    ``call`` returns one result per item. An exception is raised to every caller in the batch. Calls run one at a time.
    """

    def __init__(self, call: Callable[[Sequence[A]], Sequence[B]], *, size: int, wait_s: float = 0.005) -> None:
        self.call, self.size, self.wait_s = call, size, wait_s
        self._queue: asyncio.Queue[tuple[A, asyncio.Future[B]]] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: A) -> B:
        """Return the result for ``item``; raises the exception of its batch."""
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._run())
        future: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        await self._queue.put((item, future))
        return await future

    def close(self) -> None:
        """Stop the worker. No calls may be pending."""
        if self._worker is not None:
            self._worker.cancel()

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            deadline = asyncio.get_running_loop().time() + self.wait_s
            while len(batch) < self.size:
                left = deadline - asyncio.get_running_loop().time()
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), max(left, 0)))
                except TimeoutError:
                    break
            batch = [(item, future) for item, future in batch if not future.done()]
            if not batch:
                continue
            try:
                results = await asyncio.to_thread(self.call, [item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
