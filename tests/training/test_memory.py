"""The memory model agrees with what PyTorch keeps for the backward pass, and with what the paper fits on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from instella_ray.models import layers
from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.training.generator import GeneratorTask, complete_config
from instella_ray.training.generator_loss import ARLoss, DiffusionLoss
from instella_ray.training.losses import PerceptualConfig, TokenizerLossConfig
from instella_ray.training.memory import (
    USABLE,
    Checkpointing,
    choose_checkpointing,
    generator_activations,
    states,
    tokenizer_activations,
)
from instella_ray.training.settings import Sharding
from instella_ray.training.tokenizer import TokenizerLoss

from ..kit.models import BIT_SIZES
from ..kit.training import generator_config


@pytest.fixture(autouse=True)
def attention_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is planned for GPUs, where attention keeps the inputs' dtype."""
    monkeypatch.setattr(layers, "softmax_attention", F.scaled_dot_product_attention)


def saved_bytes(module: nn.Module, inputs: dict[str, Any], *, bf16: bool) -> float:
    """Bytes of all storages that one forward pass keeps for its backward pass, without weights and their copies."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            module(**inputs)
    copies = 2 * sum(p.numel() for p in module.parameters()) if bf16 else 0
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights) - copies


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "bit_head"), [("diffusion", 0), ("ar", 0), ("ar", 64)])
def test_a_generators_activations_are_within_two_per_cent_of_what_pytorch_keeps(
    kind: Literal["diffusion", "ar"], bit_head: int, bf16: bool
) -> None:
    batch, text = 16, 24
    sizes = {"num_tokens": 32, "bits_per_token": 16, "width": 128, "layers": 4, "heads": 4, "text_width": 96}
    cfg = GeneratorConfig(kind=kind, zero_init=False, bit_head_width=bit_head, **sizes)
    model = build_generator(cfg)
    module = DiffusionLoss(model) if kind == "diffusion" else ARLoss(model)  # type: ignore[arg-type]
    codes = torch.randint(0, 2, (batch, cfg.num_tokens, cfg.bits_per_token)).float()
    mask = torch.ones(batch, text, dtype=torch.bool)
    features = torch.randn(cfg.layers, batch, text, cfg.text_width)
    inputs = {"codes": codes, "features": features, "mask": mask, "seeds": torch.arange(batch)}
    share = saved_bytes(module, inputs, bf16=bf16) / (batch * generator_activations(cfg, text, bf16=bf16))
    assert 0.98 < share < 1.02


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("merges", [(), (1,)])
def test_a_tokenizers_activations_are_within_two_per_cent_of_what_pytorch_keeps(
    merges: tuple[int, ...], bf16: bool
) -> None:
    cfg = BITConfig(**BIT_SIZES, downsample_after=merges, upsample_after=merges)
    module = TokenizerLoss(BIT(cfg).train(), TokenizerLossConfig(perceptual=PerceptualConfig(network="none")))
    images = torch.rand(8, 3, 64, 64)
    inputs = {"images": images, "targets": images, "seeds": torch.arange(8), "temperature": 0.5}
    measured = saved_bytes(module, inputs, bf16=bf16)
    assert measured == pytest.approx(8 * tokenizer_activations(cfg, 64, 64, bf16=bf16), rel=0.02)


def test_the_more_is_shared_out_the_less_a_worker_holds() -> None:
    parameters = 1e9

    def of(sharding: Sharding, world: int) -> float:
        return states(parameters, sharding, world, bf16=True).total

    assert of("ddp", 8) > of("zero2", 8) > of("fsdp2", 8)
    assert of("ddp", 8) == of("ddp", 64) and of("zero2", 64) > 2 * parameters and of("fsdp2", 64) < 2 * parameters
    whole = states(parameters, "ddp", 1, bf16=False)
    assert whole.weights + whole.gradients + whole.optimizer == 16 * parameters and whole.buffers == 0


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_checkpointing_keeps_little_more_than_one_block(kind: Literal["diffusion", "ar"]) -> None:
    def of(layers: int, again: bool) -> float:
        cfg = GeneratorConfig(kind=kind, layers=layers)
        return generator_activations(cfg, 128, bf16=True, gradient_checkpointing=again)

    block: Callable[[bool], float] = lambda again: (of(16, again) - of(4, again)) / 12  # noqa: E731
    assert block(True) < 0.14 * block(False)
    assert of(16, True) < of(2, False) + 16 * block(True)


@pytest.mark.parametrize(
    ("asked", "memory", "again"),
    [("auto", 1.01, False), ("auto", 0.99, True), ("auto", None, False), (True, 9.0, True), (False, 0.1, False)],
)
def test_auto_recomputes_where_the_gpu_is_too_small(asked: Checkpointing, memory: float | None, again: bool) -> None:
    """``memory`` in multiples of what is needed without recomputation."""
    without = states(1e9, "ddp", 1, bf16=True)
    device_memory = memory and memory * without.total / USABLE
    assert choose_checkpointing(asked, without, device_memory)[0] is again


@pytest.mark.parametrize("asked", ["auto", True, False])
def test_a_run_says_whether_it_recomputes(
    asked: Checkpointing, codes: str, tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = complete_config(generator_config("diffusion", codes, tokenizer, tmp_path))
    with caplog.at_level("INFO", logger="instella_ray.training.generator"):
        task = GeneratorTask(cfg.model_copy(update={"gradient_checkpointing": asked}), torch.device("cpu"))
    assert not isinstance(task.model, BIT) and task.model.gradient_checkpointing is (asked is True)
    (line,) = caplog.messages
    reason = "auto: not on a GPU" if asked == "auto" else "as set"
    assert line == f"{'with' if asked is True else 'without'} gradient checkpointing ({reason})"
