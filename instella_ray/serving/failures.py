"""Conversion of exceptions to HTTP error responses in OpenAI's format."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError
from ..retries import causes
from .ray_errors import full_queue_wait_s
from .retry import replica_failed
from .runner import DeadlineExceeded
from .safety import Flagged

log = logging.getLogger(__name__)


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


def refused(param: str, message: str, *, code: str | None = None) -> ApiError:
    """Return a 400 for the field ``param`` of a request; the message begins with its name."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def overloaded(retry_after_s: float) -> ApiError:
    """Return a 429: all slots are occupied and the queue is full."""
    message = "all slots are occupied and the queue is full; try again later"
    return ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=retry_after_s)


def api_error(error: BaseException) -> ApiError:
    """Convert an exception of this package, of a stage (possibly wrapped by Ray) or of Serve to a response."""
    for cause in reversed(causes(error)):
        match cause:
            case ApiError():
                return cause
            case UserError():
                return ApiError(400, str(cause))
            case Flagged():
                return ApiError(400, str(cause), code="content_policy_violation")
            case DeadlineExceeded() | TimeoutError():
                message = "timeout_s: the deadline passed before the request was complete"
                return ApiError(504, message, kind="timeout_error", param="timeout_s", code="deadline_exceeded")
        if (wait_s := full_queue_wait_s(cause)) is not None:
            return overloaded(wait_s)
    if replica_failed(error):
        message = "the replica that processed this request failed, and so did all retries; try again"
        return ApiError(503, message, kind="server_error", code="replica_failed", retry_after_s=1)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", kind="server_error")


@contextmanager
def answering() -> Iterator[None]:
    """Convert any exception raised within the block to an :class:`ApiError`.

    Needed in the route, because Serve registers its own plain-text handler for overloaded deployments in FastAPI.
    """
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:
        raise api_error(error) from error
