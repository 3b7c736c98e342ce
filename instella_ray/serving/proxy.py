"""Middleware of Serve's HTTP proxies: requests survive the loss of an ingress replica, failures are in OpenAI's format.

Serve answers a request whose replica has died with a plain 500, and reports its own refusals as plain text. Imported by
the proxies, which start in a second: nothing heavy may be imported here.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_error import ApiError, overloaded, replica_lost
from .event_stream import DONE, SEED_HEADER, event

TRIES = 4
WAIT_S = 0.25
"""Seconds before the second try, doubled for each further one: Serve's router must notice that the replica is gone."""
REPEATED_BYTES = 1 << 20
"""Largest body that is kept for another try."""


class KeepRequests:
    """ASGI middleware that repeats a request whose replica died before its response was complete.

    The requests of the API can be repeated: an image is a function of its request and seed. A stream that has begun goes
    on with the events that were not sent; any other response that has begun breaks off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, answer = _Body(receive), _Answer(send)
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(WAIT_S * 2 ** (attempt - 1))
            # A copy: the application changes the path and the headers of its scope.
            headers = [(name, value) for name, value in scope["headers"] if not attempt or name != b"content-length"]
            await self.app({**scope, "headers": headers}, body.again(answer.seed), answer.attempt())
            if not answer.lost or not body.whole:
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
        return self._bytes <= REPEATED_BYTES and not self._disconnected

    def again(self, seed: int | None) -> Receive:
        """Return a ``receive`` that begins with the first message; ``seed`` is set in the JSON of a complete body."""
        kept = self._kept if seed is None else [_with_seed(self._kept, seed)]
        left = deque(kept)

        async def receive() -> Message:
            if left:
                return left.popleft()
            message = await self._receive()
            self._disconnected |= message["type"] == "http.disconnect"
            self._bytes += len(message.get("body", b""))
            if self.whole:
                self._kept.append(message)
            return message

        return receive


class _Answer:
    """Response of a request over all of its tries.

    Plain text with an error status, which only Serve itself sends, is kept back.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._events: _Events | None = None
        self._started = self._ended = False
        self._status: int | None = None
        """Status of a response that is kept back."""

    @property
    def lost(self) -> bool:
        """Whether no replica has answered completely, so that another try may."""
        repeatable = not self._started or (self._events is not None and not self._events.done)
        return not self._ended and repeatable and self._status in (None, 500, 503)

    @property
    def seed(self) -> int | None:
        """Seed of a stream that has begun."""
        return self._events.seed if self._events is not None else None

    def attempt(self) -> Send:
        """Return the ``send`` of another try."""
        self._status = None
        first = not self._started
        passing = first

        async def send(message: Message) -> None:
            nonlocal passing
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                kind = headers.get(b"content-type", b"")
                events = kind.startswith(b"text/event-stream")
                if message["status"] >= 400 and (kind.startswith(b"text/plain") or not first):
                    self._status, passing = message["status"], False
                    return
                passing = first or events
                if not first:
                    return
                self._started = True
                if events:
                    self._events = _Events(headers)
            if not passing:
                return
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            if self._events is not None and message["type"] == "http.response.body":
                message = {**message, "body": self._events.unsent(message.get("body", b""), first=first)}
            self._ended = ended
            await self._send(message)

        return send

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Send an error if the application has sent no response, or not all of it."""
        if self._ended:
            return
        error = _error(self._status)
        if not self._started:
            await error.response(scope, receive, self._send)
        elif self._events is not None and self._events.done:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        elif self._events is not None:
            await self._send(
                {"type": "http.response.body", "body": event("error", error.body) + DONE, "more_body": False}
            )
        # Any other response breaks off, which its client sees by its length.


class _Events:
    """Events of a stream that were sent, so that those of another try go on after them."""

    _KIND = re.compile(rb"event: image_generation\.(\w+)\n")
    _NUMBER = re.compile(rb'"(index|step|partial_image_index)": (\d+)')

    def __init__(self, headers: dict[bytes, bytes]) -> None:
        seed = headers.get(SEED_HEADER.encode(), b"")
        self.seed = int(seed) if seed.isdigit() else None
        self.done = False
        """Whether the last event was sent."""
        self._latest: dict[tuple[int, bytes], int] = {}
        """The largest number that was sent, by image and kind of event."""

    def unsent(self, body: bytes, *, first: bool) -> bytes:
        """Return the events of ``body`` that were not sent; of the ``first`` try all, which are noted."""
        parts = body.split(b"\n\n")
        kept = [part for part in parts[:-1] if self._note(part) or first]
        return b"".join(part + b"\n\n" for part in kept) + parts[-1]

    def _note(self, part: bytes) -> bool:
        self.done |= part + b"\n\n" == DONE
        kind = self._KIND.match(part)
        if kind is None:
            return True
        # The numbers stand before the image.
        numbers = {name: int(value) for name, value in self._NUMBER.findall(part[:400])}
        number = numbers.get(b"partial_image_index" if kind[1] == b"partial_image" else b"step", 0)
        key = (numbers.get(b"index", 0), kind[1])
        if number <= self._latest.get(key, -1):
            return False
        self._latest[key] = number
        return True


def _with_seed(messages: list[Message], seed: int) -> Message:
    body = b"".join(message.get("body", b"") for message in messages)
    return {"type": "http.request", "body": json.dumps({**json.loads(body), "seed": seed}).encode(), "more_body": False}


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
