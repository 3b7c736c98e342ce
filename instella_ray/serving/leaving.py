"""Cancellation of requests whose client has disconnected, for plain ASGI servers; Ray Serve does this itself."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnLeave:
    """ASGI middleware that cancels a request as soon as its client disconnects, to free its slot."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Request(self.app, scope, receive, send).run()
        else:
            await self.app(scope, receive, send)


class _Request:
    """One running request. Its connection is watched once the application has read the whole body."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._disconnected = receive, asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._work = asyncio.ensure_future(app(scope, self._next, send))

    async def run(self) -> None:
        try:
            await self._work
        except asyncio.CancelledError:
            if not self._disconnected.is_set():
                raise
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    async def _next(self) -> Message:
        if self._watcher is not None:
            await self._disconnected.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if not message.get("more_body"):
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._disconnected.set()
        self._work.cancel()
