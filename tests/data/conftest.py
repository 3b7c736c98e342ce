"""Folders of shards for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..kit.shards import HOSTILE, sample, tar_bytes


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / "shards" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def hostile_shards(write_shard: Callable[[str, bytes], Path]) -> Path:
    """A folder of five tars: hostile samples, one cut off, one of no bytes, one without members, one in order."""
    everything = [member for members, _ in HOSTILE.values() for member in members]
    whole = tar_bytes([m for i in range(6) for m in sample(f"{i:04d}", i)])
    write_shard("00000.tar", tar_bytes(everything))
    write_shard("00001.tar", whole[: len(whole) // 2])
    write_shard("00002.tar", b"")
    write_shard("00003.tar", tar_bytes([]))
    return write_shard("00004.tar", whole).parent


@pytest.fixture(scope="session")
def emoji_shards() -> str:
    """Real captioned shards, where this checkout has them beside it."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "emoji3d"
    if not list(folder.glob("*.tar")):
        pytest.skip("the emoji3d shards are not here")
    return f"{folder}/*.tar"
