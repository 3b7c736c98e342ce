"""Serve the endpoint until Ctrl-C, by default on loopback."""

from __future__ import annotations

from pydantic import Field

from ..config import Config
from ..job import Job
from ..serving.config import Finite, ServeArgs
from ..serving.server import serve_forever


class ServeJobConfig(Config):
    """Configuration of the endpoint and its address."""

    app: ServeArgs
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback requires API keys (INSTELLA_API_KEYS or app.api_keys_file)."""
    port: int = Field(8000, ge=1, le=65535)
    local: bool = False
    """Serve in one process without Ray: the same API, limits and page, with one replica per stage."""
    grace_s: Finite = Field(60.0, ge=0)
    """Seconds that requests in progress may take to finish after SIGTERM or Ctrl-C."""


def run(cfg: ServeJobConfig) -> None:
    serve_forever(cfg.app, cfg.host, cfg.port, cfg.grace_s, local=cfg.local)


job = Job("serve", ServeJobConfig, run, "Serve text to image over HTTP.", switches={"local": "local"})
parser, main = job.parser, job.main
