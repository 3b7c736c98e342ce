"""Weights and inputs of eight bits: close to the layers that they replace, and every row by itself."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from instella_ray.engine.engine import Request
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.errors import UserError
from instella_ray.models.eight_bit import EightBitLinear, Quantization, quantize
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.sampling import SamplingParams

from ..kit.engines import SIZES, drain

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
EIGHT_BIT: list[Quantization] = ["int8", "fp8"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_layer_is_close_to_the_one_that_it_replaces(dtype: torch.dtype, bias: bool, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 64, bias=bias).to(precision)
    # Channels and rows of very different size each have their own scale.
    linear.weight.data *= torch.logspace(-2, 2, 64)[:, None]
    x = (torch.randn(5, 7, 256) * torch.logspace(-3, 3, 7)[:, None]).to(precision)
    expected, found = linear(x), EightBitLinear(linear, dtype)(x)
    assert found.dtype == precision and found.shape == expected.shape
    size = x.float().norm(dim=-1, keepdim=True) * linear.weight.float().norm(dim=-1)
    error = ((found - expected).float().abs() / (size + expected.float().abs())).max()
    assert error < (0.006 if dtype == torch.int8 else 0.02)


@given(rows=st.integers(1, 70), first=st.integers(0, 69))
def test_int8_gives_a_row_the_same_bits_in_any_number_of_rows(rows: int, first: int) -> None:
    torch.manual_seed(0)
    layer, x = EightBitLinear(nn.Linear(48, 32), torch.int8), torch.randn(70, 48)
    part = x[first : first + rows]
    assert torch.equal(layer(part), layer(x)[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_of_zeros_stay_zero_and_the_largest_numbers_finite(dtype: torch.dtype) -> None:
    layer = EightBitLinear(nn.Linear(32, 16, bias=False), dtype)
    assert not layer(torch.zeros(2, 32)).any()
    assert layer(torch.full((2, 32), 1e30)).isfinite().all()


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.parametrize("quantization", EIGHT_BIT)
def test_an_engine_of_eight_bits_makes_nearly_the_same_images(
    kind: Literal["diffusion", "ar"], quantization: Quantization
) -> None:
    def run(chosen: Quantization, slots: int) -> torch.Tensor:
        torch.manual_seed(0)
        sizes = {**SIZES, "num_tokens": 16, "width": 64}
        model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **sizes)).eval()
        options = EngineOptions(slots, 6, quantization=chosen)
        engine = build_engine(model, torch.zeros(2, 0, 8), options)
        replaced = [name for name, module in model.named_modules() if isinstance(module, EightBitLinear)]
        assert len(replaced) == (12 if chosen != "none" else 0)  # two blocks: four of attention, two of feed-forward
        for number in range(4):
            features = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(number))
            params = SamplingParams.of(1, seed=number, num_inference_steps=4, guidance_scale=1.0, temperature=0.5)
            engine.submit(Request(str(number), features, params))
        done = drain(engine)
        return torch.stack([done[str(number)] for number in range(4)])

    exact, rounded = run("none", 4), run(quantization, 4)
    same = (exact == rounded).float().mean()
    assert same > 0.8
    # An image does not depend on the others in its batch.
    assert torch.equal(rounded, run(quantization, 1)) and torch.equal(rounded, run(quantization, 3))


def test_a_width_that_the_products_do_not_take_is_named() -> None:
    model = build_generator(GeneratorConfig(**{**SIZES, "width": 36}))
    with pytest.raises(UserError, match="quantization fp8: width 36, expected a multiple of 16"):
        quantize(model, "fp8")
