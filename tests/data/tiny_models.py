"""Tiny models of the classes that the jobs load, with random weights: they compute as the large ones do, nonsense."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
THINGS = ("a", "red", "blue", "round", "square", "ball", "box", "lies", "stands", "beside", "under", "on")
WORDS = [word + end for word in THINGS for end in ("", ".")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c.text }} {% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of :data:`WORDS`, parted by spaces; others are unknown."""
    vocabulary = {word: i for i, word in enumerate((*special, "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def save_captioner(folder: Path, seed: int = 0) -> Path:
    """A Qwen2.5-VL of two layers with its processor, as ``save_pretrained`` leaves them."""
    words = tokenizer(*SPECIAL, "<|video_pad|>")
    words.eos_token, words.pad_token = "<|im_end|>", "<|endoftext|>"
    ids = dict(zip(SPECIAL, words.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 64),
        words,
        Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "vocab_size": len(words),
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            **sizes,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    # Qwen's own settings, which would make a caption depend on the padding.
    model.generation_config.repetition_penalty = 1.05
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
