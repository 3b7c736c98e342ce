"""Retry policy for calls whose replica is lost.

Serve does not retry, because it cannot know that a call is idempotent. These calls are: the same seed gives the same
bits on any replica.
"""

from __future__ import annotations

from ..retries import RetryPolicy, causes
from .ray_errors import is_loss
from .runner import EngineFailed


def replica_failed(error: BaseException) -> bool:
    """Return whether ``error`` is the failure of a replica, so that a retry on another one may succeed."""
    return any(isinstance(cause, EngineFailed) or is_loss(cause) for cause in causes(error))


CALLS = RetryPolicy(replica_failed, tries=3, first_wait_s=0.2)
"""Waits between attempts, so that Serve can detect the lost replica."""
