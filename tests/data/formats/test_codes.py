"""Packed codes: bits survive, rows are found by index with little memory, foreign codes are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats.codes import CodesReader, pack_codes, unpack_codes, write_codes_file
from instella_ray.errors import UserError

from ...kit.codes import BITS, TOKENS, write_codes


@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_packing_is_lossless(count: int, tokens: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2, (count, tokens, bits), np.uint8)
    packed = pack_codes(codes)
    assert all(len(p) == -(-tokens * bits // 8) for p in packed)
    assert np.array_equal(unpack_codes(packed, tokens, bits), codes)


def test_full_size_codes_take_one_kibibyte() -> None:
    assert len(pack_codes(np.zeros((1, 128, 64), np.uint8))[0]) == 1024


@pytest.mark.parametrize("cache_bytes", [1, 1 << 20])
def test_rows_are_found_by_index(tmp_path: Path, cache_bytes: int) -> None:
    codes = write_codes(tmp_path, [4, 1, 6])
    reader = CodesReader(str(tmp_path), cache_bytes=cache_bytes)
    index = np.array([10, 0, 4, 4, 3])
    assert len(reader) == 11
    assert np.array_equal(reader.codes(index), codes[index])
    assert reader.column(index, "caption_short") == [f"short {i}" for i in index]
    with pytest.raises(IndexError):
        reader.codes([11])


def test_memory_stays_within_the_cache(tmp_path: Path) -> None:
    write_codes(tmp_path, [50] * 8)
    reader = CodesReader(str(tmp_path), cache_bytes=6000)
    reader.codes(np.arange(400))
    assert 0 < reader._files.used <= 6000


def test_codes_of_another_tokenizer_are_refused_naming_both(tmp_path: Path) -> None:
    write_codes(tmp_path, [2], tokenizer_hash="a" * 64)
    CodesReader(str(tmp_path), tokenizer_hash="a" * 64)
    with pytest.raises(UserError, match=r"tokenizer a{12}, expected b{12}"):
        CodesReader(str(tmp_path), tokenizer_hash="b" * 64)


def test_unfinished_and_damaged_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a finished folder of codes"):
        CodesReader(str(tmp_path))
    write_codes(tmp_path, [3])
    write_codes_file(str(tmp_path / "0.parquet"), [])
    with pytest.raises(UserError, match=r"0 rows, expected 3 by the manifest"):
        CodesReader(str(tmp_path)).codes([0])
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest of codes"):
        CodesReader(str(tmp_path))
    with pytest.raises(UserError, match="packed codes of 3 bytes"):
        unpack_codes([b"abc"], TOKENS, BITS)
