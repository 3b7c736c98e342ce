"""Runner of the demo: executes the stages in order, each once, and shuts down Ray at the end."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import time
import types
from pathlib import Path

import torch

from ..config import dump_yaml
from ..data.icons.build import check_icons
from ..data.provenance import shard_provenance
from ..errors import UserError
from ..runs import recorded
from ..serving.serve_settings import set_up_serve
from ..training.generator import try_text_encoder
from ..training.ray_train import check_resources
from . import stages
from .images import HeldOutImages, demo_prompts, held_out_boundary, icon_images, own_images, written_images
from .recipe import DemoConfig, icons_config
from .report import goals, write_report
from .state import DemoState, Mode


def run_demo(demo: DemoConfig, mode: Mode = "new") -> Path:
    """Run the demo in ``demo.folder`` and return the report's path.

    ``mode``: ``new`` fails if the folder contains a demo, ``resume`` continues it, ``fresh`` starts over. Raises UserError
    for input that a later stage would reject.
    """
    began = time.perf_counter()
    state = DemoState(demo, mode)
    images, boundary = _check_input(demo, state)
    pattern = demo.shards or demo.images
    inputs = shard_provenance("shards", pattern, output=demo.folder) if pattern else ()
    state.begin()  # writes and deletes nothing until the input is checked
    print(dump_yaml(demo), end="")
    _end_on_sigterm()
    with recorded(demo.folder, "demo", demo, inputs):
        start_ray()
        try:
            prompts = _run_stages(demo, state, images, boundary)
        finally:
            import ray

            ray.shutdown()
        state.add_rest(began)
        path = write_report(demo, prompts, state.stages)
    for goal in goals(demo, state.stages):
        print(goal.text())
    folder, prompt = shlex.quote(demo.folder), shlex.quote(prompts[0][0])
    print(f"\nreport: {path.absolute()}")
    print(f"serve:  instella-ray serve {folder}")
    print(f"more:   instella-ray generate {prompt} --model {folder} -o out.png")
    return path


def _run_stages(
    demo: DemoConfig, state: DemoState, images: HeldOutImages | None, boundary: str | None
) -> stages.Prompts:
    """Run the stages that are not finished; returns the prompts whose images they have generated."""
    resume = state.mode == "resume"
    again: Mode = "resume" if resume else "new"
    if demo.data == "icons":
        state.run("icons", lambda: stages.build_icons(demo, again))
        images = icon_images(demo)
    elif images is None:
        if demo.images is None:
            state.run("scenes", lambda: stages.write_scenes(demo))
        else:
            state.run("images", lambda: stages.write_images(demo, str(boundary)))
        images = written_images(demo)
    prompts = demo_prompts(demo, images)
    state.run("curate", lambda: stages.curate(demo, images.train, again))
    tokenizer = state.run("tokenizer", lambda: stages.train_tokenizer(demo, resume))["checkpoint"]
    state.run("tokenizer quality", lambda: stages.measure_tokenizer(demo, images, tokenizer))
    state.run("encode", lambda: stages.encode(demo, tokenizer, again))
    train = functools.partial(stages.train_generators, demo, prompts, tokenizer, resume)
    generators = state.run("generators", train)["checkpoints"]
    state.run("endpoint", lambda: stages.sample_over_http(demo, prompts, tokenizer, generators))
    state.run("score", lambda: stages.score_samples(demo, prompts))
    return prompts


def _check_input(demo: DemoConfig, state: DemoState) -> tuple[HeldOutImages | None, str | None]:
    """Check the input of all stages.

    Returns the images if they come from ``demo.shards``, and the boundary of the held-out ones if those of ``demo.images``
    are still to be written.
    """
    import ray

    if ray.is_initialized():
        raise UserError("Ray is already running in this process: the demo starts its own; run it outside of a Ray job")
    check_resources(demo.workers, {"CPU": _cpus(), "GPU": torch.cuda.device_count()})
    images = None if demo.shards is None else own_images(demo)
    boundary = None if demo.images is None or "images" in state.stages else held_out_boundary(demo)
    if demo.data == "icons" and "icons" not in state.stages:
        check_icons(icons_config(demo))
    try_text_encoder(demo.text_encoder)
    return images, boundary


def start_ray() -> None:
    """Start a temporary Ray on loopback, with Serve's settings."""
    # A temporary cluster on loopback: no token file in the user's home, no usage report, no dashboard.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    set_up_serve()
    from ..data.ray_data import start_local_ray

    start_local_ray(num_cpus=_cpus(), log_to_driver=False)


def _cpus() -> int:
    # More logical CPUs than cores: a worker group, its controller and a data task run at the same time.
    return max(4, os.cpu_count() or 1)


def _end_on_sigterm() -> None:
    """Handle SIGTERM like Ctrl-C, so that Ray is shut down."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
