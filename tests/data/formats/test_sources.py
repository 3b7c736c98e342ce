"""Sources: what a pattern or a list of shards means, and rows that keep their shard and number whatever holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instella_ray import cli, storage
from instella_ray.data.formats import sources
from instella_ray.data.formats.names import (
    ShardEntry,
    find_shards,
    list_shards,
    part_entries,
    read_shard_list,
    refuse_twins,
    write_shard_list,
)
from instella_ray.data.formats.parts import PARTS, Part, PartFolder
from instella_ray.data.formats.patterns import shard_label
from instella_ray.data.formats.sources import SUFFIXES, find_inputs, read_blocks, require_captions
from instella_ray.errors import UserError

from ...kit.shards import image_bytes, sample, tar_bytes


def write_images(path: Path, count: int, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    base = {"image": [image_bytes(i) for i in range(count)], "caption": [f"caption {i}" for i in range(count)]}
    pq.write_table(pa.table({**base, **columns}), path)
    return path


def write_links(path: Path, count: int) -> Path:
    pq.write_table(pa.table({"URL": [f"http://a/{i}" for i in range(count)], "TEXT": ["c"] * count}), path)
    return path


def write_samples(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes([member for i in range(count) for member in sample(f"{path.stem}{i}", i)]))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    write_samples(tmp_path / "in" / "a.tar", 3)
    write_images(tmp_path / "in" / "b.parquet", 5)
    write_links(tmp_path / "in" / "c.parquet", 2)
    return tmp_path / "in"


# --- patterns


def test_a_pattern_may_name_both_kinds_and_what_has_to_be_downloaded_is_known(mixed: Path) -> None:
    inputs = find_inputs(f"{mixed}/*")
    urls = [str(mixed / name) for name in ("a.tar", "b.parquet", "c.parquet")]
    assert inputs.shards == {url: shard_label(url) for url in urls}
    assert inputs.links == (str(mixed / "c.parquet"),)


def test_a_folder_with_both_kinds_means_its_tars(mixed: Path) -> None:
    assert list(find_inputs(str(mixed)).shards) == [str(mixed / "a.tar")]
    (mixed / "a.tar").unlink()
    assert list(find_inputs(str(mixed)).shards) == [str(mixed / "b.parquet"), str(mixed / "c.parquet")]
    with pytest.raises(UserError, match=r"in: no shard found; expected WebDataset tars, for example"):
        find_shards(str(mixed))


def test_metadata_beside_a_tar_is_not_read_as_further_samples(mixed: Path) -> None:
    write_links(mixed / "a.parquet", 3)
    assert list(find_inputs(f"{mixed}/a.*").shards) == [str(mixed / "a.tar")]


def test_a_large_file_is_read_as_several_shards(mixed: Path) -> None:
    inputs = find_inputs(f"{mixed}/*.parquet", rows_per_shard=2)
    b, c = (shard_label(str(mixed / name)) for name in ("b.parquet", "c.parquet"))
    assert list(inputs.shards.values()) == [f"{b}__000000000", f"{b}__000000002", f"{b}__000000004", c]
    rows = [row for url, label in inputs.shards.items() for t in read_blocks(url, label, 9) for row in t.to_pylist()]
    assert [(row["shard"], row["row"], row["last"]) for row in rows[:5]] == [
        (f"{b}__000000000", 0, False),
        (f"{b}__000000000", 1, True),
        (f"{b}__000000002", 0, False),
        (f"{b}__000000002", 1, True),
        (f"{b}__000000004", 0, True),
    ]
    assert [row["caption"] for row in rows[:5]] == [f"caption {i}" for i in range(5)]
    assert len({row["key"] for row in rows}) == len(rows)
    assert inputs.links == (str(mixed / "c.parquet"),)
    assert len(find_inputs(f"{mixed}/c.parquet", rows_per_shard=1).links) == 2


def test_two_shards_of_one_label_are_refused() -> None:
    refuse_twins(["a", "b"])
    with pytest.raises(UserError, match="two shards would both be called 'b'"):
        refuse_twins(["a", "b", "b"])


def test_stores_may_be_mixed(mixed: Path) -> None:
    storage.write_bytes("memory://box/x/far.tar", tar_bytes(sample("far")))
    inputs = find_inputs(f"memory://box/x/*.tar,{mixed}/a.tar")
    found = {label: next(read_blocks(url, label, 1))["key"][0].as_py() for url, label in inputs.shards.items()}
    assert {label.rpartition("-")[0]: key for label, key in found.items()} == {"in__a": "a0", "x__far": "far"}
    storage.remove_tree("memory://box")


def test_a_file_without_the_columns_is_a_user_error_before_anything_starts(mixed: Path) -> None:
    pq.write_table(pa.table({"size": [1]}), mixed / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet: no column with images .* found size"):
        find_inputs(f"{mixed}/*")


# --- rows


def test_every_shard_counts_from_0_and_ends_with_its_last_row_whatever_is_wrong_with_it(mixed: Path) -> None:
    (mixed / "d.parquet").write_bytes(b"")
    (mixed / "e.parquet").write_bytes((mixed / "b.parquet").read_bytes()[:-20])
    (mixed / "f.tar").write_bytes((mixed / "a.tar").read_bytes()[:2000])
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), mixed / "g.parquet"
    )
    for url, label in find_inputs(f"{mixed}/*").shards.items():
        found = list(read_blocks(url, label, 2))
        assert all(table.num_rows <= 2 for table in found)
        rows = pa.concat_tables(found).to_pylist()
        assert {row["shard"] for row in rows} == {label}
        assert [row["row"] for row in rows] == list(range(len(rows)))
        assert [row["last"] for row in rows] == [False] * (len(rows) - 1) + [True]
    problems = {label: rows_of(mixed / name)[-1]["problem"] for name in ("d.parquet", "f.tar") for label in name[0]}
    assert problems == {"d": "truncated_shard", "f": "truncated_shard"}
    assert [rows_of(mixed / f"{name}.parquet")[0]["problem"] for name in "eg"] == ["truncated_shard", "empty_shard"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for table in read_blocks(str(path), "x", 100) for row in table.to_pylist()]


def test_names_and_metadata_that_are_no_text_cost_no_more_than_their_row(tmp_path: Path) -> None:
    half = json.dumps({"caption": "\ud83d"}).encode()
    members = [
        ("a.jpg", image_bytes()),
        ("a.json", half),
        *sample("b"),
        *sample("c", caption="\U0001f600", x="\U0001f600"),
    ]
    data = tar_bytes(members).replace(b"b.jpg", b"\xff.jpg", 1)
    (tmp_path / "x.tar").write_bytes(_with_checksum(data, b"\xff.jpg"))
    rows = rows_of(tmp_path / "x.tar")
    assert [(row["key"], row["problem"]) for row in rows] == [
        ("a", "no_caption"),
        ("%FF", "no_caption"),
        ("b", "no_image"),
        ("c", None),
    ]


def _with_checksum(tar: bytes, name: bytes) -> bytes:
    """The header of member ``name`` made right again after a change."""
    data, start = bytearray(tar), tar.index(name)
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def test_captions_are_required_of_both_kinds(tmp_path: Path, mixed: Path) -> None:
    mute = write_images(tmp_path / "mute" / "a.parquet", 2, caption=pa.array([None, ""], pa.string()))
    with pytest.raises(UserError, match=r"a\.parquet: shard without captions; expected text in the caption column"):
        require_captions([str(mute)])
    numbers = tmp_path / "numbers.tar"
    numbers.write_bytes(tar_bytes([("a.jpg", image_bytes()), ("a.json", b'{"caption": 7}')]))
    with pytest.raises(UserError, match=r"numbers\.tar: shard without captions"):
        require_captions([str(numbers)])
    require_captions([str(mute), str(mixed / "c.parquet")])
    require_captions([str(mixed / "a.tar")])


# --- lists of shards


def test_a_list_stands_for_its_shards_and_for_its_folder(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = find_inputs(f"{mixed}/*")
    total = sum(path.stat().st_size for path in mixed.iterdir())
    assert cli.main(["shards", f"{mixed}/*", "--output", f"{mixed}/shards.json"]) == 0
    assert capsys.readouterr().out == f"{mixed}/shards.json: 3 shards, {total} bytes\n"
    assert json.loads((mixed / "shards.json").read_text())["shards"][0] == {
        "url": "a.tar",
        "bytes": (mixed / "a.tar").stat().st_size,
    }
    for pattern in (f"{mixed}/shards.json", str(mixed)):
        assert find_inputs(pattern) == everything
        assert list(find_shards(pattern)) == [str(mixed / "a.tar")]


def test_a_list_elsewhere_names_its_shards_in_full_and_one_that_moves_with_them_stays_true(
    tmp_path: Path, mixed: Path
) -> None:
    elsewhere = tmp_path / "lists" / "mine.json"
    list_shards(str(mixed), str(elsewhere), SUFFIXES)
    assert list(find_shards(str(elsewhere))) == [str(mixed / "a.tar")]
    list_shards(f"{mixed}/*", f"{mixed}/shards.json", SUFFIXES)
    mixed.rename(tmp_path / "moved")
    assert list(find_shards(str(tmp_path / "moved"))) == [str(tmp_path / "moved" / "a.tar")]


def test_a_listed_bucket_is_not_listed_again(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_shards(f"{mixed}/*", f"{mixed}/shards.json", SUFFIXES)

    def listed(pattern: str) -> dict[str, int]:
        raise AssertionError(f"{pattern} was listed")

    monkeypatch.setattr(storage, "sizes", listed)
    assert len(find_inputs(f"{mixed}/shards.json").shards) == len(find_inputs(str(mixed)).shards) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"x\.json: not a list of shards"),
        ("{", r"x\.json: not a list of shards \(Invalid JSON"),
        ('{"shards": [{"url": "a.tar"}]}', r"not a list of shards \(shards\.0\.bytes: Field required\)"),
        ('{"shards": [{"url": "a.txt", "bytes": 1}]}', r"x\.json: no shard found"),
    ],
)
def test_what_is_no_list_of_shards_is_a_user_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        find_inputs(str(tmp_path / "x.json"))


def test_a_list_without_its_ending_is_refused(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"list: expected a name that ends with \.json"):
        list_shards(str(mixed), str(tmp_path / "list"), SUFFIXES)
    assert not (tmp_path / "list").exists()


def test_a_job_lists_its_own_output(mixed: Path) -> None:
    ledger: dict[str, Any] = {"in": 3, "kept": 3, "dropped": {}, "quarantined": {}}
    part = Part(shard="a", first_row=0, rows=3, last=True, file="a.tar", records=3, ledger=ledger)
    nothing = part.model_copy(update={"shard": "n", "file": None, "records": 0})
    entries = part_entries(str(mixed), [part, nothing])
    size = (mixed / "a.tar").stat().st_size
    assert entries == [ShardEntry(url="a.tar", bytes=size, rows=3)]
    write_shard_list(str(mixed), entries)
    assert read_shard_list(str(mixed / "shards.json")) == [ShardEntry(url=str(mixed / "a.tar"), bytes=size, rows=3)]


def test_many_parts_are_read_in_their_order(tmp_path: Path) -> None:
    ledger: dict[str, Any] = {"in": 1, "kept": 1, "dropped": {}, "quarantined": {}}
    parts = [
        Part(shard=f"{i % 7}", first_row=i // 7, rows=1, last=i >= 2093, file=None, records=0, ledger=ledger)
        for i in range(2100)
    ]
    for part in parts:
        path = tmp_path / PARTS / f"{part.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(part.model_dump_json())
    folder = PartFolder(str(tmp_path))
    assert folder.parts() == sorted(parts, key=lambda part: (part.shard, part.first_row))
    assert folder.close("0123456").kept == 2100


def test_links_are_refused_however_a_file_is_split(tmp_path: Path) -> None:
    write_links(tmp_path / "a.parquet", sources.ROWS_PER_SHARD + 1)
    with pytest.raises(UserError, match=r"a\.parquet#rows=0-100000: links without images; curate first"):
        sources.find_images(str(tmp_path))
