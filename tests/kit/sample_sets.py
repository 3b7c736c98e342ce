"""Folders of samples as the sampling job leaves them, with codes of the test's choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instella_ray import storage
from instella_ray.bulk.sample_set import (
    MANIFEST,
    SWEEP,
    SampleBlock,
    SampleFile,
    SampleManifest,
    SampleRun,
    sample_id,
    write_block,
)
from instella_ray.data.prompts import Prompt, prompts_hash
from instella_ray.models.checkpoint import weight_hash
from instella_ray.models.sampling import SamplingConfig

from .models import ONE_LAYER_BIT

TOKENS, BITS, SIZE = ONE_LAYER_BIT.num_tokens, ONE_LAYER_BIT.bits_per_token, ONE_LAYER_BIT.image_size


def noise(prompts: int, images: int, seed: int = 0) -> np.ndarray:
    """Random codes, uint8 ``[prompts * images, L, K]``."""
    return np.random.default_rng(seed).integers(0, 2, (prompts * images, TOKENS, BITS), np.uint8)


def write_samples(
    folder: Path,
    prompts: Sequence[Prompt],
    codes: np.ndarray,
    tokenizer: str | None = None,
    *,
    rows_per_file: int = 8,
    **changes: Any,
) -> str:
    """A finished folder with ``len(codes) / len(prompts)`` samples of each prompt."""
    each = len(codes) // len(prompts)
    facts: dict[str, Any] = {
        "model": "models/generator",
        "model_hash": "ab" * 32,
        "kind": "diffusion",
        "tokenizer_hash": weight_hash(tokenizer) if tokenizer else "cd" * 32,
        "text_encoder": None,
        "text_length": 24,
        "precision": "fp32",
        "num_tokens": TOKENS,
        "bits_per_token": BITS,
        "seed": 3,
        "sampling": SamplingConfig(),
        "prompts": "scenes",
        "prompts_hash": prompts_hash(prompts),
        "images_per_prompt": each,
    }
    run = SampleRun(**{**facts, **changes})
    rows = [(prompt, index) for prompt in prompts for index in range(each)]
    files = []
    for number, first in enumerate(range(0, len(rows), rows_per_file)):
        part = rows[first : first + rows_per_file]
        name = f"{number:05d}.parquet"
        block = SampleBlock(
            [sample_id(p.id, i) for p, i in part],
            [p.id for p, _ in part],
            [i for _, i in part],
            [p.text for p, _ in part],
            [p.category for p, _ in part],
            [dict(p.meta) for p, _ in part],
            [100 + first + i for i in range(len(part))],
            codes[first : first + rows_per_file],
        )
        write_block(storage.join(str(folder), name), block, run, 2.0)
        files.append(SampleFile(name=name, rows=len(part), seconds=2.0))
    manifest = SampleManifest(
        run_id=run.id, run=run, rows=len(rows), files=tuple(files), hardware="a small machine", price_per_hour=1.5
    )
    storage.write_json(storage.join(str(folder), MANIFEST), manifest.model_dump(mode="json"))
    return str(folder)


def write_sweep(folder: Path, settings: dict[str, SamplingConfig], prompts: Sequence[Prompt], **more: Any) -> str:
    """A folder of several settings; ``codes`` come from ``more['codes'](number)``."""
    codes = more.pop("codes")
    for number, (name, sampling) in enumerate(settings.items()):
        write_samples(folder / name, prompts, codes(number), sampling=sampling, **more)
    storage.write_json(storage.join(str(folder), SWEEP), {"settings": list(settings)})
    return str(folder)
