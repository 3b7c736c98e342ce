"""Runner of the demo: executes the stages in order, each once, and shuts down Ray at the end."""

from __future__ import annotations

import functools
import os
import signal
import types
from pathlib import Path

import torch

from ..config import dump_yaml
from ..errors import UserError
from ..training.generator import try_text_encoder
from ..training.ray_train import check_resources
from . import stages
from .images import HeldOutImages, demo_prompts, own_images, scene_images
from .recipe import KINDS, DemoConfig
from .report import write_report
from .state import DemoState, Mode


def run_demo(demo: DemoConfig, mode: Mode = "new") -> Path:
    """Run the demo in ``demo.folder`` and return the report's path.

    ``mode``: ``new`` fails if the folder contains a demo, ``resume`` continues it, ``fresh`` starts over. Raises UserError
    for input that a later stage would reject.
    """
    state = DemoState(demo, mode)
    images = _check_input(demo)
    state.begin()  # writes and deletes nothing until the input is checked
    print(dump_yaml(demo), end="")
    resume = mode == "resume"
    again: Mode = "resume" if resume else "new"
    _end_on_sigterm()
    _start_ray()
    try:
        if images is None:
            state.run("scenes", lambda: stages.write_scenes(demo))
            images = scene_images(demo)
        prompts = demo_prompts(demo, images)
        state.run("curate", lambda: stages.curate(demo, images.train, again))
        tokenizer = state.run("tokenizer", lambda: stages.train_tokenizer(demo, resume))["checkpoint"]
        state.run("tokenizer quality", lambda: stages.measure_tokenizer(demo, images, tokenizer))
        state.run("encode", lambda: stages.encode(demo, tokenizer, again))
        generators: dict[str, str] = {}
        for kind in KINDS:
            train = functools.partial(stages.train_generator, demo, kind, prompts, tokenizer, resume)
            generators[kind] = state.run(f"{kind} generator", train)["checkpoint"]
        state.run("endpoint", lambda: stages.sample_over_http(demo, prompts, tokenizer, generators))
        state.run("score", lambda: stages.score_samples(demo, prompts))
    finally:
        import ray

        ray.shutdown()
    path = write_report(demo, prompts, state.stages)
    print(f"\nreport: {path.absolute()}")
    model, prompt = demo.path("runs", "diffusion", "latest"), prompts[0][0]
    print(f'more:   instella-ray generate "{prompt}" --model {model} -o out.png')
    return path


def _check_input(demo: DemoConfig) -> HeldOutImages | None:
    """Check the input of all stages; returns the images if they come from ``demo.shards``, else None."""
    import ray

    if ray.is_initialized():
        raise UserError("Ray is already running in this process: the demo starts its own; run it outside of a Ray job")
    check_resources(demo.workers, {"CPU": _cpus(), "GPU": torch.cuda.device_count()})
    images = None if demo.shards is None else own_images(demo)
    try_text_encoder(demo.text_encoder)
    return images


def _start_ray() -> None:
    # A temporary cluster on loopback: no token file in the user's home, no usage report, no dashboard.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
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
