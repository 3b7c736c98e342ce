"""Folders of random codes, as the encoding job leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from instella_ray import storage
from instella_ray.data.formats.codes import CodesFile, CodesManifest, pack_codes, write_codes_file

TOKENS, BITS = 5, 7


def random_codes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (count, TOKENS, BITS), np.uint8)


def write_codes(folder: Path, counts: list[int], tokenizer_hash: str = "a" * 64) -> np.ndarray:
    codes = random_codes(sum(counts))
    start, files = 0, []
    for number, count in enumerate(counts):
        rows = [
            {"key": f"k{i}", "shard": "s", "row": i, "caption_long": f"long {i}", "caption_short": f"short {i}"}
            | {"codes": pack_codes(codes[i : i + 1])[0], "width": 8, "height": 8, "source": "test"}
            for i in range(start, start + count)
        ]
        write_codes_file(str(folder / f"{number}.parquet"), rows)
        files.append(CodesFile(name=f"{number}.parquet", rows=count))
        start += count
    sizes = {"num_tokens": TOKENS, "bits_per_token": BITS, "rows": start}
    manifest = CodesManifest(tokenizer_hash=tokenizer_hash, files=tuple(files), **sizes)
    storage.write_json(str(folder / "manifest.json"), manifest.model_dump(mode="json"))
    return codes
