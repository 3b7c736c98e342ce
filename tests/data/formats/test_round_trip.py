"""What is written is read back one for one: by this package, by tarfile and by webdataset, whatever the ids are."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instella_ray.data.formats.parquet_source import read_parquet
from instella_ray.data.formats.shards import write_samples
from instella_ray.data.formats.tar_index import read_index, scan_index
from instella_ray.data.formats.tar_source import count_samples, read_samples

from ...kit.hostile import IDS, NAMES
from ...kit.shards import image_bytes, tar_bytes

IMAGE = image_bytes()
Content = dict[str, tuple[bytes, str]]
"""Key -> image and caption."""


def of_rows(rows: list[dict[str, Any]]) -> Content:
    assert [row["problem"] for row in rows] == [None] * len(rows)
    found = {row["key"]: (row["image"], row["caption"]) for row in rows}
    assert len(found) == len(rows)
    return found


def of_this_package(path: Path) -> Content:
    with path.open("rb") as stream:
        rows = list(read_samples(stream, "shard"))
        assert count_samples(stream, "shard") == len(rows)
    assert read_index(str(path), captions=True).equals(scan_index(str(path)))
    return of_rows(rows)


def of_tarfile(path: Path) -> Content:
    files: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            key, _, extension = base.partition(".")
            content = tar.extractfile(member)
            assert content is not None and extension not in files.get(folder + slash + key, {})
            files.setdefault(folder + slash + key, {})[extension] = content.read()
    return {key: (file["jpg"], file["txt"].decode()) for key, file in files.items()}


def of_webdataset(path: Path) -> Content:
    found = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert len({sample["__key__"] for sample in found}) == len(found)
    return {sample["__key__"]: (sample["jpg"], sample["txt"].decode()) for sample in found}


def written_and_read(rows: list[dict[str, Any]]) -> None:
    expected = of_rows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        assert write_samples(str(path), rows) == len(rows)
        assert of_this_package(path) == of_tarfile(path) == of_webdataset(path) == expected
        again = list(read_samples(io.BytesIO(path.read_bytes()), "shard"))
        assert write_samples(str(Path(folder, "b.tar")), again) == len(rows)
        assert Path(folder, "b.tar").read_bytes() == path.read_bytes()


@settings(max_examples=12, deadline=None)
@example(["/  "])
@given(st.lists(IDS, unique=True, min_size=1, max_size=6))
def test_ids_of_parquet_files(ids: list[str]) -> None:
    buffer = io.BytesIO()
    columns = {
        "id": ids,
        "image": [IMAGE + b"%d" % i for i in range(len(ids))],
        "caption": [f"c{i}" for i in range(len(ids))],
    }
    pq.write_table(pa.table(columns), buffer)
    rows = list(read_parquet(buffer, "shard", "x.parquet"))
    assert [row["caption"] for row in rows] == columns["caption"]
    assert [json.loads(row["meta"]).get("original_key", row["key"]) for row in rows] == ids
    written_and_read(rows)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=6), unique=True, min_size=1, max_size=6))
def test_ids_that_are_bytes(ids: list[bytes]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ids, "image": [IMAGE] * len(ids), "caption": ["c"] * len(ids)}), buffer)
    written_and_read(list(read_parquet(buffer, "shard", "x.parquet")))


@settings(max_examples=12, deadline=None)
@given(st.lists(NAMES, unique=True, min_size=1, max_size=6), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_names_of_tars(names: list[str], form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for number, name in enumerate(names):
            for extension, data in (("jpg", IMAGE + b"%d" % number), ("txt", b"caption %d" % number)):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = list(read_samples(io.BytesIO(buffer.getvalue()), "shard"))
    held = [m["data"] for row in rows for m in row["members"]] + [row["image"] for row in rows if row["image"]]
    captions = [row["caption"].encode() for row in rows if not row["problem"]]
    assert sorted(held + captions) == sorted(
        data for number in range(len(names)) for data in (IMAGE + b"%d" % number, b"caption %d" % number)
    )
    if good := [row for row in rows if not row["problem"]]:
        written_and_read(good)


def test_a_sample_with_a_new_caption_has_no_second_text_or_metadata(tmp_path: Path) -> None:
    members = [("a.jpg", IMAGE), ("a.txt", b"\xff\xd8\xff"), ("a.npy", b"features"), ("a.json", b"{}")]
    (row,) = read_samples(io.BytesIO(tar_bytes(members)), "shard")
    assert row["problem"] == "bad_caption"
    write_samples(str(tmp_path / "a.tar"), [{**row, "caption": "described"}])
    (again,) = read_samples(io.BytesIO((tmp_path / "a.tar").read_bytes()), "shard")
    assert (again["caption"], [m["extension"] for m in again["members"]]) == ("described", ["npy"])


def test_every_sample_can_be_extracted(tmp_path: Path) -> None:
    ids = [
        "http://site.com/page/",
        "/m/01g317",
        "plain",
        "x.y",
        "x_y",
        "a/b",
        "../up",
        "d" * 300,
        "d" * 299,
        "\u72ac" * 90,
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ids, "image": [IMAGE] * len(ids), "caption": ids}), buffer)
    write_samples(str(tmp_path / "a.tar"), read_parquet(buffer, "shard", "x.parquet"))
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert sorted(file.read_text() for file in (tmp_path / "out").rglob("*.txt")) == sorted(ids)


def test_further_members_of_a_sample_are_kept(tmp_path: Path) -> None:
    further = {"png": b"other", "seg.png": b"mask", "npy": b"features", "webp": b"third"}
    members = [("a.jpg", IMAGE), ("a.txt", b"a dog"), *((f"a.{e}", data) for e, data in further.items())]
    (row,) = read_samples(io.BytesIO(tar_bytes(members)), "shard")
    assert {member["extension"]: member["data"] for member in row["members"]} == further
    write_samples(str(tmp_path / "a.tar"), [row])
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = tar.getnames()
    assert names == ["a.jpg", "a.txt", "a.json", "a.other.png", "a.seg.png", "a.npy", "a.other.webp"]
    (again,) = read_samples(io.BytesIO((tmp_path / "a.tar").read_bytes()), "shard")
    assert (again["image"], again["caption"], again["problem"]) == (IMAGE, "a dog", None)
    assert [member["data"] for member in again["members"]] == list(further.values())
