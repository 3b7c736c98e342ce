"""Record of who used what: one audit line and Prometheus counters for each request."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..logs import AUDIT
from .metrics import UsageMetrics

REQUEST_ID = b"x-request-id"
LONGEST_ID = 128
CLIENT_LEFT = 499
"""Status of a request whose client left before its end, as in nginx's logs."""
audit = logging.getLogger(AUDIT)


@dataclass
class RequestUsage:
    """What one request asked for and how it ended; holds neither prompts nor keys."""

    request_id: str
    key: str | None = None
    """Name of the API key; None if the request was refused for lack of one."""
    path: str | None = None
    """Route, such as ``/v1/models/{name}``; None if the request was refused before it reached one."""
    model: str | None = None
    images: int | None = None
    size: str | None = None
    steps: int | None = None
    """Steps of each image."""
    status: int = 0
    """Status of the response, or of the error with which its stream ended."""
    code: str | None = None
    """OpenAI's code of the error, such as ``overloaded`` or ``rate_limit_exceeded``; None if it has none."""
    seconds: float = 0.0


class Usage:
    """ASGI middleware that records each request at its end, of a stream with its last event.

    The application finds the :class:`RequestUsage` to fill in as ``scope["usage"]``. Requests for ``open_paths`` are not
    recorded.
    """

    def __init__(self, app: ASGIApp, open_paths: Collection[str]) -> None:
        self.app, self.open_paths = app, open_paths
        self.metrics = UsageMetrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in self.open_paths:
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(REQUEST_ID, b"").decode("latin-1")[:LONGEST_ID]
        usage = scope["usage"] = RequestUsage(given or uuid.uuid4().hex)
        began, complete = time.perf_counter(), False

        async def noted(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                usage.status = usage.status or message["status"]
                if not given:  # Serve's proxy sets it itself
                    headers = [*message.get("headers", ()), (REQUEST_ID, usage.request_id.encode())]
                    message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            usage.status, complete = HTTPStatus.INTERNAL_SERVER_ERROR, True  # what the server will answer
            raise
        finally:
            if not complete:
                usage.status = CLIENT_LEFT
            usage.path = getattr(scope.get("route"), "path", None)
            usage.seconds = round(time.perf_counter() - began, 3)
            audit.info("request", extra=asdict(usage))
            images, steps = usage.images or 0, usage.steps or 0
            outcome = (int(usage.status), usage.code)
            self.metrics.count(usage.key, usage.model, outcome, images, steps, usage.seconds)


def path_of(scope: Scope) -> Any:
    """Return the path of a request within the application."""
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"
