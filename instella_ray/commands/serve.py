"""Serve the endpoint until Ctrl-C, by default on loopback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ..config import Config
from ..job import Job
from ..models.bundled import DEFAULT, GENERATOR, TOKENIZER, bundled_folder, bundled_names
from ..models.checkpoint import read_checkpoint_config
from ..models.folders import find_model
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


def _models(folder: str) -> Mapping[str, Any]:
    """Return the configuration of an endpoint over a set of models of the package, or the newest checkpoints of a demo."""
    if find_model(folder) == str(bundled_folder(folder)):
        return {"app": _bundled(folder)}
    from ..demo.recipe import KINDS, serve_args  # here, because training's imports would delay every other endpoint
    from ..demo.state import read_demo

    demo = read_demo(folder)
    latest = {name: demo.path("runs", name, "latest") for name in ("tokenizer", *KINDS)}
    return {"app": serve_args(demo, latest.pop("tokenizer"), latest).model_dump(mode="json")}


def _bundled(name: str) -> Mapping[str, Any]:
    """Return the ``app`` section over the models of the set ``name``, the diffusion generator first."""
    tokenizer = f"{name}/{TOKENIZER}"
    generators = [each for each in bundled_names() if each.startswith(f"{name}/") and each != tokenizer]
    generators.sort(key=lambda each: not each.endswith(f"/{GENERATOR}"))
    size = read_checkpoint_config(find_model(tokenizer))["model"]["image_size"]
    models = {each.partition("/")[2]: {"path": each} for each in generators}
    return {"tokenizer": tokenizer, "models": models, "sizes": [size], "text_length": 48, "num_cpus": 0.1}


job = Job(
    "serve",
    ServeJobConfig,
    run,
    "Serve text to image over HTTP.",
    switches={"local": "local"},
    folder=(
        f"folder of a demo, whose generators to serve, or a set of models that comes with the package ({DEFAULT})",
        _models,
    ),
    default_folder=DEFAULT,
)
parser, main = job.parser, job.main
