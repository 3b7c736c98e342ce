"""Parquet shards: images or links, columns by name, and damage costs no more than it must."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats import columns
from instella_ray.data.formats.parquet_source import read_footer, read_parquet
from instella_ray.errors import UserError

from ...kit.shards import image_bytes


def file(columns: dict[str, Any], **write: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **write)
    return buffer.getvalue()


def rows(data: bytes, first: int = 0, end: int | None = None) -> list[dict[str, Any]]:
    return list(read_parquet(io.BytesIO(data), "shard", "x.parquet", first, end))


LAION = {
    "URL": ["http://a/0.jpg", "http://a/1.jpg", None],
    "TEXT": ["a dog", None, "a cat"],
    "WIDTH": [640, None, 10],
    "HEIGHT": pa.array([480.0, math.nan, 10.0]),
    "pwatermark": [0.25, math.nan, None],
    "PUNSAFE": [0.5, math.inf, 0.0],
    "Similarity": [0.5, 0.25, 0.125],
    "hash": [2**62, 1, 2],
    "LANGUAGE": ["en", "de", None],
}


def test_laion_metadata_gives_rows_that_wait_for_their_images() -> None:
    found = rows(file(LAION))
    assert [row["problem"] for row in found] == [None, "no_caption", "no_image"]
    assert all(row["image"] is None for row in found)
    assert [row["key"] for row in found] == ["shard-0000000", "shard-0000001", "shard-0000002"]
    assert json.loads(found[0]["meta"]) == {
        "url": "http://a/0.jpg", "width": 640, "height": 480, "pwatermark": 0.25, "punsafe": 0.5, "similarity": 0.5,
        "hash": 2**62, "LANGUAGE": "en",
    }  # fmt: skip
    assert json.loads(found[1]["meta"]) == {"url": "http://a/1.jpg", "similarity": 0.25, "hash": 1, "LANGUAGE": "de"}


IMAGES = [image_bytes(0), image_bytes(1)]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": IMAGES},
        {"JPG": pa.array(IMAGES, pa.large_binary())},
        {"image_bytes": pa.array(IMAGES, pa.binary_view())},
        {"image": [{"bytes": data, "path": "a.jpg"} for data in IMAGES]},
        {"image": ["a.jpg", "b.jpg"], "png": IMAGES},  # the first holds names
        {"jpg": IMAGES, "url": ["http://a", "http://b"]},
    ],
)
@pytest.mark.parametrize("text", ["caption", "TEXT", "txt", "prompt"])
def test_images_and_captions_are_found_by_column_names(columns: dict[str, Any], text: str) -> None:
    found = rows(file({**columns, text: ["one", "two"], "__key__": ["a", "b"]}))
    assert [(row["key"], row["image"], row["caption"], row["problem"]) for row in found] == [
        ("a", IMAGES[0], "one", None),
        ("b", IMAGES[1], "two", None),
    ]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_of_every_type_is_read_and_cleaned(kind: pa.DataType) -> None:
    data = file({"url": ["http://a", "http://b"], "text": pa.array(["x\0 y\n z", None]).cast(kind)})
    assert [row["caption"] for row in rows(data)] == ["x y z", None]


def test_text_that_is_no_utf8_is_read_as_far_as_it_is() -> None:
    bad = pa.array([b"caf\xe9", b"\xff"], pa.binary()).view(pa.string())
    found = rows(file({"url": bad, "text": bad, "key": bad, "note": bad}))
    assert [row["caption"] for row in found] == ["caf\u00e9", None]
    assert [row["problem"] for row in found] == [None, "bad_caption"]
    assert [row["key"] for row in found] == ["caf%E9", "%FF"]
    about = {"url": "caf\u00e9", "note": "caf\u00e9", "original_key": "caf\\xe9"}
    assert json.loads(found[0]["meta"]) == about


def test_bad_keys_and_images_cost_their_rows() -> None:
    keys = ["a", "a", "../b", "/c", "x/../d", "photo.jpg", None, "e"]
    images = [b"1", b"2", b"3", b"4", b"5", b"6", b"", None]
    found = rows(file({"id": keys, "image": pa.array(images, pa.binary()), "caption": ["c"] * len(keys)}))
    problems = [None, "duplicate_key", *[None] * 5, "no_image"]
    assert [row["problem"] for row in found] == problems
    assert [row["row"] for row in found] == list(range(len(keys)))
    # An id is no path, and in a tar a key ends at its first dot.
    safe = ["%2E%2E/b", "%2Fc", "x/%2E%2E/d", "photo%2Ejpg", "shard-0000006"]
    assert [row["key"] for row in found[2:7]] == safe
    assert [json.loads(row["meta"]).get("original_key") for row in found[2:7]] == [*keys[2:6], None]


def test_number_keys_and_every_kind_of_number_are_read() -> None:
    columns = {"image": [b"1"], "caption": ["c"], "id": [7], "half": pa.array([0.5], pa.float16()), "yes": [True]}
    (row,) = rows(file({**columns, "list": [[1]], "raw": [b"x"], "none": pa.nulls(1)}))
    assert row["key"] == "7" and json.loads(row["meta"]) == {"half": 0.5, "yes": True}


def test_an_image_beyond_all_measure_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_IMAGE_BYTES", 10)
    (row,) = rows(file({"image": [bytes(11)], "caption": ["c"]}))
    assert (row["problem"], row["image"]) == ("oversized_member", None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"TEXT": ["a"], "size": [1]}, r"x\.parquet: no column with images or links.*image, .*url.*found TEXT, size"),
        (
            {"URL": ["http://a"]},
            r"x\.parquet: no column with captions; expected caption, caption_long, text.*found URL",
        ),
        ({"image": ["a.jpg"], "caption": ["a"]}, "no column with images"),
        ({}, "found none"),
    ],
)
def test_missing_columns_are_named_with_those_that_there_are(columns: dict[str, Any], message: str) -> None:
    data = file(columns)
    with pytest.raises(UserError, match=message):
        rows(data)
    with pytest.raises(UserError, match=message):
        read_footer(io.BytesIO(data), "x.parquet")


def test_pickled_columns_are_not_touched() -> None:
    from ray.data.extensions import ArrowPythonObjectType  # unpickles whatever it is asked for

    exploding = pa.ExtensionArray.from_storage(
        ArrowPythonObjectType(), pa.array([b"cos\nabort\n(tR."], pa.large_binary())
    )
    (row,) = rows(file({"image": [b"1"], "caption": ["c"], "key": exploding, "note": exploding}))
    assert row["key"] == "shard-0000000" and row["meta"] == "{}"
    with pytest.raises(UserError, match="no column with images"):
        rows(file({"image": exploding, "caption": ["c"]}))


# --- damage


MANY = file({"image": [b"%d" % i * 50 for i in range(40)], "caption": ["c"] * 40}, row_group_size=10)


def test_files_without_rows_and_of_other_formats_are_reported() -> None:
    empty = file({"url": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    assert [row["problem"] for row in rows(empty)] == ["empty_shard"]
    for data in (b"", b"PAR1", b"<html>gone</html>", MANY[: len(MANY) // 2]):
        assert [(row["row"], row["problem"]) for row in rows(data)] == [(0, "truncated_shard")]
        assert read_footer(io.BytesIO(data), "x.parquet") is None


def test_a_damaged_row_group_costs_the_rest_of_its_file() -> None:
    metadata = pq.ParquetFile(io.BytesIO(MANY)).metadata
    start = metadata.row_group(2).column(0).dictionary_page_offset or metadata.row_group(2).column(0).data_page_offset
    found = rows(MANY[:start] + bytes(40) + MANY[start + 40 :])
    assert [row["row"] for row in found] == list(range(21))
    assert [row["problem"] for row in found] == [None] * 20 + ["truncated_shard"]


@given(st.lists(st.tuples(st.integers(0, len(MANY) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_stop_a_run(flips: list[tuple[int, int]]) -> None:
    data = bytearray(MANY)
    for place, value in flips:
        data[place] = value
    try:
        found = rows(bytes(data))
    except UserError:
        return  # a column's name was hit
    assert found and [row["row"] for row in found] == list(range(len(found)))


def test_errors_of_the_storage_are_not_taken_for_damage() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise PermissionError(13, "not yours")

    with pytest.raises(PermissionError):
        list(read_parquet(Broken(MANY), "shard", "x.parquet"))
    with pytest.raises(PermissionError):
        read_footer(Broken(MANY), "x.parquet")


# --- part of a file


@given(st.integers(0, 45), st.integers(0, 45))
def test_any_stretch_of_rows_can_be_read_alone(first: int, end: int) -> None:
    found = rows(MANY, first, end)
    expected = [b"%d" % i * 50 for i in range(40)][first:end]
    if expected:
        assert [row["image"] for row in found] == expected
        assert [row["row"] for row in found] == list(range(len(expected)))
    else:
        assert [row["problem"] for row in found] == ["empty_shard"]


def test_real_metadata(shared_dir: Path) -> None:
    path = shared_dir / "data" / "emoji3d" / "laion_metadata.parquet"
    if not path.exists():
        pytest.skip("the emoji3d metadata is not here")
    found = rows(path.read_bytes())
    assert len(found) == 1601 and {row["problem"] for row in found} == {None}
    assert set(json.loads(found[0]["meta"])) == {
        "url", "width", "height", "pwatermark", "punsafe", "similarity", "hash"
    }  # fmt: skip


def test_captions_may_be_lists_or_bytes_of_which_one_is_not_utf8(tmp_path: Path) -> None:
    lists = pa.array([["", "caf\u00e9"], ["a dog", "b"], []], pa.list_(pa.string()))
    broken = pa.ListArray.from_arrays(
        lists.offsets, pa.Array.from_buffers(pa.string(), 4, pa.array([b"", b"caf\xe9", b"a dog", b"b"]).buffers())
    )
    for captions in (lists, broken, pa.array([b"caf\xe9", b"a dog", b""])):
        pq.write_table(pa.table({"jpg": [b"1", b"2", b"3"], "TEXT": captions}), tmp_path / "a.parquet")
        with open(tmp_path / "a.parquet", "rb") as stream:
            rows = list(read_parquet(stream, "a", "a.parquet"))
        assert [row["caption"] for row in rows][1:] == ["a dog", None] and rows[0]["caption"].startswith("caf")
        assert [row["problem"] for row in rows] == [None, None, "no_caption"]
