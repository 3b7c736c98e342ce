"""Classification of Ray's exceptions without importing Ray: if it is not loaded, none can have been raised."""

from __future__ import annotations

import sys


def is_loss(error: BaseException) -> bool:
    """Return whether ``error`` is Ray's for a call whose process, machine or argument was lost."""
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
    return isinstance(error, lost) or _connection_lost(error)


def _connection_lost(error: BaseException) -> bool:
    # Serve calls replicas over gRPC, and converts only one of the codes with which a broken connection may end a call.
    grpc = sys.modules.get("grpc")
    return (
        grpc is not None
        and isinstance(error, grpc.RpcError)
        and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
    )


def full_queue_wait_s(error: BaseException) -> float | None:
    """Return the seconds to wait before a retry if Serve's queue was full; None for any other exception."""
    known = sys.modules.get("ray.serve.exceptions")
    if known is None or not isinstance(error, known.BackPressureError):
        return None
    return error.retry_after_s or 1.0
