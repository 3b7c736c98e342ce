"""Images with copies among them, and what a curation has kept."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.formats.tar_source import read_samples

from .shards import image_bytes

COPY_FILTERS = {"resolution": {"target_size": 64}, "duplicates": {"max_distance": 4}}


def curated_keys(folder: Path) -> list[str]:
    return [
        row["key"] for url in find_shards(str(folder)) for row in read_samples(io.BytesIO(Path(url).read_bytes()), "")
    ]


def shards_with_copies(folder: Path) -> Path:
    """Three shards of ten images; the second has three copies of the first's, the third is one copy alone."""
    first = [(f"{i}", image_bytes(i, (96, 96)), f"image {i}", {"pwatermark": 0.1 * i}) for i in range(10)]
    second = [(f"{i}", image_bytes(50 + i, (96, 96)), "<b>other</b>", {}) for i in range(10)]
    second[2] = ("2", first[4][1], "the same to the byte", {})
    second[5] = ("5", copy_of(first[1][1], quality=50), "squeezed", {})
    second[7] = ("7", copy_of(first[3][1], scale=2.0), "enlarged", {})
    for name, samples in (("a", first), ("b", second), ("c", [("0", first[0][1], "alone", {})])):
        write_tar(str(folder / f"{name}.tar"), samples)
    return folder


def copy_of(data: bytes, kind: str = "JPEG", scale: float = 1.0, **save: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, kind, **save)
    return buffer.getvalue()
