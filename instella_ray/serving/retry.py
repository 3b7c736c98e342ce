"""Calls that are made again when the replica working on them is lost.

Serve does not do that, because it cannot know that a call may be repeated. Ours may: the same seed gives the same bits
wherever it is run.
"""

from __future__ import annotations

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    WorkerCrashedError,
)

from ..retries import RetryPolicy, causes
from .runner import EngineFailed

LOST = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    WorkerCrashedError,
    EngineFailed,
)


def replica_failed(error: BaseException) -> bool:
    """True when the call may well succeed elsewhere: its replica, or one before it, died or broke."""
    return any(isinstance(cause, LOST) for cause in causes(error))


CALLS = RetryPolicy(replica_failed, tries=3, first_wait_s=0.2)
"""The waits are for the loss to get known."""
