"""Folders of images in an evaluation: every file is measured or counted, captions are those of other jobs."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instella_ray.errors import UserError, path_problem
from instella_ray.evaluation.evaluate import EvaluateConfig
from instella_ray.evaluation.inputs import EvaluationInputs
from instella_ray.evaluation.units import find_image_set

from ..kit.image_folders import art, read_images, write_images
from ..kit.shards import image_bytes

# --- everything is measured, or counted under a reason


def test_other_endings_are_read_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, sub = tmp_path / "mix", tmp_path / "mix" / "sub"
    sub.mkdir(parents=True)
    kinds = {
        "a.TIFF": "TIFF",
        "b.bmp": "BMP",
        "c.jfif": "JPEG",
        "d.JPE": "JPEG",
        "sub/e.avif": "AVIF",
        "sub/f.gif": "GIF",
    }
    for name, kind in kinds.items():
        art(1).save(folder / name, kind)
    art(2).save(folder / "wrong.png", "JPEG")
    for name in ("x.heic", "y.HEIC", "sub/z.svg", "noending", ".hidden.png", "__MACOSX/._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"?")
    far = write_images(tmp_path / "far", range(3))
    (folder / "more").symlink_to(far)
    (folder / "circle").symlink_to(folder)
    (sub / "one.png").symlink_to(far / "1.png")
    (sub / "dead.png").symlink_to(far / "none.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (sub / "folder.png").symlink_to(far)
    found, quarantined = read_images(folder)
    assert sorted(name.partition("/")[2] for name in found) == sorted([*"abcd", "sub/e", "sub/f", "sub/one", "wrong"])
    assert quarantined == {"no_image": 3}
    with caplog.at_level(logging.WARNING):
        inputs = EvaluationInputs(EvaluateConfig(output=str(tmp_path / "o"), images=str(folder)))
    assert inputs.left_out == {".heic": 2, ".svg": 1, "linked folder": 2, "no ending": 1}
    assert "mix: not read: 2 .heic, 1 .svg, 2 linked folder, 1 no ending" in caplog.text


def test_images_beside_shards_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, range(2))
    pq.write_table(pa.table({"image": [image_bytes(0)]}), tmp_path / "0.parquet")
    found = find_image_set(str(tmp_path), 10)
    assert len(found.units) == 1 and found.left_out == {".png": 2}


def test_files_without_permission_are_counted_and_folders_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "in", range(3))
    write_images(folder / "sub", range(3, 5))
    opened, scanned = LocalFileSystem.open, os.scandir

    def open_file(self: LocalFileSystem, path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("/1.png"):
            raise PermissionError(13, "Permission denied", path)
        return opened(self, path, *args, **options)

    def scandir(path: str) -> Any:
        if str(path).rstrip("/").endswith("/sub"):
            raise PermissionError(13, "Permission denied", path)
        return scanned(path)

    monkeypatch.setattr(LocalFileSystem, "open", open_file)
    found, quarantined = read_images(folder)
    assert len(found) == 4 and quarantined == {"no_image": 1}
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError) as denied:
        find_image_set(str(folder), 10)
    assert path_problem(denied.value) == f"{folder}/sub/: permission denied"


NAMES = st.sampled_from(["a", "b.c", "ü", "x y", "p#1", "q?", "r%41", "s%", "[t]", "u{1,2}", "v,w", "__w__"])
FOLDERS = st.sampled_from(["", "in/", "in/deep/", "__MACOSX/", "other #2/"])
CONTENTS = st.sampled_from(
    ["png", "jpg", "JPEG", "tif", "heic", "txt", "json", "broken.png", "empty.jpg", "db", "link.png"]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.tuples(FOLDERS, NAMES, CONTENTS), min_size=1, max_size=14), st.sampled_from([1, 3, 100]))
def test_every_file_is_measured_or_counted(
    tmp_path_factory: pytest.TempPathFactory, files: set[tuple[str, str, str]], rows_per_unit: int
) -> None:
    """In = measured + not measured + not read + captions and metadata of images, in any cut."""
    root = tmp_path_factory.mktemp("made up")
    good = {ending: image_bytes(0, kind=kind) for ending, kind in (("png", "PNG"), ("jpg", "JPEG"), ("tif", "TIFF"))}
    images_in, stems = 0, Counter[str]()
    beside: set[str] = set()
    for folder, name, content in files:
        stem, ending = f"{folder}{name}", content.rpartition(".")[2]
        path = root / f"{stem}.{ending}" if "." not in content else root / f"{stem}-{content}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "link.png":
            path.symlink_to(root / "nowhere.png")
        else:
            path.write_bytes(good.get(ending.lower().replace("jpeg", "jpg"), b"{}") if "." not in content else b"")
        if ending.lower() in ("png", "jpg", "jpeg", "tif"):
            images_in += 1
            stems[str(path).rpartition(".")[0]] += 1
        elif ending in ("txt", "json"):
            beside.add(str(path).rpartition(".")[0])
    if not images_in:
        with pytest.raises(UserError, match="no images found"):
            find_image_set(str(root), rows_per_unit)
    else:
        found, quarantined = read_images(root, rows_per_unit)
        alone = len(beside - set(stems))
        assert len(found) + quarantined.total() == images_in + alone
        assert quarantined["no_image"] == alone + sum(content == "link.png" for _, _, content in files)
        left_out = find_image_set(str(root), rows_per_unit).left_out
        assert left_out == {f".{e}": n for e in ("heic", "db") if (n := sum(c == e for _, _, c in files))}
        assert (found, quarantined) == read_images(root, 100)
    shutil.rmtree(root)


def test_two_folders_of_one_name_and_one_name_with_two_endings(tmp_path: Path) -> None:
    one, two = (
        write_images(tmp_path / "train" / "images", range(3)),
        write_images(tmp_path / "test" / "images", range(2)),
    )
    for ending in ("jpg", "BMP"):
        art(9).save(one / f"0.{ending}")
    found, quarantined = read_images(f"{one},{two}", 2)
    assert len(found) == 7 and not quarantined
    assert sorted(name.partition("/")[2] for name in found) == ["0", "0", "0.2", "0.3", "1", "1", "2"]
    link = tmp_path / "link"
    link.symlink_to(one)
    for pattern, names in ((f"{one},{one.parent}", "train"), (f"{one},{link}", "link")):
        with pytest.raises(UserError, match=rf"{names}.* and .*images.* measured twice$"):
            find_image_set(pattern, 10)
    assert len(read_images(f"{one},{one}")[0]) == 5


# --- captions


def test_captions_are_read_as_by_other_jobs(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", range(10))
    (folder / "0.txt").write_bytes("\ufeffa red cat\r\n".encode())
    (folder / "1.txt").write_bytes("\ufeffein Bär".encode("utf-16"))
    (folder / "2.json").write_text('{"caption": ["a dog", "the dog"]}')
    (folder / "3.json").write_text('{"caption": null, "text": "a bird"}')
    (folder / "4.json").write_text('{"caption": NaN}')
    (folder / "5.caption").write_text("['a fox', 'one fox']")
    (folder / "6.json").write_text('{"caption": 7}')
    table = "file_name,caption\r\n7.png,a wolf\r\n8.png,\r\n"
    (folder / "metadata.csv").write_bytes(("\ufeff" + table).encode())
    expected = {"0": "a red cat", "1": "ein Bär", "2": "a dog", "3": "a bird", "5": "a fox", "7": "a wolf"}
    for rows in (1, 100):
        found, quarantined = read_images(folder, rows, captions=True)
        assert {name.rpartition("/")[2]: caption for name, caption in found.items()} == expected
        assert quarantined == {"no_caption": 3, "bad_caption": 1}
        everything, none = read_images(folder, rows)
        assert len(everything) == 10 and not none


def test_captions_of_tables_and_parquet_files(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", range(5))
    captions = [["a cat", "the cat sits"], None, ["", "a dog"], [], ["one bird"]]
    columns = {"image": [{"bytes": (folder / f"{i}.png").read_bytes()} for i in range(5)], "caption": captions}
    pq.write_table(pa.table(columns), tmp_path / "flickr.parquet")
    rows = [{"file_name": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    (folder / "coco.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    for source in (tmp_path / "flickr.parquet", folder / "coco.jsonl"):
        for rows_per_unit in (2, 100):
            found, quarantined = read_images(source, rows_per_unit, captions=True)
            assert [found[name] for name in sorted(found)] == ["a cat", "a dog", "one bird"]
            assert quarantined == {"no_caption": 2}
            assert found == read_images(source, 100, captions=True)[0]


def test_a_table_without_captions_is_measured_and_an_image_that_comes_twice_is_counted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", range(4))
    (folder / "metadata.csv").write_text("file_name,width\n0.png,1\n1.png,1\n0.png,1\ngone.png,1\n")
    for rows in (1, 2, 100):
        found, quarantined = read_images(folder, rows)
        assert len(found) == 4 and quarantined == {"duplicate_key": 1, "no_image": 1}


def test_an_image_that_two_tables_have_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", range(2))
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    (folder / "more.csv").write_text("file_name,text\n1.png,a\n")
    assert len(read_images(folder)[0]) == 2
    with pytest.raises(UserError, match=r"more\.csv and a folder: both have 1\.png, which would be measured twice"):
        find_image_set(f"{folder},{folder}/more.csv", 10)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "b"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl and .*metadata\.csv: both have 0\.png"):
        find_image_set(str(folder), 10)


def test_captions_that_only_later_images_have_are_found(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", range(6))
    (folder / "5.txt").write_text("a red circle")
    inputs = EvaluationInputs(EvaluateConfig(output=str(tmp_path / "o"), images=str(folder), rows_per_unit=1))
    assert "prompts" in inputs.offers
