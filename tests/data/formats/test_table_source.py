"""Tables as text: columns by name, images beside them and nowhere else, rows that keep their place however they are cut."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray import storage
from instella_ray.data.formats import columns
from instella_ray.data.formats.sources import find_images, find_inputs, read_blocks
from instella_ray.data.formats.table_source import read_table, scan_table
from instella_ray.errors import UserError

from ...kit.shards import image_bytes


def write(path: Path, text: str | bytes, *images: str) -> Path:
    """Write a table, and images of other contents under these names beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    for number, name in enumerate(images):
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_bytes(image_bytes(number))
    return path


def rows_of(pattern: Path | str, **options: Any) -> list[dict[str, Any]]:
    shards = find_inputs(str(pattern), **options).shards
    return [row for url, label in shards.items() for table in read_blocks(url, label, 3) for row in table.to_pylist()]


def facts(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str | None, str | None]]:
    """Keys, captions and problems; a key that a row has by its place starts with SHARD instead of the label."""
    return [(row["key"].replace(row["shard"], "SHARD"), row["caption"], row["problem"]) for row in rows]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("column", ["file_name", "image", "PATH", "filepath"])
def test_images_are_found_by_paths_beside_the_table(tmp_path: Path, name: str, column: str) -> None:
    records = [
        {column: "x/one.jpg", "caption": 'a "quoted", dog\nrunning', "width": 64},
        {column: "./two.v2.PNG", "caption": "Füße", "width": None},
        {column: "gone.jpg", "caption": "a cat"},
        {column: f"{tmp_path}/three.jpg", "caption": ""},
        {column: "", "caption": "a bird"},
    ]
    frame = pd.DataFrame(records)  # another writer than ours
    path = tmp_path / name
    if name == "a.jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="," if name == "a.csv" else "\t")
    write(path, path.read_bytes(), "x/one.jpg", "two.v2.PNG", "three.jpg")
    rows = rows_of(path)
    assert facts(rows) == [
        ("x/one", 'a "quoted", dog running', None),
        ("two%2Ev2", "Füße", None),
        ("gone", "a cat", "no_image"),
        ("three", None, "no_caption"),
        ("SHARD-0000004", "a bird", "no_image"),
    ]
    assert [row["image"] for row in rows] == [image_bytes(0), image_bytes(1), None, image_bytes(2), None]
    assert float(json.loads(rows[0]["meta"])["width"]) == 64 and json.loads(rows[1]["meta"]) == {
        "original_key": "two.v2"
    }


def test_paths_lead_nowhere_else(tmp_path: Path) -> None:
    write(tmp_path / "secret.jpg", image_bytes())
    paths = [
        "../secret.jpg",
        f"{tmp_path}/secret.jpg",
        "x/../../secret.jpg",
        "/etc/passwd",
        f"{tmp_path}/in/../secret.jpg",
    ]
    path = write(
        tmp_path / "in" / "a.csv", "file_name,id,caption\n" + "".join(f"{p},{i},c\n" for i, p in enumerate(paths))
    )
    rows = rows_of(path)
    assert [(row["key"], row["image"], row["problem"]) for row in rows] == [
        (str(i), None, "unsafe_name") for i in range(len(paths))
    ]


def test_what_is_no_image_or_no_record_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["file_name,caption", "a.jpg,one, two", "a.jpg,one", "a.jpg,again", "folder,c", "x\0y.jpg,c", "b.jpg/z,c"]
    lines += [f"{'n' * 400}.jpg,c", "", "http://a.org/b.jpg,c", f"{'w' * 200_000},c", "big.jpg,caf\udce9", "b.jpg,last"]
    text = "\ufeff" + "\r\n".join(lines)
    path = write(tmp_path / "a.csv", text.encode("utf-8", "surrogateescape"), "a.jpg", "b.jpg", "folder/c.jpg")
    monkeypatch.setattr("instella_ray.data.formats.files.MAX_IMAGE_BYTES", 5000)
    monkeypatch.setattr(columns, "MAX_IMAGE_BYTES", 5000)
    (tmp_path / "big.jpg").write_bytes(bytes(9000))
    assert [(row["caption"], row["problem"]) for row in rows_of(path)] == [
        (None, "bad_metadata"),
        ("one", None),
        ("again", "duplicate_key"),
        ("c", "no_image"),
        ("c", "no_image"),
        ("c", "no_image"),
        ("c", "no_image"),
        ("c", "no_image"),
        (None, "bad_metadata"),
        ("caf\ufffd", "oversized_member"),
        ("last", None),
    ]


