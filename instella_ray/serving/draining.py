"""Graceful end of an endpoint: requests in progress finish while new ones are refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from .api_error import ApiError

POLL_S = 0.1
"""Seconds between questions for the requests in progress."""


@dataclass
class InProgress:
    """HTTP requests of one process."""

    count: int = 0
    draining: bool = False
    """Whether new requests are refused."""


class Drain:
    """ASGI middleware that counts requests in progress, and answers new ones with 503 while draining.

    Health probes are refused as well, so that a load balancer stops sending requests.
    """

    def __init__(self, app: ASGIApp, requests: InProgress) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.requests.draining:
            error = ApiError(
                503, "the endpoint is shutting down", kind="server_error", code="shutting_down", retry_after_s=5
            )
            return await error.response(scope, receive, send)
        self.requests.count += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            self.requests.count -= 1


def wait_until_drained(ask: Callable[[], Iterable[int]], grace_s: float, poll_s: float = POLL_S) -> int:
    """Wait until no request is in progress, for at most ``grace_s`` seconds; returns the number of those left.

    ``ask`` returns the number of requests in progress of each process.
    """
    end = time.monotonic() + grace_s
    while (left := sum(ask())) and time.monotonic() < end:
        time.sleep(poll_s)
    return left
