"""Ray Serve application: text encoder -> generator -> decoder behind one HTTP API, for ``serve run`` and ``deploy``."""

# No ``from __future__ import annotations`` here: Serve reads the annotation of ``build`` and converts the arguments of its
# file to ServeArgs only if the annotation is the class itself, not its name.

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from .. import logs
from .api import make_api
from .config import ModelArgs, ServeArgs, StageArgs
from .deployments import DecoderStage, GeneratorStage, TextEncoderStage
from .draining import Drain, InProgress
from .graph import Graph
from .health import unhealthy
from .scaling import generator_scaling, stage_scaling
from .setup import Setup

__all__ = ["ModelArgs", "ServeArgs", "build"]

CALLS = 64
"""Maximum number of concurrent calls to a replica of the text encoder or decoder, which batches them."""
HEALTH_CHECK_PERIOD_S = 2.0
"""Seconds between health checks. Shorter than Serve's 10 s, because /healthz reports their result and a broken replica
receives calls until the third failure."""


@serve.ingress()
class Ingress:
    """Replica of the HTTP API. Creates its routes in the replica, because they close over its handles.

    A second one answers while the first is replaced.
    """

    def __init__(
        self, setup: Setup, text: DeploymentHandle, decoder: DeploymentHandle, generators: dict[str, DeploymentHandle]
    ) -> None:
        logs.set_up({"job": "serve", "stage": "ingress"})
        graph = Graph(text, decoder, generators, setup.served.tokenizer_hash, unhealthy)
        self.service, self.keys = setup.service(graph), setup.keys
        self.requests = InProgress()

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = make_api(self.service, self.keys)
        api.add_middleware(Drain, requests=self.requests)
        return api

    async def drain(self) -> int:
        """Refuse new requests from now on; returns the number of requests in progress."""
        self.requests.draining = True
        return self.requests.count


def build(args: ServeArgs) -> Application:
    """Build the application; ``serve run instella_ray.serving.app:build`` passes ``args`` from its file.

    Raises UserError as :meth:`.setup.Setup.of`.
    """
    setup = Setup.of(args)
    text = _stage(args, TextEncoderStage, "TextEncoder", args.text).bind(**setup.text())
    decoder = _stage(args, DecoderStage, "Decoder", args.decoder).bind(**setup.decoder())
    generators = {
        name: _generator(args, name, model).bind(**setup.generator(name)) for name, model in args.models.items()
    }
    return _ingress(args).bind(setup, text, decoder, generators)


def _generator(args: ServeArgs, name: str, model: ModelArgs) -> serve.Deployment:
    # A second limit behind the gate of the ingress, for times when fewer than the maximum number of replicas run.
    bound = {"ongoing": model.ongoing, "max_queued_requests": args.ingress_replicas * args.share(model.capacity)}
    return _stage(args, GeneratorStage, f"Generator-{name}", model, **bound)


def _stage(
    args: ServeArgs, stage: type, name: str, settings: StageArgs, *, ongoing: int = CALLS, **options: Any
) -> serve.Deployment:
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": args.cpus(settings), "num_gpus": args.gpus(settings)},
        max_ongoing_requests=ongoing,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # Longer than any deadline, so that scaling down never aborts a request that could still finish.
        graceful_shutdown_timeout_s=args.limits.timeout_s + 10,
        # One line a call would be several an image.
        logging_config=LoggingConfig(enable_access_log=False),
        **_fixed_or_scaled(settings, ongoing),
        **options,
    )(stage)


def _fixed_or_scaled(settings: StageArgs, ongoing: int) -> dict[str, Any]:
    scaling = settings.autoscaling
    if scaling is None:
        return {"num_replicas": settings.replicas}
    between = (scaling.min_replicas, scaling.max_replicas)
    delays: dict[str, Any] = {
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
    }
    if isinstance(settings, ModelArgs):
        return {"autoscaling_config": generator_scaling(*between, utilisation=scaling.target_load, **delays)}
    return {"autoscaling_config": stage_scaling(*between, ongoing=scaling.target_load * ongoing, **delays)}


def _ingress(args: ServeArgs) -> serve.Deployment:
    # Enough for every image in progress as a separate request, and for rejected requests: queued in Serve's proxy they
    # would wait for their 429.
    images = sum(model.capacity for model in args.models.values()) + args.limits.images + args.decoder.queue
    return serve.deployment(
        name="Ingress",
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * images + 256,
        max_queued_requests=256,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=args.limits.timeout_s + 10,
    )(Ingress)
