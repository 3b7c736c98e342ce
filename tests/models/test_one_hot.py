"""One-hot words: nearest ones, their numbers as bits, and losses that always count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.bit_layers import OneHotQuantizer
from instella_ray.models.checkpoint import load_model, save_model
from instella_ray.training.losses import TokenizerLossConfig
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerLoss

from ..kit.models import RESAMPLING_BIT
from ..kit.training import PLAIN_LOSS, tokenizer_config


def quantizer(bits: int = 5) -> OneHotQuantizer:
    torch.manual_seed(0)
    return OneHotQuantizer(12, bits)


def one_hot(**changes: object) -> BIT:
    torch.manual_seed(0)
    return BIT(BITConfig(**{**RESAMPLING_BIT.model_dump(), "quantizer": "one_hot", **changes}))


def words(q: OneHotQuantizer) -> torch.Tensor:
    return F.normalize(q.embed @ q.embed_map.weight.T, dim=-1)


def test_a_code_is_the_number_of_the_nearest_word_in_binary_digits() -> None:
    q, tokens = quantizer(), torch.randn(3, 7, 12)
    codes = q.encode(tokens)
    distances = torch.cdist(F.normalize(q.proj(tokens), dim=-1).flatten(0, 1), words(q))
    expected = [[int(digit) for digit in f"{index:05b}"] for index in distances.argmin(-1).tolist()]
    assert codes.dtype == torch.uint8 and codes.flatten(0, 1).tolist() == expected
    assert len({tuple(code) for code in expected}) > 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bool])
def test_every_code_is_decoded_to_its_word(dtype: torch.dtype) -> None:
    q = quantizer()
    codes = torch.tensor([[int(digit) for digit in f"{index:05b}"] for index in range(32)])
    torch.testing.assert_close(q.vectors(codes[None].to(dtype))[0], q.embed_out(words(q)))


def test_gradients_pass_straight_through_and_the_words_learn_from_their_loss_alone() -> None:
    q, tokens = quantizer(), torch.randn(3, 7, 12, requires_grad=True)
    found = q(tokens, 0.5)
    torch.testing.assert_close(found.vectors, q.vectors(found.codes), atol=1e-6, rtol=1e-5)
    assert torch.equal(found.codes, q.encode(tokens))
    pull = torch.randn(3, 7, 12)
    (found.vectors * pull).sum().backward(retain_graph=True)
    straight, tokens.grad = tokens.grad, None
    (q.embed_out(F.normalize(q.proj(tokens), dim=-1)) * pull).sum().backward()
    torch.testing.assert_close(straight, tokens.grad)
    assert q.embed_map.weight.grad is None
    found.loss.backward()
    assert q.embed_map.weight.grad is not None and q.embed_map.weight.grad.abs().sum() > 0
    error = (F.normalize(q.proj(tokens), dim=-1) - words(q)[_numbers(found.codes)]).square().mean()
    torch.testing.assert_close(found.loss, 1.25 * error)


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[int("".join(map(str, code)), 2) for code in row] for row in codes.tolist()])


@pytest.mark.parametrize("normalize", [False, True])
def test_every_parameter_gets_a_gradient_from_a_loss_that_always_counts(normalize: bool) -> None:
    bit = one_hot(normalize_logits=normalize).train()
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    loss, parts = TokenizerLoss(bit, PLAIN_LOSS)(images, images, torch.arange(4), temperature=0.5)
    torch.testing.assert_close(loss, parts["reconstruction"] + parts["code_loss"])
    loss.backward()
    missing = [name for name, p in bit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_codes_are_decoded_as_in_training_and_after_loading(tmp_path: Path) -> None:
    bit, images = one_hot().eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    codes = bit.encode(images)
    out = bit(images, temperature=0.5)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.images, bit.decode(codes, 32, 32), atol=1e-5, rtol=0)
    save_model(tmp_path, bit)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, BIT) and loaded.cfg == bit.cfg
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes, 48, 32), bit.decode(codes, 48, 32))
    half = one_hot().eval().bfloat16()
    assert half.decode(codes, 32, 32).dtype == torch.float32 and half.encode(images).shape == codes.shape


def test_more_words_than_memory_are_refused_in_one_line() -> None:
    assert BITConfig(quantizer="one_hot", bits_per_token=16).bits_per_token == 16
    with pytest.raises(ValidationError, match=r"quantizer one_hot: 2\^64 words, expected bits_per_token of at most 16"):
        BITConfig(quantizer="one_hot")


def test_a_weight_of_the_other_quantizers_loss_is_refused(tmp_path: Path) -> None:
    cfg = tokenizer_config("a.tar", tmp_path).model_dump()
    loss = TokenizerLossConfig(code_weight=0.1).model_dump()
    with pytest.raises(ValidationError, match=r"loss.code_weight 0.1: only the binary quantizer has it, expected 0"):
        TokenizerConfig.model_validate({**cfg, "loss": loss, "model": {**cfg["model"], "quantizer": "one_hot"}})
