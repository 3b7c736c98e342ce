"""Memory stays bounded: ten times the input, the same peak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instella_ray.bench.usage import peak_memory
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.formats.shards import write_tar

from ..kit.shards import image_bytes

pytestmark = [pytest.mark.ray, pytest.mark.nightly]
SHARDS, IMAGES = 6, 5


def write(folder: Path, shards: int) -> Path:
    """Images of a megabyte each, most of it behind the end of the image; one a shard stays."""
    rng = np.random.default_rng(0)
    for number in range(shards):
        samples = [
            (f"{i}", image_bytes(i) + rng.bytes(1 << 20), "an image", {"pwatermark": float(i > 0)})
            for i in range(IMAGES)
        ]
        write_tar(str(folder / f"{number:03d}.tar"), samples)
    return folder


def curation_peak(folder: Path, output: Path) -> float:
    filters = {"resolution": {"target_size": 64}}
    given = {"input": str(folder), "output": str(output), "filters": filters, "rows_per_shard": 5}
    with peak_memory() as peak:
        run_curate(CurateConfig.model_validate(given))
    return peak[0]


def test_ten_times_the_input_takes_the_same_memory(ray_session: None, tmp_path: Path) -> None:
    small, large = write(tmp_path / "small", SHARDS), write(tmp_path / "large", 10 * SHARDS)
    curation_peak(large, tmp_path / "warm")  # workers import what they need
    few, many = curation_peak(small, tmp_path / "few"), curation_peak(large, tmp_path / "many")
    assert many <= 1.2 * few
