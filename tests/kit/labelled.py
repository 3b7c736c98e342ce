"""Images whose labels are plain to see: the colour is what they show, a frame is their style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instella_ray.data.formats.png import write_png
from instella_ray.data.formats.shards import write_tar

COLORS = {"cherry": (200, 30, 40), "leaf": (40, 170, 60), "sea": (30, 60, 200), "sun": (240, 210, 40)}
STYLES = ("plain", "framed")


def labelled_image(style: str, concept: str, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """uint8 ``[size, size, 3]`` on white."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    inset = size // 4 + int(rng.integers(0, size // 8))
    pixels[inset:-inset, inset:-inset] = np.clip(np.array(COLORS[concept]) + rng.integers(-8, 8, 3), 0, 255)
    if style == "framed":
        pixels[:2] = pixels[-2:] = pixels[:, :2] = pixels[:, -2:] = 0
    return pixels


def labelled_rows(
    each: int, split: str = "train", concepts: Sequence[str] = tuple(COLORS), seed: int = 0, size: int = 32
) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
    """``each`` samples of every pair of style and concept."""
    rng = np.random.default_rng(seed)
    for style in STYLES:
        for concept in concepts:
            for number in range(each):
                meta = {"style": style, "concept": concept, "split": split}
                image = write_png(labelled_image(style, concept, rng, size), {})
                yield f"{split}-{style}-{concept}-{number}", image, f"a {concept}, {style} style", meta


def write_labelled(folder: Path, each: int, split: str = "train", **options: Any) -> str:
    """Write one tar of :func:`labelled_rows` into ``folder``, which is returned."""
    write_tar(str(folder / "00000.tar"), labelled_rows(each, split, **options))
    return str(folder)
