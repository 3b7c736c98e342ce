"""Generators: text is projected once, the AR cache equals the whole prefix, padding has no influence."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from instella_ray.errors import UserError
from instella_ray.models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator
from instella_ray.models.joint_attention import JointCache, TextKV

SIZES = {"num_tokens": 6, "bits_per_token": 5, "width": 16, "layers": 3, "heads": 2, "text_width": 12}


def make(kind: str) -> DiffusionGenerator | ARGenerator:
    torch.manual_seed(0)
    model = build_generator(GeneratorConfig(kind=kind, zero_init=False, **SIZES))
    return model.eval()


def text(batch: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    """Features and a left-padded mask; the first row is the empty prompt."""
    torch.manual_seed(1)
    lengths = torch.arange(batch) * 3 % (length + 1)
    mask = torch.arange(length)[None] >= length - lengths[:, None]
    return torch.randn(3, batch, length, 12), mask


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
@pytest.mark.parametrize("garbage", [1e9, float("nan"), float("inf")])
def test_padded_text_has_no_influence(kind: str, garbage: float) -> None:
    model, (features, mask) = make(kind), text()
    spoiled = features.masked_fill(~mask[None, :, :, None], garbage)
    outs = [_run(model, model.text_kv(f, mask)) for f in (features, spoiled)]
    assert torch.equal(*outs) and outs[0].isfinite().all()


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_longer_padding_changes_nothing(kind: str) -> None:
    model, (features, mask) = make(kind), text()
    kv = model.text_kv(features, mask)
    torch.testing.assert_close(_run(model, kv), _run(model, kv.padded(20)), atol=1e-6, rtol=1e-5)


def test_an_empty_prompt_equals_no_text_at_all() -> None:
    model, (features, mask) = make("diffusion"), text()
    whole = _run(model, model.text_kv(features, mask))[:1]
    none = _run(model, model.text_kv(features[:, :1, :0], mask[:1, :0]))
    torch.testing.assert_close(whole, none, atol=1e-6, rtol=1e-5)


def test_joined_and_cut_text_keeps_its_rows() -> None:
    model, (features, mask) = make("diffusion"), text()
    kv = model.text_kv(features, mask)
    joined = TextKV.cat([kv.rows(slice(0, 1)).padded(9), kv.rows(torch.tensor([1, 2]))])
    torch.testing.assert_close(_run(model, joined), _run(model, kv), atol=1e-6, rtol=1e-5)
    assert len(kv.rows(slice(0, 1)).expand(4)) == 4


def test_cached_ar_steps_equal_the_whole_prefix() -> None:
    model, (features, mask) = make("ar"), text()
    assert isinstance(model, ARGenerator)
    kv, z = model.text_kv(features, mask), torch.randint(0, 2, (3, 6, 5)).float()
    cache = JointCache.of(kv, 6)
    steps = [model.step(z[:, max(i - 1, 0)], torch.full((3,), i), cache) for i in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), model(z[:, :-1], kv), atol=1e-5, rtol=1e-5)


def test_cached_rows_may_stand_at_different_positions() -> None:
    model, (features, mask) = make("ar"), text()
    assert isinstance(model, ARGenerator)
    kv, z = model.text_kv(features, mask), torch.randint(0, 2, (3, 6, 5)).float()
    whole, cache = model(z[:, :-1], kv), JointCache.of(kv, 6)
    start, rows = torch.tensor([0, -2, -1]), torch.arange(3)
    for tick in range(6):
        position = (start + tick).clamp(0, 5)
        out = model.step(z[rows, (position - 1).clamp(min=0)], position, cache)
        for row in range(3):
            if 0 <= start[row] + tick <= 5:
                torch.testing.assert_close(out[row], whole[row, position[row]], atol=1e-5, rtol=1e-5)


def test_diffusion_in_a_joint_cache_equals_concatenated_text() -> None:
    """Also in a view of its first rows, after a row has been moved, and when the same cache is used again."""
    model, (features, mask) = make("diffusion"), text()
    kv, z, t = model.text_kv(features, mask), torch.randint(0, 2, (3, 6, 5)).float(), torch.tensor([0.9, 0.5, 0.1])
    expected = model(z, t, kv)
    cache = JointCache.empty(4, kv.mask.shape[1], 6, kv.keys)
    cache.put(slice(1, 4), kv)
    cache.move(1, 0)
    for row, source in ((1, 2), (2, 3)):
        cache.move(source, row)
    model(1 - z, t, cache.view(slice(3)))
    torch.testing.assert_close(model(z, t, cache.view(slice(3))), expected, atol=1e-6, rtol=1e-5)


def test_ar_prediction_ignores_later_tokens() -> None:
    model, (features, mask) = make("ar"), text()
    kv, z = model.text_kv(features, mask), torch.randint(0, 2, (3, 5, 5)).float()
    changed = z.clone()
    changed[:, 3:] = 1 - changed[:, 3:]
    torch.testing.assert_close(model(z, kv)[:, :4], model(changed, kv)[:, :4])


def test_zero_init_starts_from_no_preference() -> None:
    model = build_generator(GeneratorConfig(kind="diffusion", **SIZES))
    features, mask = text()
    assert _run(model, model.text_kv(features, mask)).abs().max() == 0


@pytest.mark.parametrize("key", SIZES)
def test_a_size_below_one_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key}\n.*greater than or equal to 1"):
        GeneratorConfig(**{**SIZES, key: 0})


def test_text_of_another_encoder_is_named() -> None:
    with pytest.raises(UserError, match="3 layers of width 12"):
        make("ar").text_kv(torch.zeros(2, 1, 4, 12), torch.ones(1, 4, dtype=torch.bool))


def _run(model: DiffusionGenerator | ARGenerator, kv: TextKV) -> Tensor:
    torch.manual_seed(2)
    z = torch.randint(0, 2, (3, 6, 5)).float()[: len(kv)]
    with torch.no_grad():
        if isinstance(model, ARGenerator):
            return model(z[:, :-1], kv)
        return model(z, torch.tensor([0.9, 0.5, 0.1])[: len(kv)], kv)


@pytest.mark.parametrize("width", [8, 64])
def test_calibrated_text_projections_are_white_and_ignore_padding(width: int) -> None:
    """Narrower and wider than the text's features."""
    sizes = {"num_tokens": 6, "bits_per_token": 5, "layers": 2, "heads": 2, "text_width": 12}
    model = build_generator(GeneratorConfig(kind="ar", width=width, **sizes))
    # One direction dominates, as it does in language models, and the mean is far from 0.
    scale = torch.tensor([30.0, *[1.0] * 11])
    features = 7 + scale * torch.randn(2, 40, 9, 12)
    mask = torch.arange(9) >= torch.arange(40)[:, None] % 5
    features[:, ~mask] = float("nan")
    # All are white without ridge; with the default a direction of 1/75 of the mean variance counts (with 0.1 for an eighth).
    for ridge, least in ((0.0, 0.999), (None, 0.4)):
        model.calibrate_text(features, mask, **({} if ridge is None else {"ridge": ridge}))
        for block, layer in zip(model.transformer_blocks, features, strict=True):
            out = block.proj_cond(layer[mask])
            assert out.mean(0).abs().max() < 1e-4
            spread = torch.linalg.eigvalsh(out.T @ out / len(out)).flip(0)[: min(width, 12)]
            assert spread.min() > least and spread.max() < 1.001
    assert model.text_kv(features, mask).keys[0].isfinite().all()
