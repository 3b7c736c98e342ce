"""Weight decay reaches the weights of layers alone, whichever optimizer has them; every trained weight gets a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from instella_ray.errors import UserError
from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.training.adversarial import Adversary
from instella_ray.training.generator import ARLoss, DiffusionLoss
from instella_ray.training.optim import build_optimizers
from instella_ray.training.settings import OptimizerConfig
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerLoss, complete_tokenizer

from ..kit.models import RESAMPLING_BIT, TINY_BIT
from ..kit.training import ADVERSARIAL, PLAIN_LOSS, tokenizer_config

SIZES: dict[str, Any] = {"num_tokens": 4, "bits_per_token": 6, "width": 32, "layers": 2, "heads": 2, "text_width": 16}
CONVOLUTIONS = RESAMPLING_BIT.model_copy(
    update={"resample": "conv", "pixel_head": "conv", "token_positions": True, "rope_axes": (2, 4, 2)}
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "diffusion": lambda: build_generator(GeneratorConfig(**SIZES, zero_init=False)),
    "ar": lambda: build_generator(GeneratorConfig(kind="ar", **SIZES, unused_time_embed=True)),
    "tokenizer": lambda: BIT(TINY_BIT),
    "convolutional tokenizer": lambda: BIT(CONVOLUTIONS),
    "discriminator": lambda: Adversary(ADVERSARIAL, 1, 0).model,
}


def changed_without_gradients(model: nn.Module, **settings: Any) -> dict[str, float]:
    """Ratios of the weights after a step with gradients of zero to those before, by name, without those that are 0."""
    optimizers = build_optimizers(model, OptimizerConfig(warmup_steps=0, **settings))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(0.5)
    return {name: float(p.detach().mean()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_layers_decay_and_nothing_else(kind: str, name: Literal["adamw", "muon"]) -> None:
    model = MODELS[kind]()
    found = changed_without_gradients(model, name=name, lr=0.1, matrix_lr=0.2, weight_decay=0.5)
    # Norms and biases have one axis, learned tokens and positions have three.
    layers = {key for key, p in model.named_parameters() if p.ndim in (2, 4) and p.requires_grad} - {"quantizer.embed"}
    assert {key for key, ratio in found.items() if ratio != 1} == layers
    for key in layers:
        rate = (
            0.2
            if name == "muon" and (".attn." in key or ".ff." in key or ".mlp." in key or "proj_cond" in key)
            else 0.1
        )
        assert found[key] == pytest.approx(1 - 0.5 * rate * 0.5), key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_decay_nothing_changes(name: Literal["adamw", "muon"]) -> None:
    found = changed_without_gradients(MODELS["diffusion"](), name=name)
    assert set(found.values()) == {1.0}
    assert len(build_optimizers(MODELS["ar"](), OptimizerConfig()).groups) == 1


def generator_loss(**settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Loss of a generator, whose captions are all empty if ``text`` is False."""
    text, again = settings.pop("text", True), settings.pop("checkpointing", False)
    cfg = GeneratorConfig(**{**SIZES, **settings})
    model = build_generator(cfg)
    model.gradient_checkpointing = again
    module = DiffusionLoss(model) if cfg.kind == "diffusion" else ARLoss(model)  # type: ignore[arg-type]
    mask = torch.full((2, 3), bool(text))
    features, codes = torch.randn(2, 2, 3, 16), torch.ones(2, cfg.num_tokens, cfg.bits_per_token)
    return module, {"codes": codes, "features": features, "mask": mask, "seeds": torch.arange(2)}


def tokenizer_loss(
    cfg: BITConfig, *, frozen: bool = False, step: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Loss of a tokenizer, adversarial at ``step`` if there is one."""
    adversary = None if step is None else Adversary(ADVERSARIAL, 1, 0)
    if adversary is not None:
        assert step is not None
        adversary.before_step(step, 0)
    bit = BIT(cfg).train()
    bit.encoder.requires_grad_(not frozen)
    images = torch.rand(2, 3, 32, 32)
    inputs = {"images": images, "targets": images, "seeds": torch.arange(2), "temperature": 0.5}
    return TokenizerLoss(bit, PLAIN_LOSS, adversary), inputs


LOSSES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "diffusion": generator_loss,
    "diffusion without captions": lambda: generator_loss(text=False),
    "diffusion, recomputed": lambda: generator_loss(checkpointing=True),
    "ar": lambda: generator_loss(kind="ar"),
    "ar without captions": lambda: generator_loss(kind="ar", text=False),
    "ar of one token": lambda: generator_loss(kind="ar", num_tokens=1),
    "ar with the unused embedding": lambda: generator_loss(kind="ar", unused_time_embed=True),
    "tokenizer": lambda: tokenizer_loss(TINY_BIT),
    "tokenizer, convolutions": lambda: tokenizer_loss(CONVOLUTIONS),
    "tokenizer, merges last": lambda: tokenizer_loss(BITConfig(**_merging((0, 2)))),
    "tokenizer, frozen encoder": lambda: tokenizer_loss(TINY_BIT, frozen=True),
    "tokenizer before its discriminator": lambda: tokenizer_loss(TINY_BIT, step=0),
    "tokenizer against a discriminator": lambda: tokenizer_loss(TINY_BIT, step=9, frozen=True),
}


def _merging(places: tuple[int, ...]) -> dict[str, Any]:
    return {**RESAMPLING_BIT.model_dump(), "downsample_after": places, "upsample_after": places}


@pytest.mark.parametrize("name", LOSSES)
def test_every_trained_weight_gets_a_gradient(name: str) -> None:
    """Else DistributedDataParallel ends the second step of a run with two workers."""
    module, inputs = LOSSES[name]()
    loss: Tensor = module(**inputs)[0]
    loss.backward()
    assert [key for key, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("train", "settings", "good"),
    [
        ({"micro_batch_size": 1}, {}, False),
        ({"micro_batch_size": 1}, {"freeze_norm_fraction": 0.0}, True),
        ({"micro_batch_size": 2}, {}, True),
        ({"global_batch": 4, "workers": {"count": 4}}, {}, False),
        ({"global_batch": 4, "workers": {"count": 4, "min_count": 2}}, {}, False),
        ({"global_batch": 4, "workers": {"count": 2}}, {}, True),
    ],
)
def test_normalized_logits_need_two_images(
    train: dict[str, Any], settings: dict[str, Any], good: bool, shards: str
) -> None:
    cfg = tokenizer_config(shards, "run")
    cfg = TokenizerConfig.model_validate({**cfg.model_dump(), **settings, "train": {**cfg.train.model_dump(), **train}})
    if good:
        complete_tokenizer(cfg)
        return
    with pytest.raises(UserError, match=r"train\.micro_batch_size 1: .* expected at least 2 images on each worker"):
        complete_tokenizer(cfg)
