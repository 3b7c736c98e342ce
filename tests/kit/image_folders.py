"""Folders of images, and what an evaluation reads of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from instella_ray.evaluation.reader import Reader, ReaderOptions
from instella_ray.evaluation.units import find_image_set

SIZES = ((97, 61), (40, 200), (30, 30), (128, 128), (21, 33), (300, 210))
"""Wide, high, smaller than the size that is measured, of that size, and odd."""
SAVED: dict[str, dict[str, Any]] = {"png": {}, "jpg": {"quality": 80}, "webp": {"quality": 80}}


def art(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    colors = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


def write_images(folder: Path, seeds: range, ending: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        art(seed, SIZES[seed % len(SIZES)]).save(folder / f"{seed}.{ending}", **SAVED.get(ending, {}))
    return folder


def read_images(
    folder: Path | str, rows_per_unit: int = 100, captions: bool = False
) -> tuple[dict[str, str], Counter[str]]:
    """Return the captions of all images by id, and the number of those that cannot be measured by reason."""
    found, options = dict[str, str](), ReaderOptions(None, 32, 4, captions)
    quarantined = Counter[str]()
    for unit in find_image_set(str(folder), rows_per_unit).units:
        reader = Reader(options, torch.device("cpu"))
        for batch in reader.batches(unit):
            assert not set(found) & set(batch.batch.ids)
            found |= dict(zip(batch.batch.ids, batch.batch.prompts or (), strict=True))
        quarantined += reader.quarantined
    return found, quarantined
