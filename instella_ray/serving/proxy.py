"""Middleware of Serve's HTTP proxies: requests survive the loss of an ingress replica, failures are in OpenAI's format.

Serve answers a request whose replica has died with a plain 500, and reports its own refusals as plain text. Imported by
the proxies, which start in a second: nothing heavy may be imported here.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_error import ApiError, overloaded, replica_lost

TRIES = 4
WAIT_S = 0.25
"""Seconds before the second try, doubled for each further one: Serve's router must notice that the replica is gone."""
REPLAYED_BYTES = 1 << 20
"""Largest body that is kept for another try."""


class KeepRequests:
    """ASGI middleware that repeats a request whose replica died before its response began.

    The requests of the API can be repeated: an image is a function of its request and seed. If the response has begun, a
    stream of events ends with an error event.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = _Body(receive)
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(WAIT_S * 2 ** (attempt - 1))
            answer = _Answer(send)
            # A copy: the application changes the path and the headers of its scope.
            await self.app({**scope, "headers": list(scope["headers"])}, body.replay(), answer.send)
            if not answer.lost or answer.started or not body.whole:
                break
        await answer.finish(scope, receive)


class _Body:
    """Messages of a request, kept to be received again."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._kept, self._bytes = receive, list[Message](), 0
        self._disconnected = False

    @property
    def whole(self) -> bool:
        """Whether all messages can be received again and the client still waits."""
        return self._bytes <= REPLAYED_BYTES and not self._disconnected

    def replay(self) -> Receive:
        """Return a ``receive`` that begins with the first message."""
        again = deque(self._kept)

        async def receive() -> Message:
            if again:
                return again.popleft()
            message = await self._receive()
            self._disconnected |= message["type"] == "http.disconnect"
            self._bytes += len(message.get("body", b""))
            if self.whole:
                self._kept.append(message)
            return message

        return receive


class _Answer:
    """Response of one try. Plain text with an error status, which only Serve itself sends, is kept back."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self._ended = False
        self._events = False
        self._status: int | None = None
        """Status of a response that is kept back."""

    @property
    def lost(self) -> bool:
        """Whether no replica has answered."""
        return not self._ended and self._status in (None, 500, 503)

    async def send(self, message: Message) -> None:
        """Send a message of the application to the client."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                self._status = message["status"]
                return
            self.started, self._events = True, kind.startswith(b"text/event-stream")
        if self.started:
            self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Send an error if the application has sent no response, or not all of it."""
        if self._ended:
            return
        error = _error(self._status)
        if not self.started:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, self._send)
        elif self._events:
            event = f"event: error\ndata: {json.dumps(error.body)}\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
        # Any other response breaks off, which its client sees by its length.


def _error(status: int | None) -> ApiError:
    match status:
        case None | 500 | 503:
            return replica_lost()
        case 404:
            return ApiError(404, "not found", code="not_found")
        case 408:
            return ApiError(504, "the proxy's deadline passed", kind="timeout_error", code="deadline_exceeded")
        case 429:
            return overloaded(1.0)
        case _:
            return ApiError(status, "the proxy refused the request")


def middlewares() -> list[Middleware]:
    """Return the middlewares; Serve calls this in each proxy (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(KeepRequests)]
