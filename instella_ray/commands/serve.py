"""Serve the endpoint until Ctrl-C, by default on loopback."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pydantic import Field
from ray import serve

from ..config import Config, parse_job
from ..data.ray_data import init_ray
from ..serving.access import ApiKeys, check_address, require_free_port
from ..serving.app import ServeArgs, build
from ..serving.shutdown import shut_down_serve


class ServeJobConfig(Config):
    """Configuration of the endpoint and its address."""

    app: ServeArgs
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback requires API keys (INSTELLA_API_KEYS or app.api_keys_file)."""
    port: int = Field(8000, ge=1, le=65535)


def main(argv: Sequence[str] | None = None, prog: str = "serve.py") -> int:
    cfg = parse_job(ServeJobConfig, argv, prog=prog, description="Serve text to image over HTTP.")
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
        shut_down_serve()
    return 0
