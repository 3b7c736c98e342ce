"""Server of an endpoint until SIGTERM or Ctrl-C: on Ray Serve, or in this process without Ray."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..resources import lacking
from .access import check_address, require_free_port
from .config import ServeArgs
from .draining import wait_until_drained
from .keys import ApiKeys
from .ray_errors import is_loss
from .serve_settings import set_up_serve

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

APP = "instella-ray"
"""Name of the endpoint's application on Serve."""
ANSWER_S = 5.0
"""Seconds that the replicas of the ingress have to answer."""
ANSWER_TRIES = 5


def serve_forever(args: ServeArgs, host: str, port: int, grace_s: float, *, local: bool) -> None:
    """Serve ``args`` on ``host:port`` until SIGTERM or Ctrl-C.

    Requests that are then in progress have ``grace_s`` seconds to finish; new ones are refused. ``local`` serves without
    Ray. Raises UserError before anything has started for an address that cannot be used, models that cannot be
    loaded, resources that the cluster lacks, and a Ray whose Serve runs another endpoint; after the start for replicas that
    refuse it, such as one with a share of a GPU on a node where PyTorch sees none.
    """
    keys = ApiKeys.load(args.api_keys_file, args.models)
    check_address(host, keys)
    require_free_port(host, port)
    message = f"listening on http://{host}:{port} ({'with' if keys else 'without'} API keys)"
    (_in_process if local else _on_serve)(args, host, port, grace_s, lambda: print(message, flush=True))


def _in_process(args: ServeArgs, host: str, port: int, grace_s: float, started: Callable[[], None]) -> None:
    import uvicorn

    from .local import build_local

    class Server(uvicorn.Server):
        async def startup(self, *arguments: Any, **options: Any) -> None:
            await super().startup(*arguments, **options)
            started()

        def handle_exit(self, sig: int, frame: Any) -> None:
            print("stopping", flush=True)
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        build_local(args), host=host, port=port, log_level="warning", timeout_graceful_shutdown=max(1, round(grace_s))
    )
    # Uvicorn repeats the signal that has stopped it, once it has ended.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with suppress(KeyboardInterrupt):
        Server(config).run()


def _on_serve(args: ServeArgs, host: str, port: int, grace_s: float, started: Callable[[], None]) -> None:
    set_up_serve()

    import ray
    from ray import serve

    from ..data.ray_data import init_ray
    from .app import build
    from .shutdown import shut_down_serve

    app = build(args)
    init_ray()
    refuse_second_endpoint()
    if short := lacking(args.needs(), [node["Resources"] for node in ray.nodes() if node["Alive"]]):
        raise UserError(f"app: {short}; lower num_cpus, num_gpus or replicas, or queue the job with --queue of submit")
    # Supervisors stop a process with SIGTERM. Set after Ray's start, because Ray's handler would abort a slow shutdown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(http_options={"host": host, "port": port})
        try:
            handle = serve.run(app, name=APP, route_prefix="/")
        except RuntimeError as error:
            raise _refusal() or error from None
        # Called outside of an event loop, which needs a router with its own, whatever the setting for replicas.
        handle._init(_run_router_in_separate_loop=True)
        started()
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            _drain(handle, grace_s)
    except KeyboardInterrupt:
        print("stopping at once", flush=True)
    finally:
        shut_down_serve()


def _refusal() -> UserError | None:
    """Return the UserError for which replicas of the application have not started, such as a missing GPU; None if none."""
    from ray import serve

    for name, deployment in serve.status().applications[APP].deployments.items():
        if found := re.search(rf"{UserError.__module__}\.{UserError.__name__}: (.*)", deployment.message):
            return UserError(f"{name}: {found[1]}")
    return None


def _drain(handle: DeploymentHandle, grace_s: float) -> None:
    """Refuse new requests on all replicas of the ingress, and wait for those in progress."""

    def ask() -> list[int]:
        for _ in range(ANSWER_TRIES):
            try:
                counts: list[int] = handle.broadcast("drain").results(timeout_s=ANSWER_S)
            except Exception as error:
                if not is_loss(error) and not isinstance(error, TimeoutError):
                    raise
                time.sleep(1)  # one of the replicas has died; Serve soon knows, and the others are asked again
            else:
                return counts
        return []

    print("stopping after the requests in progress; Ctrl-C stops at once", flush=True)
    if left := wait_until_drained(ask, grace_s):
        print(f"cut {left} requests that were still in progress after {grace_s:g} s", flush=True)


def refuse_second_endpoint() -> None:
    """Raise UserError if Serve of this Ray runs an application: a second one would take over its port and routes."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    details = client.get_serve_details() if client else {}
    for name, about in details.get("applications", {}).items():
        at = details["http_options"]
        models = [each.partition("-")[2] for each in about["deployments"] if each.startswith("Generator-")]
        serves = f"{name} ({', '.join(models)})" if models else name
        raise UserError(
            f"this Ray already serves {serves} on http://{at['host']}:{at['port']}; stop it first, or set RAY_ADDRESS to "
            "another Ray"
        )
