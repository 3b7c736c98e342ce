"""Who may ask, and for how much: API keys, and the size of a body before anybody has read it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Collection, Iterable
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UserError
from .failures import ApiError

KEYS_VARIABLE = "INSTELLA_API_KEYS"
SHORTEST_KEY = 16
OPEN_PATHS = ("/", "/healthz")
"""The page sends the key that its user types in; probes have none."""
BODY_TIMEOUT_S = 30.0


class ApiKeys:
    """The keys that open the endpoint. Only their digests are kept, so that Serve's records hold no secret."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self.digests = tuple(_digest(key.encode()) for key in keys)

    @classmethod
    def load(cls, file: str | None = None) -> ApiKeys:
        """Those of the environment, comma separated, and of ``file``, one a line; lines with # are comments."""
        keys = os.environ.get(KEYS_VARIABLE, "").split(",")
        if file is not None:
            try:
                lines = Path(file).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"api_keys_file {file}: cannot be read ({error})") from None
            keys += [line for line in lines if not line.lstrip().startswith("#")]
        keys = [key.strip() for key in keys if key.strip()]
        if any(len(key) < SHORTEST_KEY or not key.isascii() or " " in key for key in keys):
            # Without the key itself: this line ends up in logs.
            raise UserError(f"API keys: expected at least {SHORTEST_KEY} ASCII characters each, without spaces")
        if file is not None and not keys:
            raise UserError(f"api_keys_file {file}: holds no key")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def accept(self, key: bytes) -> bool:
        """True for one of the keys; takes as long for a nearly right one as for any other."""
        given = _digest(key)
        # Not any(): it would stop at the first, and tell by its time which key it was.
        return sum(hmac.compare_digest(given, digest) for digest in self.digests) > 0


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, keys: ApiKeys) -> None:
    """UserError for an address that others reach while there are no keys."""
    if not keys and not is_loopback(host):
        raise UserError(
            f"host {host}: others could reach this endpoint, and there are no API keys; "
            f"set {KEYS_VARIABLE} or app.api_keys_file, or listen on 127.0.0.1"
        )


def require_free_port(host: str, port: int) -> None:
    """UserError when nothing can listen there. Serve itself would say so from an actor, after everything is loaded."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that ended a moment ago is no obstacle
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"port {port}: cannot listen on {host} ({error.strerror}); choose another port") from None


class KeyCheck:
    """ASGI middleware: 401 without a valid ``Authorization: Bearer KEY``; without any keys, 403 for other machines."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: Collection[str] = OPEN_PATHS) -> None:
        self.app, self.keys, self.open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self.app(scope, receive, send) if refusal is None else _answer(refusal, scope, receive, send))

    def _refusal(self, scope: Scope) -> ApiError | None:
        if not self.keys:
            # The job refuses to listen for others without keys; `serve deploy` listens where its file says.
            client = scope.get("client")
            if client and is_loopback(client[0]):
                return None
            message = f"no API keys are set ({KEYS_VARIABLE}), so this endpoint answers on its own machine only"
            return ApiError(403, message, kind="authentication_error", code="no_api_keys")
        if (scope["path"].removeprefix(scope.get("root_path", "")) or "/") in self.open_paths:
            return None
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and self.keys.accept(key.strip()):
            return None
        message = "expected the header 'Authorization: Bearer KEY' with a valid API key"
        return ApiError(401, message, kind="authentication_error", code="invalid_api_key")


class BodyLimit:
    """ASGI middleware: reads a body up to ``max_bytes`` and passes it on whole; 413 for more, announced or not."""

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
            await _answer(refusal, scope, receive, send)
        except TimeoutError:
            message = f"body: not complete within {self.timeout_s:g} s"
            await _answer(ApiError(408, message, code="body_timeout"), scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, _first({"type": "http.request", "body": body}, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None for a client that went away."""
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


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _first(message: Message, receive: Receive) -> Receive:
    """``message``, then what ``receive`` brings."""
    waiting = [message]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _answer(refusal: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)
