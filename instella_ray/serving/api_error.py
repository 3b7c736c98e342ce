"""HTTP error responses in OpenAI's format."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """HTTP error response: status, OpenAI's message, type (``kind``), param and code, and Retry-After in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """JSON body in OpenAI's error format."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    @property
    def response(self) -> JSONResponse:
        """The response, which is also an ASGI application."""
        return JSONResponse(self.body, self.status, self.headers)


def refused(param: str, message: str, *, code: str | None = None) -> ApiError:
    """Return a 400 for the field ``param`` of a request; the message begins with its name."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def overloaded(retry_after_s: float) -> ApiError:
    """Return a 429: all slots are occupied and the queue is full."""
    message = "all slots are occupied and the queue is full; try again later"
    return ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=retry_after_s)


def rate_limited(limit: str, retry_after_s: float) -> ApiError:
    """Return a 429: the API key has reached its ``limit``."""
    message = f"this API key has reached its limit: {limit}; try again later"
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s)


def replica_lost() -> ApiError:
    """Return a 503: the replicas that processed the request have failed."""
    message = "the replica that processed this request failed, and so did all retries; try again"
    return ApiError(503, message, kind="server_error", code="replica_failed", retry_after_s=1)
