"""Tars: what is written can be read, the same samples give the same bytes, and damage costs no more than it must."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.shards import write_tar, write_webdataset
from instella_ray.data.formats.sources import require_captions
from instella_ray.data.formats.tar_source import read_samples
from instella_ray.errors import UserError

from ...kit.shards import HOSTILE, image_bytes, sample, tar_bytes


def rows(data: bytes) -> list[dict[str, Any]]:
    return list(read_samples(io.BytesIO(data), "shard"))


def test_written_samples_are_read_back(tmp_path: Path) -> None:
    samples = [(f"{i:03d}", image_bytes(i), f"caption {i}", {"n": i}) for i in range(5)]
    written = list(write_webdataset(samples, str(tmp_path / "out"), 2))
    assert [(Path(url).name, count) for url, count in written] == [("00000.tar", 2), ("00001.tar", 2), ("00002.tar", 1)]
    found = [row for url in find_shards(str(tmp_path / "out")) for row in rows(Path(url).read_bytes())]
    assert [(r["key"], r["image"], r["caption"]) for r in found] == [s[:3] for s in samples]
    assert [r["problem"] for r in found] == [None] * 5


def test_same_samples_give_same_bytes(tmp_path: Path) -> None:
    samples = [("a", image_bytes(1), "caption", {"b": 1, "a": 2})]
    urls = [str(tmp_path / name) for name in ("one.tar", "two.tar")]
    assert [write_tar(url, samples) for url in urls] == [1, 1]
    assert Path(urls[0]).read_bytes() == Path(urls[1]).read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Any:
        yield ("a", image_bytes(1), "caption", {})
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_tar(str(tmp_path / "x.tar"), failing())
    assert list(tmp_path.iterdir()) == []


def test_one_bad_member_costs_one_row() -> None:
    found = rows(tar_bytes([member for members, _ in HOSTILE.values() for member in members]))
    assert [row["row"] for row in found] == list(range(len(HOSTILE)))
    read_time = {"no_caption", "no_image", "bad_metadata", "duplicate_key", "unsafe_name"}
    expected = [reason if (reason := v.partition(":")[2]) in read_time else None for _, v in HOSTILE.values()]
    assert [row["problem"] for row in found] == expected


def test_captions_are_one_clean_line_and_may_come_from_the_metadata() -> None:
    by_json = [("b.jpg", image_bytes()), ("b.json", b'{"caption": "from json"}')]
    found = rows(tar_bytes([*sample("a", caption="x\0 y\n z"), *by_json]))
    assert [row["caption"] for row in found] == ["x y z", "from json"]


@given(st.integers(0, 100))
def test_a_tar_cut_anywhere_gives_its_first_samples_and_one_report(percent: int) -> None:
    whole = tar_bytes([member for i in range(4) for member in sample(f"{i}", i)])
    found = rows(whole[: len(whole) * percent // 100])
    good = [row for row in found if not row["problem"]]
    assert [row["key"] for row in good] == [str(i) for i in range(len(good))]
    lost = [row["problem"] for row in found if row["problem"]]
    # What is cut away after the end marker is only padding.
    assert lost == ["truncated_shard"] or (len(good) == 4 and lost == [])


def test_a_cut_between_two_members_is_noticed() -> None:
    member = tar_bytes(sample("a"))[: 512 * 2 + len(image_bytes()) // 512 * 512]
    assert rows(member)[-1]["problem"] == "truncated_shard"


def test_a_shard_without_members_is_reported() -> None:
    assert [row["problem"] for row in rows(tar_bytes([]))] == ["empty_shard"]


def test_shards_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for name in ("a/0.tar", "b/0.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(tar_bytes(sample("x")))
    assert [label[:4] for label in find_shards(f"{tmp_path}/*/*.tar").values()] == ["a__0", "b__0"]


def test_missing_shards_and_captions_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.tar: no shard found"):
        find_shards(str(tmp_path / "nothing.tar"))
    (tmp_path / "mute.tar").write_bytes(tar_bytes([("a.jpg", image_bytes()), ("b.jpg", image_bytes(1))]))
    with pytest.raises(UserError, match=r"mute\.tar: shard without captions"):
        require_captions([str(tmp_path / "mute.tar")])
