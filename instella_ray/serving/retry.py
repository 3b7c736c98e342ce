"""Calls that are made again when the replica working on them is lost.

Serve does not do that, because it cannot know that a call may be repeated. Ours may: the same seed gives the same bits
wherever it is run.
"""

from __future__ import annotations

from ..retries import RetryPolicy, causes
from .ray_errors import is_loss
from .runner import EngineFailed


def replica_failed(error: BaseException) -> bool:
    """True when the call may well succeed elsewhere: its replica, or one before it, died or broke."""
    return any(isinstance(cause, EngineFailed) or is_loss(cause) for cause in causes(error))


CALLS = RetryPolicy(replica_failed, tries=3, first_wait_s=0.2)
"""The waits are for the loss to get known."""
