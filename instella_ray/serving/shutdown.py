"""Shutdown of Ray Serve."""

from __future__ import annotations

import logging

import ray
from ray.exceptions import RayActorError
from ray.serve import context

TIMEOUT_S = 30.0
log = logging.getLogger(__name__)


def shut_down_serve() -> None:
    """Shut down Serve on the connected cluster, if it runs, as ``serve.shutdown`` does.

    ``serve.shutdown`` waits in a call that ends with the controller, and Ray prints that it will retry the failed call
    without limit. Here the call is not retried.
    """
    client = context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()
    try:
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=TIMEOUT_S)
    except RayActorError:
        pass  # the controller has ended
    except TimeoutError:
        log.warning("Serve did not shut down within %g s", TIMEOUT_S)
    context._disconnect()
