"""Runs a step engine in a thread and lets coroutines follow their images."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from torch import Tensor

from ..engine.engine import Event, Expired, Finished, Progress, Request, StepEngine
from ..errors import UserError
from ..models.sampling import SamplingParams


class DeadlineExceeded(Exception):
    """The request's deadline passed before its image was done; its slot is free again."""


class EngineFailed(Exception):
    """The engine cannot go on; its replica is to be replaced, and the request made again elsewhere."""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A look at an engine, taken between two steps or in the middle of one."""

    waiting: int
    """Requests without a slot."""
    active: int
    slots: int
    steps: int
    """Forward passes since the start."""
    images: int
    """Images finished since the start."""
    busy_s: float
    """Seconds spent in steps since the start."""
    silence_s: float
    """Seconds since the engine last came round, 0 while it has nothing to do."""


class EngineRunner:
    """One thread steps the engine while there is work; any number of callers follow their own requests.

    The engine belongs to that thread alone: callers leave commands in an inbox, which is emptied between steps, so
    that no event loop ever waits for a step.
    """

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._callers: dict[str, _Caller] = {}
        self._failure: Exception | None = None
        self._closing = False
        self._came_round = time.monotonic()
        self._images, self._busy = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="step-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """Counts and times for metrics, scaling and health."""
        engine = self.engine
        silence = 0.0 if engine.idle and self._inbox.empty() else time.monotonic() - self._came_round
        return EngineStats(
            waiting=len(engine.waiting) + self._inbox.qsize(),
            active=engine.active,
            slots=engine.options.slots,
            steps=engine.steps,
            images=self._images,
            busy_s=self._busy,
            silence_s=silence,
        )

    def check(self, longest_step_s: float) -> None:
        """:class:`EngineFailed` when the thread has died, or has work and has not come round for ``longest_step_s``."""
        if self._failure is not None:
            raise EngineFailed(f"the step engine has failed: {self._failure}")
        if (silence := self.stats.silence_s) > longest_step_s:
            raise EngineFailed(f"the step engine has not come round for {silence:.0f} s")

    async def generate(self, features: Tensor, params: SamplingParams, *, timeout_s: float = float("inf")) -> Tensor:
        """Codes, uint8 ``[L, K]``; raises as :meth:`follow`."""
        async with aclosing(self.follow(features, params, timeout_s=timeout_s)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.codes
        raise AssertionError("a followed request ends with its image or an exception")

    async def follow(
        self, features: Tensor, params: SamplingParams, *, timeout_s: float = float("inf"), preview_every: int = 0
    ) -> AsyncGenerator[Progress | Finished, None]:
        """What happens to a request, :class:`.engine.Finished` last.

        Leaving the loop, or being cancelled, frees the slot at the next step. UserError for a request that the engine
        refuses, :class:`DeadlineExceeded` after ``timeout_s`` seconds, :class:`EngineFailed` when the engine breaks.
        """
        deadline = self.engine.clock() + timeout_s
        request = Request(uuid.uuid4().hex, features, params, deadline, preview_every)
        caller = _Caller(asyncio.get_running_loop())
        self._inbox.put(lambda: self._submit(request, caller))
        if self._failure is not None or self._closing:
            # The thread may have ended before it could see the command.
            caller.tell(EngineFailed(f"the step engine has ended ({self._failure or 'closed'})"))
        try:
            while True:
                event = await caller.events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Expired):
                    raise DeadlineExceeded(f"not done within {timeout_s:g} s")
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._inbox.put(lambda: self._cancel(request.id))

    async def drain(self) -> None:
        """Wait until every request is done, then end the thread. New requests must go elsewhere from now on."""
        while self._failure is None and (self._callers or not self.engine.idle or not self._inbox.empty()):
            await asyncio.sleep(0.02)
        self._closing = True
        self._inbox.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while True:
                self._take_commands()
                # A request may have come in between drain's last look and its goodbye.
                if self._closing and self.engine.idle:
                    return
                began = self._came_round = time.monotonic()
                for event in self.engine.step():
                    self._tell(event)
                self._busy += time.monotonic() - began
        except Exception as error:
            self._failure = error
            for caller in self._callers.values():
                caller.tell(EngineFailed(f"the step engine has failed: {error}"))
            raise

    def _take_commands(self) -> None:
        if self.engine.idle and not self._closing:
            command = self._inbox.get()
            self._came_round = time.monotonic()
            command()
        while not self._inbox.empty():
            self._inbox.get()()

    def _tell(self, event: Event) -> None:
        ended = not isinstance(event, Progress)
        caller = self._callers.pop(event.id, None) if ended else self._callers.get(event.id)
        self._images += isinstance(event, Finished)
        if caller is not None:
            caller.tell(event)

    def _submit(self, request: Request, caller: _Caller) -> None:
        try:
            self.engine.submit(request)
            self._callers[request.id] = caller
        except UserError as error:
            caller.tell(error)

    def _cancel(self, request_id: str) -> None:
        if self._callers.pop(request_id, None) is not None:
            self.engine.cancel(request_id)


class _Caller:
    """A coroutine's mailbox, filled from the engine's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    def tell(self, event: Event | Exception) -> None:
        # The loop may have closed, in which case nobody is listening any more.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
