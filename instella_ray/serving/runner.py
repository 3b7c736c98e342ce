"""Runs a step engine in a thread and lets coroutines wait for their pictures."""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import Callable

from torch import Tensor

from ..errors import UserError
from ..sampling import SamplingParams
from .engine import Request, StepEngine


class EngineRunner:
    """One thread steps the engine while there is work; :meth:`generate` is awaited by any number of callers.

    The engine belongs to that thread alone: callers leave commands in an inbox, which is emptied between steps, so
    that no event loop ever waits for a step.
    """

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._futures: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Future[Tensor]]] = {}
        self._thread = threading.Thread(target=self._run, name="step-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the engine's thread has died: its replica must be replaced."""
        return self._thread.is_alive()

    async def generate(self, features: Tensor, params: SamplingParams) -> Tensor:
        """Codes, uint8 ``[L, K]``. When the caller is cancelled, the slot is freed at the next step."""
        request = Request(uuid.uuid4().hex, features, params)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Tensor] = loop.create_future()
        self._inbox.put(lambda: self._submit(request, loop, future))
        try:
            return await future
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._cancel(request.id))
            raise

    def _run(self) -> None:
        try:
            while True:
                self._take_commands()
                for item in self.engine.step():
                    loop, future = self._futures.pop(item.id)
                    loop.call_soon_threadsafe(_settle, future, item.codes, None)
        except Exception as error:
            for loop, future in self._futures.values():
                loop.call_soon_threadsafe(_settle, future, None, error)
            raise

    def _take_commands(self) -> None:
        if self.engine.idle:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _submit(self, request: Request, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Tensor]) -> None:
        try:
            self.engine.submit(request)
            self._futures[request.id] = (loop, future)
        except UserError as error:
            loop.call_soon_threadsafe(_settle, future, None, error)

    def _cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self._futures.pop(request_id, None)


def _settle(future: asyncio.Future[Tensor], result: Tensor | None, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    elif result is not None:
        future.set_result(result)
