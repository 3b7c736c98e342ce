"""Access control: check of API keys, the listening address, and the limit on the size of a request body."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UserError
from .api_error import ApiError
from .caller import CallerLimits
from .keys import ANONYMOUS, KEYS_VARIABLE, ApiKey, ApiKeys
from .usage import RequestUsage, path_of

OPEN_PATHS = ("/", "/healthz")
"""Paths without a key check: the page, which asks its user for the key, and health probes, which have none."""
BODY_TIMEOUT_S = 30.0


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, keys: ApiKeys) -> None:
    """Raise UserError if other machines can reach ``host`` and no keys are set."""
    if not keys and not is_loopback(host):
        raise UserError(
            f"host {host}: other machines could reach this endpoint, and there are no API keys; "
            f"set {KEYS_VARIABLE} or app.api_keys_file, or listen on 127.0.0.1"
        )


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def require_free_port(host: str, port: int) -> None:
    """Raise UserError if ``port`` cannot be bound. Serve reports this only from an actor, after loading all models."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"port {port}: cannot listen on {host} ({error.strerror}); choose another port") from None


class KeyCheck:
    """ASGI middleware: 401 without a valid ``Authorization: Bearer KEY``; without any keys, 403 for other machines.

    POST requests over the rate of their key get 429. The application finds the :class:`.caller.Caller` of other requests
    as ``scope["caller"]``.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: CallerLimits) -> None:
        self.app, self.keys, self.limits = app, keys, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            usage: RequestUsage | None = scope.get("usage")
            try:
                key = self._key(scope)
                if usage is not None:
                    usage.key = key.name if key else ANONYMOUS
                scope["caller"] = self.limits.caller(key, counted=scope["method"] == "POST")
            except ApiError as refusal:
                if usage is not None:
                    usage.code = refusal.code
                return await refusal.response(scope, receive, send)
        await self.app(scope, receive, send)

    def _key(self, scope: Scope) -> ApiKey | None:
        """Return the key of a request, None if it needs none; raises ApiError for a request that is refused."""
        if not self.keys:
            # jobs/serve.py checks the address before it listens; `serve deploy` listens on the address of its file.
            client = scope.get("client")
            if client and is_loopback(client[0]):
                return None
            message = f"no API keys are set ({KEYS_VARIABLE}), so only requests from this machine are accepted"
            raise ApiError(403, message, kind="authentication_error", code="no_api_keys")
        if path_of(scope) in OPEN_PATHS:
            return None
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and (key := self.keys.find(given.strip())):
            return key
        message = "expected the header 'Authorization: Bearer KEY' with a valid API key"
        raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")


class BodyLimit:
    """ASGI middleware that reads the whole body before the application runs.

    Answers 413 for a body over ``max_bytes``, with or without a Content-Length, and 408 after ``timeout_s`` seconds.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self.app, self.max_bytes, self.timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(scope, receive)
        except ApiError as refusal:
            await refusal.response(scope, receive, send)
        except TimeoutError:
            message = f"body: not complete within {self.timeout_s:g} s"
            await ApiError(408, message, code="body_timeout").response(scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, _first({"type": "http.request", "body": body}, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client disconnected."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self.max_bytes} bytes", param="body", code="body_too_large")


def _first(message: Message, receive: Receive) -> Receive:
    """Return a ``receive`` that yields ``message`` first."""
    waiting = [message]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
