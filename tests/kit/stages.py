"""Generator stages on Serve, and requests that differ in everything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from instella_ray.models.checkpoint import load_model
from instella_ray.sampling import SamplingParams
from instella_ray.serving.engine import EngineOptions, Finished, Request, build_engine

OPTIONS = EngineOptions(slots=6, text_length=24)
FOREVER = 100_000_000
EMPTY = np.zeros((2, 2, 384), np.float32)


def deployment(name: str, **options: Any) -> Any:
    """The generator stage as a Serve deployment whose code has not changed since it was last deployed.

    That is what ``serve deploy`` finds where a file differs in ``user_config`` alone; ``serve.run`` by itself takes
    everything for new code, and starts new replicas.
    """
    from ray import serve

    from instella_ray.serving.deployments import GeneratorStage

    stage = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 64, **options}
    made = serve.deployment(name=name, **stage)(GeneratorStage)
    made._version = "1"
    return made


def features(number: int) -> np.ndarray:
    """Float32 ``[2, T, 384]``, T from 0 to 23."""
    return np.random.default_rng(number).standard_normal((2, number % 24, 384), dtype=np.float32)


def sampling(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "seed": number * 7919,
        "num_inference_steps": 1 + number * 13 % 50,
        "guidance_scale": float(number % 3),
        "temperature": (0.5, 1.0, 0.0)[number % 3],
        "sampler": ("posterior", "simplified")[number % 2],
        "final_draw": number % 2 == 0,
        **changes,
    }


def codes_alone(path: str, number: int, **changes: Any) -> np.ndarray:
    """The codes of request ``number`` from an engine of its own, in this process."""
    model: Any = load_model(path)
    engine = build_engine(model, torch.tensor(EMPTY), OPTIONS)
    params = SamplingParams.of(1, **sampling(number, **changes))
    engine.submit(Request("x", torch.tensor(features(number)), params))
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Finished):
                return event.codes.numpy()
    raise AssertionError("the engine ended without a picture")


def eventually(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.1)