def test_objects_of_one_file_need_not_be_alike(tmp_path: Path) -> None:
    lines = [
        '{"n": 1, "file_name": "a.jpg", "nested": {"x": 1}, "bbox": [1, 2]}',
        "[1]",
        '{"file_name": "b.jpg", "text": ["", "two"], "n": 0.5}',
        '{"file_name": "b.jpg", "text": 7}',
        '{"file_name": 7, "text": "c"}',
        "no JSON",
        '{"text": "c", "file_name": "c.jpg", "unseen": "x"}',
    ]
    path = write(tmp_path / "a.jsonl", "\n\n".join(lines), "a.jpg", "b.jpg", "c.jpg")
    rows = rows_of(path)
    assert facts(rows)[:5] == [
        ("a", None, "no_caption"),
        ("", None, "bad_metadata"),
        ("b", "two", None),
        ("b", None, "duplicate_key"),
        ("SHARD-0000004", "c", "no_image"),
    ]
    assert facts(rows)[5:] == [("", None, "bad_metadata"), ("c", "c", None)]
    assert [json.loads(row["meta"]) for row in (rows[0], rows[2])] == [{"n": 1}, {"n": 0.5}]


def test_links_wait_for_their_download(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "URL\tTEXT\tpunsafe\nhttp://a/0.jpg\tone\t0.5\n\ttwo\t\n")
    inputs = find_inputs(str(path), rows_per_shard=1)
    assert list(inputs.links) == list(inputs.shards) and len(inputs.links) == 2
    rows = rows_of(path)
    assert facts(rows) == [("SHARD-0000000", "one", None), ("SHARD-0000001", "two", "no_image")]
    assert json.loads(rows[0]["meta"]) == {"url": "http://a/0.jpg", "punsafe": "0.5"}
    with pytest.raises(UserError, match=r"a\.tsv: links without images; curate first"):
        find_images(str(path))
    numbers = write(tmp_path / "n.jsonl", '{"url": "http://a", "text": "c"}\n{"url": 7, "text": "c"}\n')
    assert [row["problem"] for row in rows_of(numbers)] == [None, "no_image"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no column with images or links to them; expected file_name, image, path, filepath with paths"),
        ("a.csv", "file_name;caption\n", "found file_name;caption"),
        ("a.csv", "file_name,title\n", "no column with captions; expected caption, .*; found file_name, title"),
        ("a.jsonl", "{}\n", "found none"),
        ("a.jsonl", '{"file_name": 1, "caption": "c"}\n', "no column with images"),
    ],
)
def test_missing_columns_are_one_line_before_anything_starts(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        find_inputs(str(write(tmp_path / name, text)))


def test_a_table_without_rows_is_counted(tmp_path: Path) -> None:
    assert [row["problem"] for row in rows_of(write(tmp_path / "a.csv", "file_name,caption\n"))] == ["empty_shard"]


def test_tables_lie_in_stores_too() -> None:
    storage.write_text("memory://box/in/a.csv", "file_name,caption\nx/a.jpg,one\nmemory://box/in/x/a.jpg,two\n")
    storage.write_bytes("memory://box/in/x/a.jpg", image_bytes())
    rows = rows_of("memory://box/in/*.csv")
    assert facts(rows) == [("x/a", "one", None), ("x/a", "two", "duplicate_key")]
    assert rows[0]["image"] == image_bytes()
    storage.remove_tree("memory://box")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=12), st.integers(1, 5), st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_a_table_cut_into_shards_has_the_same_rows(records: list[tuple[str, str]], size: int, ending: str) -> None:
    text, url = io.StringIO(), f"/box/a{ending}"
    if ending == ".jsonl":
        text.writelines(json.dumps({"url": a, "caption": b}) + "\n" for a, b in [("first", "row"), *records])
    else:
        delimiter = "," if ending == ".csv" else "\t"
        csv.writer(text, delimiter=delimiter).writerows([("url", "caption"), ("first", "row"), *records])
    data = text.getvalue().encode()
    whole = list(read_table(io.BytesIO(data), "x", url))
    scan = scan_table(io.BytesIO(data), url, size)
    rows = [row for start, end in pairwise(scan.marks) for row in read_table(io.BytesIO(data), "x", url, start, end)]
    same = ("caption", "meta", "image", "problem")
    assert [[row[name] for name in same] for row in rows] == [[row[name] for name in same] for row in whole]
    assert len(scan.marks) - 1 == -(-len(whole) // size)
    if ending == ".jsonl":
        # A printed NaN is what writers leave for no caption.
        captions = ["" if b.strip() in ("nan", "NaN") else " ".join(b.split()) for _, b in records]
        assert [row["caption"] or "" for row in whole[1:]] == captions
