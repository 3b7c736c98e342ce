"""Small engines of random weights, and requests that differ in everything."""

from __future__ import annotations

import torch
from torch import Tensor

from instella_ray.engine.engine import Request, StepEngine
from instella_ray.engine.events import Finished
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.sampling import SAMPLERS, SamplingParams

SIZES = {"num_tokens": 4, "bits_per_token": 6, "width": 32, "layers": 2, "heads": 2, "text_width": 8}
SLOTS = 3


def engine(kind: str, slots: int = SLOTS) -> StepEngine:
    torch.manual_seed(0)
    model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **SIZES)).eval()
    return build_engine(model, torch.zeros(2, 0, 8), EngineOptions(slots=slots, text_length=6))


def request(number: int) -> Request:
    """Requests that differ in everything."""
    features = torch.randn(2, number % 6, 8, generator=torch.Generator().manual_seed(number))
    params = SamplingParams.of(
        1,
        seed=number * 7919,
        num_inference_steps=1 + number % 5,
        guidance_scale=float(number % 3),
        temperature=(0.0, 0.5, 1.0)[number % 3],
        # Half of them simplified: only where all rows are is the step a shorter one.
        sampler=("simplified", list(SAMPLERS)[number // 2 % len(SAMPLERS)])[number % 2],
        redraw=(0.0, 0.3)[number // 3 % 2],
        final_draw=number % 2 == 0,
    )
    return Request(str(number), features, params)


def drain(e: StepEngine) -> dict[str, Tensor]:
    done = {}
    while not e.idle:
        done.update(images(e))
    return done


def images(e: StepEngine) -> dict[str, Tensor]:
    return {event.id: event.codes for event in e.step() if isinstance(event, Finished)}
