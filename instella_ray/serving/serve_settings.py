"""Settings of Ray Serve, which it reads from the environment of each of its processes at their start."""

from __future__ import annotations

import os

ROUTER_LOOP = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"
SETTINGS = {
    # Calls from process to process over gRPC in place of actor calls.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # No threads for the router and the request handling beside a replica's event loop: the stages compute in their own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    ROUTER_LOOP: "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # A proxy is replaced after three failed checks. Serve's 10 s between two of them would close the port for 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.2",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "instella_ray.serving.proxy:middlewares",
}
"""Measured in docs/benchmarks.md. A cluster needs them in the environment of its nodes."""


def set_up_serve() -> None:
    """Set SETTINGS for this process and the Ray that it starts; variables that are set already win.

    To be called before the first import of Serve, which then reads the environment.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
