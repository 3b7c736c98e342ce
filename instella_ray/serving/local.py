"""Endpoint in one process, without Ray: the same API, limits, engines and page as on Serve, one instance per stage.

``replicas``, ``autoscaling`` and CPU shares, which distribute an endpoint over a cluster, have no effect here.
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
    """Handle of a stage in this process, with the interface of Serve's handles; calls are tasks of the running loop."""

    stage: Any
    stream: bool = False
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    """Calls in progress."""

    def options(self, *, stream: bool) -> LocalHandle:
        """Return a handle of the same stage whose calls stream their results or return one."""
        return LocalHandle(self.stage, stream, self.calls)

    def __getattr__(self, method: str) -> LocalMethod:
        return LocalMethod(self, getattr(self.stage, method))

    def begin(self, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a call of the stage."""
        task = asyncio.create_task(call)
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)
        return task

    async def close(self) -> None:
        """Cancel the calls in progress and close the stage."""
        for call in self.calls:
            call.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)
        await self.stage.close()


@dataclass(frozen=True)
class LocalMethod:
    """Method of a stage, called with ``remote``."""

    handle: LocalHandle
    function: Callable[..., Any]

    def remote(self, *arguments: Any) -> asyncio.Task[Any] | LocalStream:
        """Start a call."""
        if self.handle.stream:
            return LocalStream(self.handle, self.function(*arguments))
        return self.handle.begin(self.function(*arguments))


class LocalStream:
    """Asynchronous iterator over the results of a streaming call. The call does not wait for its reader."""

    def __init__(self, handle: LocalHandle, results: AsyncGenerator[Any, None]) -> None:
        self._parts: asyncio.Queue[Any] = asyncio.Queue()
        self._call = handle.begin(self._run(results))
        self._call.add_done_callback(lambda _: self._parts.put_nowait(_END))

    def cancel(self) -> None:
        """Cancel the call."""
        self._call.cancel()

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> Any:
        if (part := await self._parts.get()) is not _END:
            return part
        await self._call  # raises the exception of the call, if any
        raise StopAsyncIteration

    async def _run(self, results: AsyncGenerator[Any, None]) -> None:
        async with aclosing(results) as parts:
            async for part in parts:
                self._parts.put_nowait(part)


async def unhealthy(stages: Mapping[str, LocalHandle]) -> list[str]:
    """Return ``name: exception type`` of each stage that fails its health check."""
    found = []
    for name, handle in stages.items():
        try:
            await handle.stage.check_health()
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}")
    return found


def build_local(args: ServeArgs) -> FastAPI:
    """Build the application with its models loaded, for any ASGI server; its lifespan stops the engines and threads.

    The application's ``state.graph`` is the graph. Raises UserError as :meth:`.setup.Setup.of`.
    """
    setup = Setup.of(args.model_copy(update={"ingress_replicas": 1}))
    text, decoder = LocalHandle(TextEncoderStage(**setup.text())), LocalHandle(DecoderStage(**setup.decoder()))
    generators = {name: LocalHandle(GeneratorStage(**setup.generator(name))) for name in args.models}
    # Each stage has set the process-wide log context to its own name.
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
