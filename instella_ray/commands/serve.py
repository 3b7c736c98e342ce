"""Serve the endpoint until Ctrl-C, by default on loopback."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from pydantic import Field
from ray import serve

from ..config import Config
from ..data.ray_data import init_ray
from ..job import Job
from ..serving.access import ApiKeys, check_address, require_free_port
from ..serving.app import ServeArgs, build


class ServeJobConfig(Config):
    """Configuration of the endpoint and its address."""

    app: ServeArgs
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback requires API keys (INSTELLA_API_KEYS or app.api_keys_file)."""
    port: int = Field(8000, ge=1, le=65535)


def run(cfg: ServeJobConfig) -> None:
    keys = ApiKeys.load(cfg.app.api_keys_file)
    check_address(cfg.host, keys)
    require_free_port(cfg.host, cfg.port)
    app = build(cfg.app)
    init_ray()
    # Supervisors stop a process with SIGTERM. Set after Ray's start, because Ray's handler would abort a slow shutdown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(http_options={"host": cfg.host, "port": cfg.port})
        serve.run(app, name="instella-ray", route_prefix="/")
        print(f"listening on http://{cfg.host}:{cfg.port} ({'with' if keys else 'without'} API keys)", flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        serve.shutdown()


def _demo(folder: str) -> Mapping[str, Any]:
    """Return the configuration of an endpoint over the newest checkpoints of a demo."""
    from ..demo.recipe import KINDS, serve_args  # here, because training's imports would delay every other endpoint
    from ..demo.state import read_demo

    demo = read_demo(folder)
    latest = {name: demo.path("runs", name, "latest") for name in ("tokenizer", *KINDS)}
    return {"app": serve_args(demo, latest.pop("tokenizer"), latest).model_dump(mode="json")}


job = Job(
    "serve",
    ServeJobConfig,
    run,
    "Serve text to image over HTTP.",
    folder=("folder of a demo, whose generators to serve", _demo),
)
parser, main = job.parser, job.main
