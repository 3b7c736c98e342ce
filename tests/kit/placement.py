"""An endpoint on a Ray of its own with two GPUs that are not there: ``python -m tests.kit.placement FOLDER told|found``.

Ray is told of them, or finds them by asking a driver. What each replica sees is written to ``seen.json``; after ``found``
also why an endpoint does not start whose stages look for their GPUs. The models compute on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx

from instella_ray.errors import UserError
from instella_ray.serving.config import ServeArgs
from instella_ray.serving.serve_settings import ROUTER_LOOP, set_up_serve

from .endpoint import APP, images, make_folders, serve_args, serving
from .head import free_port

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def shared_args(folders: dict[str, str]) -> ServeArgs:
    """Two replicas of a generator, of which one has room for the other stages on its GPU."""
    models = {"diffusion": {"path": folders["diffusion"], "num_gpus": 0.6, "replicas": 2}}
    return serve_args(folders, models=models, text={"num_gpus": 0.2}, decoder={"num_gpus": 0.2})


def main(folder: Path, told: bool) -> None:
    os.environ[ROUTER_LOOP] = "1"
    set_up_serve()
    import ray

    ray.init(
        num_cpus=4,
        num_gpus=2 if told else None,
        include_dashboard=False,
        object_store_memory=150 << 20,
        log_to_driver=False,
    )
    assert ray.cluster_resources()["GPU"] == 2, ray.cluster_resources()
    args = shared_args(make_folders(folder))
    found = {} if told else {"refusal": refusal(args)}
    (folder / "seen.json").write_text(json.dumps(found | seen(args)))
    ray.shutdown()


def refusal(args: ServeArgs) -> str:
    """The error with which the endpoint ends, as PyTorch sees no GPU."""
    from instella_ray.serving.server import serve_forever

    try:
        serve_forever(args, "127.0.0.1", free_port(), 0, local=False)
    except UserError as error:
        return str(error)
    raise AssertionError("the endpoint has been served until it was told to stop")


def seen(args: ServeArgs) -> dict[str, Any]:
    """What every replica sees of the GPUs, and the number of images that they have made."""
    from ray import serve

    from instella_ray.serving import app
    from instella_ray.serving.setup import Setup

    Setup._device = lambda self, stage: "cpu"  # type: ignore[method-assign]
    for name in ("TextEncoderStage", "DecoderStage", "GeneratorStage"):
        setattr(app, name, telling(getattr(app, name)))
    with serving(args) as url:
        stages = ("TextEncoder", "Decoder", *(f"Generator-{name}" for name in args.models))
        replicas = {name: serve.get_deployment_handle(name, APP).broadcast("visible").results() for name in stages}
        with httpx.Client(base_url=url, timeout=60) as client:
            return {"replicas": replicas, "images": len(images(client, n=3))}


def telling(stage: type[Any]) -> type[Any]:
    """The stage, which also tells what its process sees. A class of a function is pickled whole, as replicas need it."""

    class Telling(stage):  # type: ignore[misc]
        def visible(self) -> dict[str, Any]:
            import ray

            ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            return {"ids": ids, **{name: os.environ.get(name) for name in VISIBLE}}

    return Telling


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "told")
