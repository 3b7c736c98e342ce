"""The endpoint in one process, without Ray: API, limits, engines and page as on Serve, every stage once.

Where ``replicas``, ``autoscaling`` and shares of CPUs lay an endpoint out over a cluster, they have no effect here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from .. import logs
from .api import make_api
from .config import ServeArgs
from .deployments import DecoderStage, GeneratorStage, TextEncoderStage
from .graph import Graph
from .leaving import CancelOnLeave
from .setup import Setup

_END = object()


@dataclass(frozen=True)
class LocalHandle:
    """Calls a stage of this process as Serve's handles do. A call is a task of the running loop."""

    stage: Any
    stream: bool = False
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    """Those under way."""

    def options(self, *, stream: bool) -> LocalHandle:
        """The same stage, called for an answer in parts or in one piece."""
        return LocalHandle(self.stage, stream, self.calls)

    def __getattr__(self, method: str) -> LocalMethod:
        return LocalMethod(self, getattr(self.stage, method))

    def begin(self, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a call of the stage."""
        task = asyncio.create_task(call)
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)
        return task

    async def close(self) -> None:
        """Cancel the calls under way and end the stage's threads."""
        for call in self.calls:
            call.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)
        await self.stage.close()


@dataclass(frozen=True)
class LocalMethod:
    """A method of a stage, to be called."""

    handle: LocalHandle
    function: Callable[..., Any]

    def remote(self, *arguments: Any) -> asyncio.Task[Any] | LocalStream:
        """Begin a call; arguments that are calls themselves are waited for first."""
        if self.handle.stream:
            return LocalStream(self.handle, self.function, arguments)
        return self.handle.begin(self._call(arguments))

    async def _call(self, arguments: tuple[Any, ...]) -> Any:
        return await self.function(*await _answers(arguments))


class LocalStream:
    """The parts of a call's answer. The call does not wait for who reads them."""

    def __init__(
        self, handle: LocalHandle, function: Callable[..., AsyncGenerator[Any, None]], arguments: tuple[Any, ...]
    ) -> None:
        self._parts: asyncio.Queue[Any] = asyncio.Queue()
        self._call = handle.begin(self._run(function, arguments))
        self._call.add_done_callback(lambda _: self._parts.put_nowait(_END))

    def cancel(self) -> None:
        """End the call."""
        self._call.cancel()

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> Any:
        if (part := await self._parts.get()) is not _END:
            return part
        await self._call  # raises what ended it, if anything did
        raise StopAsyncIteration

    async def _run(self, function: Callable[..., AsyncGenerator[Any, None]], arguments: tuple[Any, ...]) -> None:
        async with aclosing(function(*await _answers(arguments))) as parts:
            async for part in parts:
                self._parts.put_nowait(part)


async def _answers(arguments: tuple[Any, ...]) -> list[Any]:
    return [await value if isinstance(value, asyncio.Task) else value for value in arguments]


async def unhealthy(stages: Mapping[str, LocalHandle]) -> list[str]:
    """Stages that fail their health check, with what kind of failure it is."""
    found = []
    for name, handle in stages.items():
        try:
            await handle.stage.check_health()
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}")
    return found


def build_local(args: ServeArgs) -> FastAPI:
    """The application with its models loaded, for any ASGI server; its lifespan ends the engines and their threads.

    The graph is its ``state.graph``. UserError as :meth:`.setup.Setup.of`.
    """
    setup = Setup.of(args)
    text, decoder = LocalHandle(TextEncoderStage(**setup.text())), LocalHandle(DecoderStage(**setup.decoder()))
    generators = {name: LocalHandle(GeneratorStage(**setup.generator(name))) for name in args.models}
    # Each stage has called this process's records its own.
    logs.set_up({"job": "serve", "stage": "all"})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(handle.close() for handle in (text, decoder, *generators.values())))

    graph = Graph(text, decoder, generators, setup.served.tokenizer_hash, unhealthy)
    api = make_api(setup.service(graph), setup.keys, lifespan)
    api.add_middleware(CancelOnLeave)
    api.state.graph = graph
    return api
