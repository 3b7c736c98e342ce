"""Generators learn a few codes by heart, by the loop's own loss and optimizers; how a batch is cut makes no difference."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from instella_ray.models import rng
from instella_ray.models.diffusion import bit_accuracy, flip_noise, x0_logits
from instella_ray.models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig
from instella_ray.training.generator import GeneratorTask, complete_config
from instella_ray.training.generator_loss import ARLoss, DiffusionLoss
from instella_ray.training.learner import Learner
from instella_ray.training.settings import OptimizerConfig

from ..kit.training import generator_config

CPU = torch.device("cpu")
COUNT, STEPS = 32, 500
SIZES = {"num_tokens": 4, "bits_per_token": 8, "width": 128, "heads": 2, "layers": 2, "text_width": 32}


def facts() -> dict[str, Tensor]:
    """Random codes, each with a text of its own."""
    torch.manual_seed(0)
    features = torch.randn(2, COUNT, 2, 32)
    codes, mask = torch.randint(0, 2, (COUNT, 4, 8)).float(), torch.ones(COUNT, 2, dtype=torch.bool)
    return {"codes": codes, "features": features, "mask": mask, "seeds": torch.arange(COUNT)}


def learn(loss: DiffusionLoss | ARLoss, data: dict[str, Tensor]) -> None:
    learner = Learner(loss, loss.model, OptimizerConfig(name="muon", lr=3e-3, warmup_steps=20, decay_fraction=0.5), CPU)
    steps = STEPS if isinstance(loss, DiffusionLoss) else STEPS // 5
    for step in range(steps):
        learner.backward({**data, "seeds": rng.sample_seeds(1, step, data["seeds"])}, 1, True)
        learner.update(step, steps)


@pytest.mark.process
@torch.no_grad()
def test_diffusion_memorises_32_codes_to_99_5_per_cent_of_their_bits_at_t_0_3() -> None:
    model, data = DiffusionGenerator(GeneratorConfig(kind="diffusion", position_std=0.3, **SIZES)), facts()
    with torch.enable_grad():
        learn(DiffusionLoss(model), data)
    codes, t = data["codes"].repeat(8, 1, 1), torch.full((8 * COUNT,), 0.3)
    z_t = flip_noise(codes, t, torch.rand(codes.shape))
    assert 0.1 < (z_t != codes).float().mean() < 0.2
    text = model.eval().text_kv(data["features"].repeat(1, 8, 1, 1), data["mask"].repeat(8, 1))
    assert bit_accuracy(x0_logits(model(z_t, t, text), z_t), codes).mean() >= 0.995


@pytest.mark.process
@torch.no_grad()
def test_ar_memorises_32_codes_to_99_5_per_cent_of_their_bits_given_the_tokens_before() -> None:
    model, data = ARGenerator(GeneratorConfig(kind="ar", **SIZES)), facts()
    with torch.enable_grad():
        learn(ARLoss(model), data)
    _, found = ARLoss(model.eval())(**data)
    assert found["bit_accuracy"] >= 0.995


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_gradient_accumulation_equals_the_large_batch(
    kind: Literal["diffusion", "ar"], codes: str, tokenizer: str, tmp_path: Path
) -> None:
    found = []
    plain = generator_config(kind, codes, tokenizer, tmp_path)
    # With modulation that starts at zero, nearly all gradients of the first step are zero too.
    cfg = plain.model_copy(update={"model": plain.model.model_copy(update={"zero_init": False})})
    for size in (8, 2):
        task = GeneratorTask(complete_config(cfg), CPU)
        learner = Learner(task.step_module, task.model, OptimizerConfig(), CPU)
        parts = task.micro_batches(task.data.batch(0, np.arange(8)), size, torch.arange(8))
        losses = [learner.backward(inputs, len(parts), True)["loss"] for inputs in parts]
        gradients = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
        found.append((torch.stack(losses).mean(), gradients))
    (loss, whole), (other, summed) = found
    torch.testing.assert_close(loss, other)
    assert set(whole) == set(summed)
    for name, value in whole.items():
        torch.testing.assert_close(summed[name], value, atol=1e-6, rtol=1e-4, msg=name)
