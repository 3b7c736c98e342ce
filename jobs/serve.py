"""`python jobs/serve.py --config configs/serve/demo.yaml`: the endpoint, on loopback, until Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field
from ray import serve

from instella_ray.config import Config, parse_job
from instella_ray.data.pipeline import init_ray
from instella_ray.errors import run_main
from instella_ray.serving.app import ServeArgs, build, require_free_port


class ServeJobConfig(Config):
    """The endpoint and where it listens."""

    app: ServeArgs
    host: str = "127.0.0.1"
    """Address to listen on. There are no API keys yet: leave it on loopback."""
    port: int = Field(8000, ge=1, le=65535)


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_job(ServeJobConfig, argv, prog="serve.py", description="Serve text to image over HTTP.")
    require_free_port(cfg.host, cfg.port)
    app = build(cfg.app)
    init_ray()
    serve.start(http_options={"host": cfg.host, "port": cfg.port})
    try:
        serve.run(app, name="instella-ray", route_prefix="/", blocking=True)
    finally:
        serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
