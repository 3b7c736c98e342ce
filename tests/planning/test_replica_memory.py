"""The memory of replicas agrees with the tensors of real engines, decoders and text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from instella_ray.engine.kinds import DiffusionSlots, build_engine
from instella_ray.engine.slots import EngineOptions, Slots
from instella_ray.flops import TextEncoderSizes
from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.eight_bit import Quantization
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.planning.replica_memory import decoder_replica, generator_replica, text_encoder_replica

from ..kit.models import BIT_SIZES

SIZES: dict[str, Any] = {
    "num_tokens": 32,
    "bits_per_token": 16,
    "width": 256,
    "layers": 3,
    "heads": 4,
    "text_width": 96,
}
OPTIONS = EngineOptions(slots=4, text_length=24, batch_invariant=False, prompt_cache_bytes=1 << 20)
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def peak(run: Callable[[], object]) -> int:
    """The most bytes of tensors that exist at a time while ``run`` runs, beyond those before it."""
    run()  # what is made once
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        run()
    assert profiler.profiler and profiler.profiler.kineto_results
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def slots_of(kind: Literal["diffusion", "ar"], dtype: torch.dtype, options: EngineOptions = OPTIONS) -> Slots:
    model = build_generator(GeneratorConfig(kind=kind, **SIZES)).eval().requires_grad_(False).to(dtype)
    return build_engine(model, torch.zeros(3, 1, 96), options).slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_weights_and_slots_are_those_of_a_real_engine(kind: Literal["diffusion", "ar"], dtype: torch.dtype) -> None:
    real = slots_of(kind, dtype)
    memory = generator_replica(real.model.cfg, OPTIONS, dtype.itemsize)
    assert memory.weights == nbytes(real.model.parameters())
    assert memory.weights + memory.loading == 4 * sum(p.numel() for p in real.model.parameters())
    tables = [*real.cache.keys, *real.cache.values, real.cache.mask, real.z, real.draws.table]
    if isinstance(real, DiffusionSlots):
        tables += [real.x0_prob, real.modulations.table]
        real.modulations.load([(20, 1.0, 0)])
        (chunk,) = real.modulations.in_use.values()
        assert memory.caches == (1 << 20) + real.modulations.chunks.limit + OPTIONS.slots * nbytes(chunk)
    else:
        assert memory.caches == real.project.cache.limit == 1 << 20
    assert memory.slots == nbytes(tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_weights_of_eight_bits_are_those_of_a_real_engine(
    kind: Literal["diffusion", "ar"], dtype: torch.dtype, quantization: Quantization
) -> None:
    options = dataclasses.replace(OPTIONS, quantization=quantization)
    real = slots_of(kind, dtype, options)
    memory = generator_replica(real.model.cfg, options, dtype.itemsize)
    assert memory.weights == nbytes(real.model.state_dict().values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.parametrize("quantization", ["none", "int8"])  # fp8 is emulated on a CPU, with copies of the weights
def test_activations_of_a_pass_are_as_measured(
    kind: Literal["diffusion", "ar"], dtype: torch.dtype, quantization: Quantization
) -> None:
    options = dataclasses.replace(OPTIONS, quantization=quantization)
    real = slots_of(kind, dtype, options)
    # On some processors oneDNN keeps a copy of a bfloat16 matrix, in an order of its own, while it multiplies.
    with torch.backends.mkldnn.flags(enabled=False):
        measured = peak(lambda: real.forward(OPTIONS.slots, 2))
    estimate = generator_replica(real.model.cfg, options, dtype.itemsize).activations
    print(f"{kind} {quantization}: {measured / estimate:.2f} of the estimate")
    if kind == "diffusion":
        assert measured == pytest.approx(estimate, rel=0.02 if quantization == "none" else 0.3)
    else:  # one token a row: what the processor's kernels of attention take is more, and does not grow with the width
        assert measured < estimate + 100_000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["linear", "conv"])
def test_a_decoders_memory_is_as_measured(variant: Literal["linear", "conv"], dtype: torch.dtype) -> None:
    cfg = BITConfig(
        **BIT_SIZES,
        downsample_after=(),
        upsample_after=(1,),
        resample=variant,
        pixel_head=variant,
        normalize_logits=True,
    )
    bit = BIT(cfg).eval().requires_grad_(False)
    batch, edge = 4, 128
    memory = decoder_replica(cfg, batch, edge, dtype.itemsize)
    assert memory.weights == nbytes(bit.state_dict().values())
    codes = torch.zeros(batch, cfg.num_tokens, cfg.bits_per_token)

    def decode() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            bit.decode(codes, edge, edge)

    # On a processor a norm of groups stays in bfloat16 under autocast; a GPU, which is what is estimated, takes float32.
    share = peak(decode) / memory.activations
    assert 0.3 < share < 1.02 if variant == "conv" else 0.95 < share < 1.05


def test_a_text_encoders_memory_is_at_least_as_measured() -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256}
    model = AutoModel.from_config(AutoConfig.for_model("olmo", vocab_size=60, **sizes)).eval().requires_grad_(False)
    memory = text_encoder_replica(TextEncoderSizes.of(model), 8, 40, 4)
    assert memory.weights == nbytes(model.parameters())
    tokens = torch.ones(8, 40, dtype=torch.long)

    def encode() -> Tensor:
        return torch.stack(model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[1:])

    assert 0.5 * memory.activations < peak(encode) <= memory.activations
