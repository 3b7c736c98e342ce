"""Conversion of exceptions to HTTP error responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UserError
from ..retries import causes
from .api_error import ApiError, overloaded, replica_lost
from .ray_errors import full_queue_wait_s
from .retry import replica_failed
from .runner import DeadlineExceeded
from .safety import Flagged

log = logging.getLogger(__name__)


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
        return replica_lost()
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
