"""The third stage without Ray: frozen parts, the adaptive weight, accumulation, and what a checkpoint brings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import save_model
from instella_ray.training.adversarial import Adversary, gradient_ratio, last_layer_gradients
from instella_ray.training.settings import OptimizerConfig, TrainConfig
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerTask, last_layer
from instella_ray.training.trainer import Trainer

from ..kit.models import TINY_BIT
from ..kit.training import ADVERSARIAL, CPU, PLAIN_LOSS

SMALL = TINY_BIT.model_copy(update={"normalize_logits": False})
"""Without batch statistics, which depend on how a batch is cut."""


def third_stage(shards: str, **changes: Any) -> TokenizerConfig:
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0)
    train = TrainConfig(run_dir="run", steps=10, global_batch=8, optimizer=optimizer, precision="fp32")
    settings = {"freeze_encoder": True, "adversarial": ADVERSARIAL, "temperature": 0.0, "late_temperature": 0.0}
    return TokenizerConfig(model=SMALL, data=shards, loss=PLAIN_LOSS, train=train, **{**settings, **changes})


def begun(cfg: TokenizerConfig, last: Path | None = None) -> tuple[Trainer, TokenizerTask, Adversary]:
    """A run's trainer, its task, and the discriminator of that."""
    task = TokenizerTask(cfg)
    assert task.discriminator is not None
    return Trainer(task, cfg.train, CPU, last), task, task.discriminator


def stepped(trainer: Trainer, step: int) -> dict[str, Tensor]:
    found = trainer.step(step, trainer.batch(step))
    return {**found.means, "norm": found.norm}


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_by_hand() -> None:
    last = torch.tensor([[1.0, 2.0]], requires_grad=True)
    supervised, adversarial = (last * torch.tensor([3.0, 4.0])).sum(), 0.5 * last[0, 0]
    gradients = last_layer_gradients(supervised, adversarial, last)
    assert gradients.tolist() == [[[3.0, 4.0]], [[0.5, 0.0]]] and last.grad is None
    assert gradient_ratio(gradients, 1e4).item() == pytest.approx(10)
    assert gradient_ratio(gradients, 7).item() == 7
    assert gradient_ratio(torch.tensor([[1.0], [0.0]]), 1e4).item() == 1e4


@pytest.mark.parametrize(("head", "channels"), [("linear", 3 * 64), ("conv", 3)])
def test_the_last_layer_is_what_makes_pixels(head: str, channels: int) -> None:
    weight = last_layer(BIT(SMALL.model_copy(update={"pixel_head": head})))
    assert weight.ndim > 1 and weight.shape[0] == channels


def test_the_third_stage_leaves_the_encoder_and_the_features_bit_identical(shards: str) -> None:
    cfg = third_stage(shards)
    settings = cfg.train.model_copy(update={"optimizer": OptimizerConfig(lr=1e-3, warmup_steps=0, weight_decay=0.1)})
    trainer, task, discriminator = begun(cfg.model_copy(update={"train": settings}))
    bit = task.bit
    features, heads = discriminator.step_module.features, discriminator.model.heads
    parts = (bit.encoder, features, bit.quantizer, bit.decoder, bit.to_pixel, heads)
    before = [state(part) for part in parts]
    facts = [stepped(trainer, step) for step in range(4)]
    changed = [
        any(not torch.equal(value, old[name]) for name, value in part.state_dict().items())
        for part, old in zip(parts, before, strict=True)
    ]
    assert changed == [False, False, True, True, True, True]
    assert all(p.grad is None for part in parts[:2] for p in part.parameters())
    # The discriminator learns from the first step, the decoder from it two steps later, with a weight that is known.
    assert all("discriminator" in row for row in facts)
    assert "adversarial" not in facts[0] and facts[1]["adversarial_weight"] == 0
    assert all(row["adversarial_weight"] > 0 for row in facts[2:])
    for row in facts[1:]:
        expected = row["reconstruction"] + row["adversarial_weight"] * row["adversarial"]
        torch.testing.assert_close(row["loss"], expected)


def test_the_tokenizers_loss_leaves_the_discriminator_without_gradient_and_the_other_way_round(shards: str) -> None:
    trainer, task, discriminator = begun(third_stage(shards))
    task.before_step(5)
    discriminator.model.ratios.fill_(1.0)
    (inputs,) = task.micro_batches(task.data.batch(0, np.arange(4)), 4, torch.arange(4))
    trainer.learners[0].backward(inputs, 1, True)
    assert all(p.grad is None for p in discriminator.model.parameters())
    tokenizer = [p.grad.clone() for p in task.model.parameters() if p.grad is not None]
    trainer.learners[1].backward(discriminator.inputs(), 1, True)
    assert all(p.grad is not None for p in discriminator.model.parameters())
    after = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(tokenizer, after, strict=True))


def test_gradient_accumulation_equals_the_large_batch_with_a_discriminator_and_several_sizes(shards: str) -> None:
    cfg = third_stage(shards, output_sizes=(32, 40))
    trainers, tasks, discriminators = zip(
        *(
            begun(cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": n})}))
            for n in (8, 2)
        ),
        strict=True,
    )
    for step in range(6):
        whole, cut = (stepped(trainer, step) for trainer in trainers)
        assert whole.keys() == cut.keys()
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        # Adam turns a rounding of a gradient near zero into a step of another sign: every step starts from equal weights.
        tasks[1].model.load_state_dict(tasks[0].model.state_dict())
        discriminators[1].model.heads.load_state_dict(discriminators[0].model.heads.state_dict())
    a, b = (discriminator.model.ratios for discriminator in discriminators)
    assert (a > 0).all() and torch.allclose(a, b, rtol=1e-4)


def test_a_checkpoint_brings_the_discriminator_back(shards: str, tmp_path: Path) -> None:
    trainer, _, discriminator = begun(third_stage(shards))
    for step in range(3):
        stepped(trainer, step)
    trainer.save(tmp_path, 3)
    other, _, other_discriminator = begun(third_stage(shards), tmp_path)
    assert other.start == 3
    first, second = stepped(trainer, 3), stepped(other, 3)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    after = state(other_discriminator.model)
    assert all(torch.equal(value, after[name]) for name, value in state(discriminator.model).items())


def test_a_stage_starts_from_the_average_of_the_one_before_and_is_not_calibrated_again(
    shards: str, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    bit = BIT(SMALL)
    ema = {name: value + 1 for name, value in bit.state_dict().items()}
    save_model(tmp_path, bit, ema=ema)
    task = TokenizerTask(third_stage(shards, start_from=str(tmp_path)))
    task.begin(task.data.batch(0, np.arange(8)))
    assert all(torch.equal(value, ema[name]) for name, value in task.model.state_dict().items())
