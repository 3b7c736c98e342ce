"""Whole sampling loops, with real (tiny, untrained) generators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from instella_ray.errors import UserError
from instella_ray.models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator
from instella_ray.models.joint_attention import TextKV
from instella_ray.models.sampling import SamplingParams, generate, generate_ar, generate_diffusion

L, K, LAYERS, TEXT_WIDTH = 5, 3, 2, 8
KINDS: dict[str, dict[str, Any]] = {"diffusion": {}, "ar": {}, "bit head": {"kind": "ar", "bit_head_width": 7}}


def tiny(kind: str) -> DiffusionGenerator | ARGenerator:
    torch.manual_seed(0)
    config = {"num_tokens": L, "bits_per_token": K, "width": 16, "layers": LAYERS, "heads": 2, "text_width": TEXT_WIDTH}
    given = {"kind": kind, "zero_init": False, **config, **KINDS[kind]}
    model = build_generator(GeneratorConfig.model_validate(given)).eval()
    if isinstance(model, ARGenerator) and model.bit_head is not None:
        torch.nn.init.normal_(model.bit_head.bits_out)  # zero at first: bits would be independent
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> DiffusionGenerator | ARGenerator:
    return tiny(request.param)


def prompts(model: DiffusionGenerator | ARGenerator, count: int) -> tuple[TextKV, TextKV]:
    """``count`` left-padded prompts, and one unconditional row without any token."""
    features = torch.randn(LAYERS, count, 4, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(4) >= torch.arange(count)[:, None] % 4
    with torch.no_grad():
        return model.text_kv(features, mask), model.text_kv(features[:, :1, :1], torch.zeros(1, 1, dtype=torch.bool))


def mixed() -> dict[str, Any]:
    return {
        "seed": [3, 1, 4, 1],
        "num_inference_steps": [5, 2, 4, 1],
        "guidance_scale": [0.0, 4.0, 7.5, 1.0],
        "temperature": [1.0, 0.5, 0.0, 1.0],
        "rho": [1.0, 2.0, 1.0, 1.0],
        "sampler": ["posterior", "simplified", "posterior", "simplified"],
        "final_draw": [False, True, False, True],
    }


def test_codes_are_bits_and_repeat(model: DiffusionGenerator | ARGenerator) -> None:
    cond, uncond = prompts(model, 4)
    params = SamplingParams.of(4, **mixed())
    codes = generate(model, cond, uncond, params)
    assert codes.shape == (4, L, K) and codes.dtype == torch.uint8 and codes.max() <= 1
    assert torch.equal(codes, generate(model, cond, uncond, params))


def test_each_row_is_what_it_is_alone(model: DiffusionGenerator | ARGenerator) -> None:
    """Step counts, guidance, temperature, sampler and seed all differ within the batch."""
    cond, uncond = prompts(model, 4)
    params = SamplingParams.of(4, **mixed())
    together = generate(model, cond, uncond, params)
    for order in ([2], [3, 0], [1, 2, 3]):
        rows = torch.tensor(order)
        some = generate(model, cond.rows(rows), uncond, params.map(lambda value, at=rows: value[at]))
        assert torch.equal(some, together[rows])


def test_one_unconditional_row_serves_all(model: DiffusionGenerator | ARGenerator) -> None:
    cond, uncond = prompts(model, 3)
    params = SamplingParams.of(3, seed=range(3), guidance_scale=3.0, num_inference_steps=3)
    assert torch.equal(generate(model, cond, uncond, params), generate(model, cond, TextKV.cat([uncond] * 3), params))


def test_without_guidance_the_unconditional_text_is_irrelevant(model: DiffusionGenerator | ARGenerator) -> None:
    cond, uncond = prompts(model, 3)
    params = SamplingParams.of(3, seed=range(3), guidance_scale=0.0, num_inference_steps=3)
    assert torch.equal(
        generate(model, cond, uncond, params), generate(model, cond, cond.rows(torch.tensor([2, 0, 1])), params)
    )


@pytest.mark.parametrize("final_draw", [False, True])
def test_given_uniforms_replay_as_tensor_or_function(model: DiffusionGenerator | ARGenerator, final_draw: bool) -> None:
    cond, uncond = prompts(model, 2)
    steps = 4
    params = SamplingParams.of(2, seed=[1, 2], num_inference_steps=steps, final_draw=final_draw)
    diffusion = isinstance(model, DiffusionGenerator)
    needed, shape = (steps + final_draw, (L, K)) if diffusion else (L, (K,))
    u = torch.rand(needed, 2, *shape, generator=torch.Generator().manual_seed(5))
    codes = generate(model, cond, uncond, params, uniforms=u)
    by_draw: list[int] = []

    def draw(index: int) -> Tensor:
        by_draw.append(index)
        return u[min(index, needed - 1)]

    assert torch.equal(codes, generate(model, cond, uncond, params, uniforms=draw))
    assert by_draw == list(range(steps + 1 if diffusion else L))
    assert torch.equal(codes, generate(model, cond, uncond, params.map(lambda v: v), uniforms=u))
    with pytest.raises(UserError, match=f"expected {needed} draws, got {needed - 1}"):
        generate(model, cond, uncond, params, uniforms=u[:-1])


@pytest.mark.parametrize("kind", ["ar", "bit head"])
def test_cached_and_recomputed_prefixes_give_the_same_bits(kind: str) -> None:
    model = tiny(kind)
    assert isinstance(model, ARGenerator)
    cond, uncond = prompts(model, 4)
    params = SamplingParams.of(4, **mixed())
    assert torch.equal(
        generate_ar(model, cond, uncond, params), generate_ar(model, cond, uncond, params, use_cache=False)
    )


def test_on_step_sees_every_step_and_the_end() -> None:
    model = tiny("diffusion")
    assert isinstance(model, DiffusionGenerator)
    cond, uncond = prompts(model, 4)
    seen: list[tuple[int, Tensor, Tensor]] = []
    params = SamplingParams.of(4, **mixed())
    codes = generate_diffusion(model, cond, uncond, params, on_step=lambda *step: seen.append(step))
    assert [index for index, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1].to(torch.uint8), codes)
    for row, steps in enumerate(params.num_inference_steps.tolist()):
        for _, z, x0_prob in seen[steps:]:
            assert torch.equal(z[row].to(torch.uint8), codes[row]) and torch.equal(x0_prob[row], z[row])
        assert all(((p >= 0) & (p <= 1)).all() for _, _, p in seen)


def test_bits_come_out_in_the_models_dtype_too() -> None:
    """bf16 weights: probabilities stay float32, states follow the weights."""
    for kind in KINDS:
        model = tiny(kind).to(torch.bfloat16)
        cond, uncond = prompts(model, 2)
        assert generate(model, cond, uncond, SamplingParams.of(2, seed=[0, 1], num_inference_steps=3)).max() <= 1


def test_greedy_ar_ignores_the_seed() -> None:
    model = tiny("ar")
    cond, uncond = prompts(model, 1)
    greedy = [generate(model, cond, uncond, SamplingParams.of(1, seed=seed, temperature=0.0)) for seed in (0, 9)]
    assert torch.equal(*greedy)
