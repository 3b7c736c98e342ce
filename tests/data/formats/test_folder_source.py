"""Folders of images: captions beside them or in a table, every file accounted for, shards that other files leave alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray import storage
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.formats.folder_source import FolderShard, folder_shards
from instella_ray.data.formats.images import IMAGE_ENDINGS, decode_rgb
from instella_ray.data.formats.names import split_extension
from instella_ray.data.formats.sources import find_inputs, list_inputs, read_blocks, read_rows, require_captions
from instella_ray.errors import UserError

from ...kit.shards import HOSTILE, image_bytes

Files = dict[str, bytes | str]


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def rows_of(pattern: Path | str, **options: Any) -> list[dict[str, Any]]:
    shards = find_inputs(str(pattern), **options).shards
    return [row for url, label in shards.items() for table in read_blocks(url, label, 3) for row in table.to_pylist()]


def readable(label: str) -> str:
    """A label without its hash."""
    found = re.fullmatch(r"(.+)-[0-9a-f]{12}((?:__.+)?)", label)
    assert found
    return found[1] + found[2]


def problems(rows: list[dict[str, Any]]) -> dict[str, str | None]:
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row["problem"] for row in rows}


# --- captions


def test_captions_lie_beside_their_images(tmp_path: Path) -> None:
    pixels = {name: image_bytes(i) for i, name in enumerate("abcdefg")}
    write(
        tmp_path,
        {
            "a.jpg": pixels["a"], "a.txt": "\ufefftwo\nlines",
            "b.JPEG": pixels["b"], "b.CAPTION": "a bird",
            "sub/c.v2.jpg": pixels["c"], "sub/c.v2.json": '{"text": "a cat", "width": 64}',
            "sub/deep/d.png": pixels["d"], "sub/deep/d.txt": " ", "sub/deep/d.json": '{"caption_long": "a dog"}',
            "e.jpg": pixels["e"], "f.jpg": pixels["f"], "f.txt": "fish", "f.json": "{no JSON",
            "g.jpg": pixels["g"], "g.json": '{"caption": 7}', "sub/gone.txt": "a cow", "notes.md": "nothing",
        },
    )  # fmt: skip
    rows = rows_of(tmp_path)
    assert problems(rows) == {
        "a": None,
        "b": None,
        "e": "no_caption",
        "f": "bad_metadata",
        "g": "bad_caption",
        "sub/c%2Ev2": None,
        "sub/gone": "no_image",
        "sub/deep/d": None,
    }
    captions = {row["key"]: row["caption"] for row in rows if row["problem"] is None}
    assert captions == {"a": "two lines", "b": "a bird", "sub/c%2Ev2": "a cat", "sub/deep/d": "a dog"}
    assert {row["key"]: row["image"] for row in rows}["sub/c%2Ev2"] == pixels["c"]
    assert json.loads(next(row["meta"] for row in rows if row["key"] == "sub/c%2Ev2"))["width"] == 64
    labels = find_inputs(str(tmp_path)).shards.values()
    here = tmp_path.name
    assert list(map(readable, labels)) == [f"{tmp_path.parent.name}__{here}", f"{here}__sub", "sub__deep"]


def test_images_of_every_kind_are_read_in_any_case(tmp_path: Path) -> None:
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF"}
    for number, ending in enumerate(IMAGE_ENDINGS):
        data = image_bytes(number, kind=kinds.get(ending, ending.upper()))
        write(tmp_path, {f"{number:02}.{ending.upper()}": data, f"{number:02}.txt": ending})
    rows = rows_of(tmp_path)
    assert [row["caption"] for row in rows] == list(IMAGE_ENDINGS)
    assert all(decode_rgb(row["image"]).size == (64, 48) for row in rows)


def test_a_table_describes_the_images_of_its_folder_and_below(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "metadata.csv": "file_name,text\na.jpg,one\ntrain/b.jpg,two\ntrain/gone.jpg,three\n"
            "nowhere/c.jpg,four\n../d.jpg,five\n",
            "a.jpg": image_bytes(0), "a.txt": "not asked",
            "train/b.jpg": image_bytes(1), "train/extra.jpg": image_bytes(2), "train/own.jpg": image_bytes(3),
            "train/own.txt": "its own", "train/b.webp": image_bytes(4),
            "test/metadata.jsonl": '{"file_name": "e.jpg", "text": "six"}\n', "test/e.jpg": image_bytes(5),
        },
    )  # fmt: skip
    rows = rows_of(tmp_path)
    found = [
        (readable(row["shard"]).removeprefix(tmp_path.name), row["key"], row["caption"], row["problem"]) for row in rows
    ]
    assert sorted(found) == [
        ("__metadata", "%2E%2E/d", "five", "unsafe_name"),
        ("__metadata", "a", "one", None),
        ("__metadata", "nowhere/c", "four", "no_image"),
        ("__metadata", "train/b", "two", None),
        ("__metadata", "train/gone", "three", "no_image"),
        ("__train", "train/b", None, "no_caption"),
        ("__train", "train/extra", None, "no_caption"),
        ("__train", "train/own", "its own", None),
        ("test__metadata", "e", "six", None),
    ]
    assert [row["row"] for row in rows_of(tmp_path, rows_per_shard=2)[:3]] == [0, 1, 0]


def test_two_images_of_one_name_are_two_samples(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": image_bytes(0), "a.png": image_bytes(1), "a.txt": "c", "a_b.jpg": b"", "a.b.jpg": b""})
    rows = rows_of(tmp_path, files_per_shard=1)
    assert Counter((row["key"], row["problem"]) for row in rows) == {
        ("a", None): 1,
        ("a", "duplicate_key"): 1,
        ("a_b", "no_caption"): 1,
        ("a%2Eb", "no_caption"): 1,
    }


def test_hidden_files_links_and_what_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: Files = {
        "._a.jpg": "x",
        ".cache/b.jpg": "x",
        "a.jpg": image_bytes(0),
        "a.txt": "c",
        "big.txt": "c",
        "t.jpg": "x",
    }
    write(tmp_path / "in", {**files, "big.jpg": bytes(9000), "t.txt": "word " * 2000})
    write(tmp_path / "far", {"e.jpg": image_bytes(1)})
    os.symlink(tmp_path / "far" / "e.jpg", tmp_path / "in" / "link.jpg")
    os.symlink(tmp_path / "in", tmp_path / "in" / "circle")
    os.symlink(tmp_path / "nowhere", tmp_path / "in" / "dead.jpg")
    monkeypatch.setattr("instella_ray.data.formats.files.MAX_IMAGE_BYTES", 5000)
    monkeypatch.setattr("instella_ray.data.formats.folder_source.MAX_IMAGE_BYTES", 5000)
    assert problems(rows_of(tmp_path / "in")) == {
        "a": None,
        "big": "oversized_member",
        "dead": "no_image",
        "link": "no_caption",
        "t": "oversized_member",
    }


# --- what a pattern means


def test_folders_stores_and_files_may_be_mixed(tmp_path: Path) -> None:
    for folder in ("x/train", "y/train"):
        write(tmp_path / folder, {"a.jpg": image_bytes(0), "a.txt": folder})
    write(tmp_path, {"t.csv": "file_name,text\nx/train/a.jpg,table\n"})
    storage.write_bytes("memory://box/far/a.jpg", image_bytes(0))
    storage.write_text("memory://box/far/a.txt", "far")
    rows = rows_of(f"{tmp_path}/x/train/, {tmp_path}/y/train,{tmp_path}/*.csv")
    assert [(readable(row["shard"]), row["caption"]) for row in rows] == [
        (f"{tmp_path.name}__t", "table"),
        ("x__train", "x/train"),
        ("y__train", "y/train"),
    ]
    assert [(readable(row["shard"]), row["caption"]) for row in rows_of("memory://box/far")] == [("box__far", "far")]
    table = find_inputs(f"{tmp_path}/t.csv").shards
    assert (
        table.items() <= find_inputs((f"{tmp_path}/x/train", f"{tmp_path}/t.csv", f"{tmp_path}/*.csv")).shards.items()
    )
    names = {entry.url.removeprefix(f"{tmp_path}/"): entry.bytes for entry in list_inputs(f"{tmp_path}/x/train")}
    assert names == {"x/train/a.jpg": len(image_bytes(0)), "x/train/a.txt": 7}
    storage.remove_tree("memory://box")


def test_tars_and_parquet_files_come_before_images(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": image_bytes(0), "a.txt": "c", "b.tar": b""})
    assert list(map(readable, find_inputs(str(tmp_path)).shards.values())) == [f"{tmp_path.name}__b"]


@pytest.mark.parametrize(
    ("files", "part", "message"),
    [
        ({}, "gone", "gone: no shard found; expected WebDataset tars, .parquet, .csv, .tsv or .jsonl files, or a folder of"),
        ({"in/x.md": "x"}, "in", "in: no images found; expected tars, parquet files, or a folder of jpg"),
        ({"in/x.txt": "x"}, "in", "in: no images found"),
        ({"in/x.jpg": "x"}, "in/x.jpg", "x.jpg: no shard found"),
        ({"in/x.jpg": "x", "in/metadata.csv": "name,text\n"}, "in", r"in/metadata\.csv: no column with images"),
        ({"in/x.jpg": "x", "in/settings.json": "{}"}, "in", "in: unfinished output of a data job"),
    ],
)  # fmt: skip
def test_what_is_no_input_is_one_line(tmp_path: Path, files: Files, part: str, message: str) -> None:
    write(tmp_path, files)
    with pytest.raises(UserError, match=message):
        find_inputs(str(tmp_path / part))


def test_captions_are_required(tmp_path: Path) -> None:
    write(tmp_path, {"x/a.jpg": image_bytes(0), "x/b.txt": "a caption without image"})
    with pytest.raises(UserError, match=r": shard without captions; expected NAME\.txt, .* or metadata\.jsonl$"):
        require_captions(list(find_inputs(str(write(tmp_path / "y", {"a.jpg": image_bytes(0)}))).shards))


# --- shards


def test_files_elsewhere_leave_a_shard_alone(tmp_path: Path) -> None:
    cats = {f"cats/{i}.jpg": image_bytes(i) for i in range(9)}
    write(tmp_path, cats)
    before = find_inputs(str(tmp_path), files_per_shard=4).shards
    assert list(map(readable, before.values())) == [f"{tmp_path.name}__cats__0000{part}-of-00003" for part in range(3)]
    write(tmp_path, {"dogs/1.jpg": image_bytes(0), "0.jpg": image_bytes(1), "cats/old/1.jpg": image_bytes(2)})
    after = find_inputs(str(tmp_path), files_per_shard=4).shards
    assert before.items() <= after.items()
    keys = [row["key"] for url, label in before.items() for row in read_rows(url, label)]
    assert sorted(keys) == sorted(name.removesuffix(".jpg") for name in cats)


def test_a_job_goes_on_after_files_came_elsewhere_and_not_after_its_shards_were_divided_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**changes: Any) -> dict[str, Any]:
        filters = {"resolution": {"target_size": 64}, "duplicates": None}
        cfg = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "local": True, "filters": filters}
        return run_curate(CurateConfig(**cfg, **changes)).to_json()

    def add(folder: str, count: int) -> None:
        for i in range(count):
            write(tmp_path / "in" / folder, {f"{count}{i}.jpg": image_bytes(i), f"{count}{i}.txt": "an image"})

    add("cats", 3)
    assert run()["in"] == 3
    add("dogs", 4)
    assert run(mode="resume")["in"] == 7 and run(mode="fresh")["in"] == 7
    add("cats", 2)
    monkeypatch.setitem(find_inputs.__kwdefaults__, "rows_per_shard", 9)
    monkeypatch.setitem(find_inputs.__kwdefaults__, "files_per_shard", 4)
    with pytest.raises(UserError, match=r"made from .*/in#folder=cats,0/1, which the input no longer has"):
        run(mode="resume")
    assert run(mode="fresh")["in"] == 9


def test_the_output_of_a_job_inside_its_folder_of_images_is_no_input(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": image_bytes(0), "a.txt": "an image", "sub/b.jpg": image_bytes(1), "sub/b.txt": "another"})
    before = find_inputs(str(tmp_path)).shards
    out = str(tmp_path / "out")
    filters = {"resolution": {"target_size": 64}, "duplicates": None}

    def run(**changes: Any) -> dict[str, Any]:
        return run_curate(
            CurateConfig(input=str(tmp_path), output=out, local=True, filters=filters, **changes)
        ).to_json()

    assert run()["kept"] == run(mode="resume")["kept"] == run(mode="fresh")["kept"] == 2
    write(tmp_path / "out", {"images/c.jpg": image_bytes(2)})
    (tmp_path / "link").symlink_to(tmp_path)
    assert find_inputs(str(tmp_path), output=f"{tmp_path}/link/out").shards == before
    assert not any("/out/" in entry.url for entry in list_inputs(str(tmp_path), output=out))
    with pytest.raises(UserError, match="no images found"):
        find_inputs(f"{tmp_path}/out/images", output=out)


def test_a_folder_or_a_table_that_is_gone_when_its_turn_comes_is_a_lost_shard(tmp_path: Path) -> None:
    write(tmp_path, {"in/a.jpg": image_bytes(0), "in/a.txt": "a", "t.csv": "file_name,text\nin/a.jpg,a\n"})
    write(tmp_path, {"shards.json": '{"shards": [{"url": "t.csv", "bytes": 1}, {"url": "gone.csv", "bytes": 1}]}'})
    shards = find_inputs(f"{tmp_path}/in,{tmp_path}/shards.json").shards
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "t.csv").unlink()
    rows = [row for url, label in shards.items() for row in read_rows(url, label)]
    assert [row["problem"] for row in rows] == ["lost_shard"] * 3


NAME = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=6).filter(lambda name: name[0] != ".")
FOLDER = st.lists(NAME, max_size=3).map("/".join)


@given(st.dictionaries(FOLDER, st.lists(NAME, min_size=1, max_size=6)), st.integers(1, 4), FOLDER, NAME)
def test_a_label_is_that_of_its_folder_and_names_a_file(
    names: dict[str, list[str]], size: int, folder: str, name: str
) -> None:
    files = {"/".join(filter(None, (where, f"{each}.jpg"))) for where, inside in names.items() for each in inside}
    shards = folder_shards("/data", sorted(files), (), size)
    labels = {shard: shard.label for shard in shards}
    assert len(set(labels.values())) == len(labels)
    # Every file is in one shard, and a shard is what its URL says.
    for stem in {split_extension(file)[0] for file in files}:
        here = [shard for shard in shards if shard.folder == stem.rpartition("/")[0]]
        assert sum(shard.holds(stem) for shard in here) == 1
    assert all(FolderShard.parse(shard.url) == shard for shard in shards)
    for label in labels.values():
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,135}", label)
    # A new file elsewhere changes nothing.
    if folder not in names:
        more = folder_shards("/data", sorted(files | {"/".join(filter(None, (folder, f"{name}.jpg")))}), (), size)
        assert labels.items() <= {shard: shard.label for shard in more}.items()


@settings(deadline=None, max_examples=30)
@given(st.sets(NAME.filter(lambda name: not name.endswith((" ", "."))), min_size=1, max_size=5), st.integers(1, 3))
def test_any_name_is_read(names: set[str], size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            write(Path(folder), {os.fsdecode(f"{name}.jpg".encode("utf-8", "surrogatepass")): image_bytes(0)})
        shards = find_inputs(folder, files_per_shard=size).shards
        rows = [row for url, label in shards.items() for row in read_rows(url, label) if row["key"]]
        assert len(rows) == len(names) and all(row["image"] == image_bytes(0) for row in rows)
        assert {row["problem"] for row in rows} <= {"no_caption", "duplicate_key"}


# --- other writers and readers


def test_a_tar_of_webdataset_and_what_it_holds_give_the_same_rows(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(7):
            meta = {"width": i, "text": "of no use"}
            writer.write({"__key__": f"sub{i % 2}/{i:03d}", "jpg": image_bytes(i), "txt": f"image {i}", "json": meta})
        writer.write({"__key__": "sub0/mute", "png": image_bytes(8, kind="PNG")})
        writer.write({"__key__": "sub0/text", "txt": "alone"})
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "a", filter="data")
    same = ("key", "image", "caption", "meta", "problem")
    rows = [sorted([row[name] or b"" for name in same] for row in rows_of(tmp_path / end)) for end in ("a.tar", "a")]
    assert rows[0] == rows[1] and len(rows[0]) == 9


def test_hostile_files_cost_their_samples_as_in_tars(tmp_path: Path) -> None:
    members = [member for name in HOSTILE if name not in ("again", "escape") for member in HOSTILE[name][0]]
    write(tmp_path / "in", dict(members))
    cfg = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "abort": {"quarantined": 1}, "local": True}
    ledger = run_curate(CurateConfig(**cfg, filters={"resolution": {"target_size": 64}}))
    verdicts = Counter(verdict for name, (_, verdict) in HOSTILE.items() if name not in ("again", "escape"))
    found = ledger.to_json()
    assert found["kept"] == verdicts.pop("kept")
    others = {f"{kind}:{k}": n for kind in ("dropped", "quarantined") for k, n in found[kind].items()}
    assert others == verdicts
