"""Requests whose client has gone away: Serve cancels them by itself, plain ASGI servers let them run on."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnLeave:
    """ASGI middleware: cancels a request's work as soon as its client leaves, so that it occupies nothing for nobody."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Request(self.app, scope, receive, send).run()
        else:
            await self.app(scope, receive, send)


class _Request:
    """One request at work. Its connection is watched from the end of its body on: before, the application reads."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._left = receive, asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._work = asyncio.ensure_future(app(scope, self._next, send))

    async def run(self) -> None:
        try:
            await self._work
        except asyncio.CancelledError:
            if not self._left.is_set():
                raise
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    async def _next(self) -> Message:
        if self._watcher is not None:
            await self._left.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if not message.get("more_body"):
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        self._work.cancel()
