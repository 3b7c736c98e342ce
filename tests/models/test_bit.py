"""BIT: sizes, both forms of its parts, gradients through the bits, and freedom of output size."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from instella_ray.errors import UserError
from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.bit_layers import DOWN, UP, BinaryQuantizer
from instella_ray.models.rope import apply_rope, grid_positions, rope_table

from ..kit.models import RESAMPLING_BIT


def small(**changes: object) -> BIT:
    torch.manual_seed(0)
    return BIT(BITConfig(**{**RESAMPLING_BIT.model_dump(), **changes}))


@pytest.mark.parametrize("resample", ["linear", "conv"])
@pytest.mark.parametrize("pixel_head", ["linear", "conv"])
def test_one_set_of_codes_decodes_to_any_size(resample: str, pixel_head: str) -> None:
    bit = small(resample=resample, pixel_head=pixel_head).eval()
    codes = bit.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert codes.shape == (2, 6, 5) and codes.dtype == torch.uint8 and set(codes.unique().tolist()) <= {0, 1}
    for height, width in ((32, 32), (48, 64), (8, 8)):
        image = bit.decode(codes, height, width)
        assert image.shape == (2, 3, height, width) and image.isfinite().all()


def test_every_parameter_gets_a_gradient_through_the_bits() -> None:
    bit = small(token_positions=True, normalize_logits=True).train()
    out = bit(torch.rand(4, 3, 32, 32) * 2 - 1, temperature=0.5)
    out.images.square().mean().backward()
    missing = [name for name, p in bit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_temperature_zero_is_the_inference_threshold() -> None:
    bit = small().eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    hard = bit(images, temperature=0.0).images
    torch.testing.assert_close(hard, bit.decode(bit.encode(images), 32, 32), atol=1e-5, rtol=0)


def test_quantizer_draws_bits_with_the_probability_of_eq_4() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([-1.0, 0.0, 0.3, 2.0]).expand(200_000, 4)
    bits = BinaryQuantizer(4, 4).quantize(logits, temperature=0.5)
    torch.testing.assert_close(bits.mean(0), (logits[0] / 0.5).sigmoid(), atol=5e-3, rtol=0)


def test_straight_through_gradient_is_that_of_the_plain_sigmoid() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    BinaryQuantizer(4, 4).quantize(logits, temperature=0.1).sum().backward()
    soft = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


def test_linear_merge_concatenates_exactly_the_2x2_cell() -> None:
    down, up = DOWN["linear"](4), UP["linear"](4)
    x = torch.randn(1, 4, 4, 6)
    cell = x[0, :, 2:4, 4:6]
    merged = down(x)[0, :, 1, 2]
    expected = down.linear(torch.nn.functional.pixel_unshuffle(cell[None], 2)[0, :, 0, 0])
    torch.testing.assert_close(merged, expected)
    assert up(x).shape == (1, 4, 8, 12)


def test_positions_span_the_same_extent_at_every_size() -> None:
    for side in (2, 5, 32, 64):
        places = grid_positions(side, 64.0)
        assert places[0] == 0 and places[-1] == pytest.approx(63.0)
    assert grid_positions(1, 64.0).tolist() == [0.0]
    assert grid_positions(4, None).tolist() == [0, 1, 2, 3]


def test_rotary_style_is_a_rotation_and_relative() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    table = rope_table(8, 0, 0, (8, 0, 0), None)

    def turned(x: torch.Tensor, place: int) -> torch.Tensor:
        return apply_rope(x, (table[0][place], table[1][place]), "rotary")

    torch.testing.assert_close(turned(q, 5).norm(), q.norm())
    near = (turned(q, 2) * turned(k, 1)).sum()
    far = (turned(q, 6) * turned(k, 5)).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)


def test_calibration_centres_the_patch_embedding() -> None:
    bit = small()
    images = torch.rand(16, 3, 32, 32) * 0.2 + 0.7
    bit.calibrate(images)
    patches = bit.encoder.patch_embedder(images)
    assert patches.mean((0, 2, 3)).abs().max() < 1e-4
    assert patches.std((0, 2, 3)).mean().item() == pytest.approx(1, abs=1e-3)


def test_normalized_logits_are_balanced_on_every_bit() -> None:
    bit = small(normalize_logits=True).train()
    logits = bit.encode_logits(torch.rand(32, 3, 32, 32))
    assert logits.mean(0).abs().max() < 1e-4


def test_encoding_and_decoding_have_multiples_of_their_own() -> None:
    finer = small(downsample_after=(), image_size=20).eval()
    assert (finer.cfg.encode_multiple, finer.cfg.decode_multiple, finer.cfg.size_multiple) == (4, 8, 8)
    codes = finer.encode(torch.zeros(1, 3, 16, 20))
    assert codes.shape == (1, 6, 5)
    with pytest.raises(UserError, match=r"image size 20x16: expected both sides to be multiples of 8 .* to decode"):
        finer.decode(codes, 16, 20)
    coarser = small(downsample_after=(0, 1), upsample_after=()).eval()
    assert (coarser.cfg.encode_multiple, coarser.cfg.decode_multiple, coarser.cfg.size_multiple) == (16, 4, 16)
    assert coarser.decode(codes, 12, 20).shape == (1, 3, 12, 20)
    with pytest.raises(UserError, match=r"image size 24x24: expected both sides to be multiples of 16 .* to encode"):
        coarser.encode(torch.zeros(1, 3, 24, 24))
    assert coarser(torch.zeros(1, 3, 16, 16), temperature=1.0, height=12, width=4).images.shape[-2:] == (12, 4)


def test_without_expansion_the_extent_is_not_rounded() -> None:
    tables = []
    bit = small(upsample_after=(), position_extent=15.5).eval()
    bit.decoder.transformer_blocks[0].register_forward_pre_hook(lambda _module, inputs: tables.append(inputs[1]))
    bit.decode(torch.zeros(1, 6, 5), 16, 16)
    torch.testing.assert_close(tables[0][0], rope_table(6, 4, 4, (2, 4, 2), 15.5)[0])


@pytest.mark.parametrize("options", [{}, {"token_positions": True, "normalize_logits": True, "pixel_head": "conv"}])
@pytest.mark.parametrize("rope", ["rotary", "published"])
def test_weights_of_less_precision_read_and_give_float_images(options: dict[str, object], rope: str) -> None:
    whole = small(rope=rope, **options).eval()
    half = small(rope=rope, **options).eval().bfloat16()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    logits = half.encode_logits(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, whole.encode_logits(images), atol=0.05, rtol=0.05)
    codes = half.encode(images)
    decoded = half.decode(codes, 48, 16)
    assert codes.dtype == torch.uint8 and decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, whole.decode(codes, 48, 16), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [(32, 30), (31, 32), (0, 32), (36, 32)])
def test_a_size_that_does_not_fit_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        small().decode(torch.zeros(1, 6, 5, dtype=torch.uint8), *size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_heads": 4}, "sum"),
        ({"image_size": 36}, "multiple of 8"),
        ({"image_size": 0}, "image_size\n.*greater than or equal to 1"),
        ({"patch_size": 0}, "patch_size\n.*greater than or equal to 1"),
        ({"encoder_heads": 0}, "encoder_heads\n.*greater than or equal to 1"),
        ({"decoder_heads": -1}, "decoder_heads\n.*greater than or equal to 1"),
        ({"num_tokens": 0}, "num_tokens\n.*greater than or equal to 1"),
        ({"rope_axes": (10, -4, 2)}, "rope_axes.1\n.*greater than or equal to 0"),
        ({"position_extent": 0}, "position_extent\n.*greater than 0"),
        ({"downsample_after": (3,)}, "block indices 0..2"),
        ({"patch_size": 12, "image_size": 48, "pixel_head": "conv"}, "power of two"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_sizes_that_cannot_work_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BITConfig(**{**RESAMPLING_BIT.model_dump(), **change})
