"""Micro-batching for stages whose cost is per call: a few calls that arrive together become one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class MicroBatcher(Generic[A, B]):
    """Collects items for ``wait_s`` seconds or until there are ``size``, and runs ``call(items)`` in a thread.

    ``call`` returns one result an item. An exception reaches everybody in its batch. Calls run one at a time.
    """

    def __init__(self, call: Callable[[Sequence[A]], Sequence[B]], *, size: int, wait_s: float = 0.005) -> None:
        self.call, self.size, self.wait_s = call, size, wait_s
        self._queue: asyncio.Queue[tuple[A, asyncio.Future[B]]] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: A) -> B:
        """The result for ``item``."""
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._run())
        future: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        await self._queue.put((item, future))
        return await future

    def close(self) -> None:
        """End the worker. No caller may be waiting any more."""
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
