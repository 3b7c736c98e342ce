"""Ray's own exceptions, told apart without loading Ray: where nobody has loaded it, nobody raises them."""

from __future__ import annotations

import sys


def is_loss(error: BaseException) -> bool:
    """True for what Ray raises when the process or machine that worked on a call, or one of its arguments, is gone."""
    known = sys.modules.get("ray.exceptions")
    if known is None:
        return False
    lost = (
        known.ActorDiedError,
        known.ActorUnavailableError,
        known.NodeDiedError,
        known.ObjectLostError,
        known.RayActorError,
        known.WorkerCrashedError,
    )
    return isinstance(error, lost)


def full_queue_wait_s(error: BaseException) -> float | None:
    """After how many seconds Serve wants to be asked again, where its own queue was full; None for other exceptions."""
    known = sys.modules.get("ray.serve.exceptions")
    if known is None or not isinstance(error, known.BackPressureError):
        return None
    return error.retry_after_s or 1.0
