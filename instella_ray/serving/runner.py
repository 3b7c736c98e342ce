"""Runner of a step engine in a thread, with an asynchronous interface for its callers."""

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

from ..engine.engine import Request, StepEngine
from ..engine.events import Event, Expired, Finished, Progress
from ..errors import UserError
from ..models.sampling import SamplingParams


class DeadlineExceeded(Exception):
    """The deadline of a request passed before its image was complete; its slot has been released."""


class EngineFailed(Exception):
    """The engine has failed; its replica must be replaced and the request retried on another one."""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Snapshot of an engine's counters, possibly taken during a step."""

    waiting: int
    """Requests waiting for a slot."""
    active: int
    """Occupied slots."""
    slots: int
    steps: int
    """Forward passes since the start."""
    images: int
    """Completed images since the start."""
    busy_s: float
    """Seconds spent in steps since the start."""
    silence_s: float
    """Seconds since the engine last started a step; 0 when idle."""


class EngineRunner:
    """Runner that steps an engine in its own thread while it has requests, for any number of concurrent callers.

    Only this thread accesses the engine: callers put commands into an inbox, which is emptied between steps, so that no
    event loop blocks on a step.
    """

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._callers: dict[str, _Caller] = {}
        self._failure: Exception | None = None
        self._closing = False
        self._last_step = time.monotonic()
        self._images, self._busy = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="step-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """Current counters, for metrics, autoscaling and health checks."""
        engine = self.engine
        silence = 0.0 if engine.idle and self._inbox.empty() else time.monotonic() - self._last_step
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
        """Raise :class:`EngineFailed` if the thread has failed or completed no step for ``longest_step_s`` seconds."""
        if self._failure is not None:
            raise EngineFailed(f"the step engine has failed: {self._failure}")
        if (silence := self.stats.silence_s) > longest_step_s:
            raise EngineFailed(f"the step engine has not completed a step for {silence:.0f} s")

    async def generate(
        self,
        features: Tensor,
        params: SamplingParams,
        *,
        timeout_s: float = float("inf"),
        prompt: str | None = None,
    ) -> Tensor:
        """Generate codes, uint8 0/1 ``[L, K]``; arguments and exceptions as :meth:`follow`."""
        async with aclosing(self.follow(features, params, timeout_s=timeout_s, prompt=prompt)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.codes
        raise AssertionError("a request ends with Finished or an exception")

    async def follow(
        self,
        features: Tensor,
        params: SamplingParams,
        *,
        timeout_s: float = float("inf"),
        preview_every: int = 0,
        prompt: str | None = None,
    ) -> AsyncGenerator[Progress | Finished, None]:
        """Submit a :class:`..engine.engine.Request` and yield its events, :class:`..engine.engine.Finished` last.

        Closing or cancelling the generator releases the slot at the next step. Raises UserError for an invalid request,
        :class:`DeadlineExceeded` after ``timeout_s`` seconds, and :class:`EngineFailed` if the engine fails.
        """
        now = self.engine.clock()
        request = Request(uuid.uuid4().hex, features, params, now + timeout_s, preview_every, prompt, now)
        caller = _Caller(asyncio.get_running_loop())
        self._inbox.put(lambda: self._submit(request, caller))
        if self._failure is not None or self._closing:
            # The thread may have ended before it processed the command.
            caller.put(EngineFailed(f"the step engine has ended ({self._failure or 'closed'})"))
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
        """Wait until all requests have ended, then stop the thread. No new requests may be submitted."""
        while self._failure is None and (self._callers or not self.engine.idle or not self._inbox.empty()):
            await asyncio.sleep(0.02)
        self._closing = True
        self._inbox.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while True:
                self._take_commands()
                # A request may have arrived between drain's last check and its setting of _closing.
                if self._closing and self.engine.idle:
                    return
                began = self._last_step = time.monotonic()
                for event in self.engine.step():
                    self._dispatch(event)
                self._busy += time.monotonic() - began
        except Exception as error:
            self._failure = error
            for caller in self._callers.values():
                caller.put(EngineFailed(f"the step engine has failed: {error}"))
            raise

    def _take_commands(self) -> None:
        if self.engine.idle and not self._closing:
            command = self._inbox.get()
            self._last_step = time.monotonic()
            command()
        while not self._inbox.empty():
            self._inbox.get()()

    def _dispatch(self, event: Event) -> None:
        ended = not isinstance(event, Progress)
        caller = self._callers.pop(event.id, None) if ended else self._callers.get(event.id)
        self._images += isinstance(event, Finished)
        if caller is not None:
            caller.put(event)

    def _submit(self, request: Request, caller: _Caller) -> None:
        try:
            self.engine.submit(request)
            self._callers[request.id] = caller
        except UserError as error:
            caller.put(error)

    def _cancel(self, request_id: str) -> None:
        if self._callers.pop(request_id, None) is not None:
            self.engine.cancel(request_id)


class _Caller:
    """Event queue of one caller, filled from the engine's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    def put(self, event: Event | Exception) -> None:
        # The caller's loop may have closed meanwhile.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
