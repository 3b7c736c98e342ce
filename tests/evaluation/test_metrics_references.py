"""Statistics from elsewhere are read sparingly and checked before any work; too few images and cut captions are told of."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instella_ray.data.formats.shards import write_tar
from instella_ray.data.scenes import scene_rows
from instella_ray.errors import UserError
from instella_ray.evaluation import feature_settings
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics.features import Features
from instella_ray.evaluation.metrics.frechet import Gaussian
from instella_ray.evaluation.references import References
from instella_ray.models.clip import load_clip

from ..kit.evaluation import numbers

MEAN, COVARIANCE = np.arange(4.0), np.diag([1.0, 2.0, 0.0, 3.0])


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


# --- files of statistics


def test_statistics_of_other_tools_are_read(tmp_path: Path) -> None:
    """ADM's (with its images and spatial statistics, which are not read), clean-fid's, float32 and Fortran order."""
    rotated = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    full = rotated @ COVARIANCE @ rotated.T
    for arrays in (
        {"mu": MEAN, "sigma": full},
        {
            "arr_0": np.zeros((9, 2, 2, 3), np.uint8),
            "mu": MEAN,
            "sigma": full,
            "mu_s": np.zeros(7),
            "sigma_s": np.eye(7),
        },
        {"mu": MEAN.astype(np.float32), "sigma": np.asfortranarray(full.astype(np.float32))},
    ):
        found = Gaussian.load(saved(tmp_path / "stats.npz", **arrays), width=4)
        np.testing.assert_allclose(found.covariance, full, atol=1e-6)
        assert found.mean.tolist() == MEAN.tolist() and found.count is None and found.covariance.flags.c_contiguous
    whole = Gaussian(MEAN, full, 50)
    for name in ("a.npz", "b.npz"):
        whole.save(str(tmp_path / name), **({"features": np.zeros((3, 4))} if name == "b.npz" else {}))
    a, b = (Gaussian.load(str(tmp_path / name)) for name in ("a.npz", "b.npz"))
    assert a.count == b.count == 50 and a.sha256 == b.sha256  # the same statistics, whatever lies beside them


def test_further_arrays_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "batch.npz", arr_0=np.zeros(1000, np.uint8), mu=MEAN, sigma=COVARIANCE)
    opened: list[str] = []
    original = zipfile.ZipFile.open

    def spied(self: zipfile.ZipFile, name: Any, *args: Any, **options: Any) -> Any:
        opened.append(name if isinstance(name, str) else name.filename)
        return original(self, name, *args, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", spied)
    Gaussian.load(path)
    assert set(opened) == {"mu.npy", "sigma.npy"}


def cut(path: Path) -> None:
    data = Path(saved(path, mu=MEAN, sigma=COVARIANCE)).read_bytes()
    path.write_bytes(data[: len(data) // 3])


def flipped(path: Path) -> None:
    data = bytearray(Path(saved(path, mu=np.arange(400.0), sigma=np.eye(400))).read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def one_array(path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, MEAN)
    path.write_bytes(buffer.getvalue())


NAN = np.where(np.eye(4) > 0, np.nan, 0)
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "width": (lambda p: saved(p, mu=np.zeros(5), sigma=np.eye(5)), "statistics of 5 features, the network has 4"),
    "NaN": (lambda p: saved(p, mu=MEAN, sigma=NAN), "sigma has NaN or infinite values"),
    "infinite": (lambda p: saved(p, mu=MEAN / 0, sigma=COVARIANCE), "mu has NaN or infinite values"),
    "shape": (lambda p: saved(p, mu=MEAN[None], sigma=COVARIANCE), r"mu has shape \[1, 4\]"),
    "not square": (lambda p: saved(p, mu=MEAN, sigma=COVARIANCE[:3]), r"sigma \[3, 4\]"),
    "not symmetric": (lambda p: saved(p, mu=MEAN, sigma=np.triu(np.ones((4, 4)))), "sigma is not symmetric"),
    "negative": (lambda p: saved(p, mu=MEAN, sigma=-np.eye(4)), "negative eigenvalues"),
    "objects": (lambda p: saved(p, mu=np.array([{}], object), sigma=COVARIANCE), "no arrays of numbers"),
    "text": (lambda p: saved(p, mu=np.array(["a"] * 4), sigma=COVARIANCE), "mu is of type <U1"),
    "complex": (lambda p: saved(p, mu=MEAN, sigma=COVARIANCE * 1j), "sigma is of type complex128"),
    "spatial": (lambda p: saved(p, mu_s=MEAN, sigma_s=COVARIANCE), r"there is mu_s, sigma_s"),
    "empty": (lambda p: saved(p, mu=np.zeros(0), sigma=np.zeros((0, 0))), "mu is empty"),
    "count": (lambda p: saved(p, mu=MEAN, sigma=COVARIANCE, count=-3), "count is no number of images"),
    "cut": (cut, "cut, damaged"),
    "damaged": (flipped, "cut, damaged"),
    "one array": (one_array, "a single array"),
    "no bytes": (lambda p: p.write_bytes(b""), "cut, damaged"),
    "a page": (lambda p: p.write_bytes(b"<html>404</html>"), "cut, damaged"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_files_that_are_no_such_statistics_are_named_in_one_line(case: str, tmp_path: Path) -> None:
    write, said = FOREIGN[case]
    write(tmp_path / "stats.npz")
    with pytest.raises(UserError, match=rf"stats\.npz: .*{said}") as caught:
        Gaussian.load(str(tmp_path / "stats.npz"), width=4)
    assert "\n" not in str(caught.value)


def test_references_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    write_tar(str(tmp_path / "a" / "0.tar"), scene_rows(2, 1, 32))
    saved(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.save(tmp_path / "features.npy", np.zeros((3, 1280)))
    for name, said in (("inception.npz", "2048 features, the network has 1280"), ("features.npy", "expected images")):
        options = {"network": "efficientnet_lite0", "reference": str(tmp_path / name)}
        metrics = MetricsConfig.model_validate({"fid": options})
        with pytest.raises(UserError, match=rf"{name}: .*{said}"):
            run_evaluate(
                EvaluateConfig(images=str(tmp_path / "a"), output=str(tmp_path / "out"), local=True, metrics=metrics)
            )
        assert not (tmp_path / "out").exists()


def test_a_folder_of_images_may_be_named_like_a_file_of_statistics(tmp_path: Path) -> None:
    (tmp_path / "images.npz").mkdir()
    options = {"network": "efficientnet_lite0", "reference": str(tmp_path / "images.npz")}
    sections = MetricsConfig.model_validate({"fid": options}).sections()
    (gathering,) = References(sections, str(tmp_path / "out")).gatherings
    assert gathering.source == options["reference"] and list(gathering.sections) == ["fid"]


# --- cautions


def test_too_few_images_for_a_distance_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def network(weights: str | None, *, device: str) -> Features:
        return Features("rows", "test", None, None, lambda images: images[:, 0, :10].reshape(len(images), -1) / 255)

    monkeypatch.setattr(feature_settings, "efficientnet_lite0", network)
    for name, seed, count in (("a", 1, 12), ("b", 2, 40)):
        write_tar(str(tmp_path / name / "0.tar"), scene_rows(count, seed, 32))
    options = {"network": "efficientnet_lite0", "reference": str(tmp_path / "b"), "images": {"size": 32}}
    metrics = MetricsConfig.model_validate({"fid": options})
    with caplog.at_level(logging.WARNING):
        run_evaluate(
            EvaluateConfig(images=str(tmp_path / "a"), size=32, output=str(tmp_path / "o"), local=True, metrics=metrics)
        )
    found = numbers(tmp_path / "o")[""]["fid"]
    few, reference = found["cautions"]
    assert "too few images: 12, fewer than the 30 features" in few and "kid" in few
    assert "few reference images: 40, expected 150 or more for 30 features" in reference
    assert found["low"] is None  # twelve images have no interval that covers
    assert all(caution in caplog.text for caution in found["cautions"])
    before, _, _ = (tmp_path / "o" / "report.html").read_text().partition("<details")
    assert few in before and reference in before


def png_rows(captions: list[str]) -> pa.Table:
    images = [image for _, image, _, _ in scene_rows(len(captions), 1, 32)]
    return pa.table({"image": images, "caption": captions})


def test_captions_that_the_text_model_cuts_are_counted(
    tmp_path: Path, tiny_clip: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    long = "a market with " + ", ".join(f"{i} apples" for i in range(60))
    pq.write_table(png_rows([long, "a cat", f"{long} at night", "a dog"]), tmp_path / "long.parquet")
    clip = dict(zip(("model", "weights"), tiny_clip, strict=True))
    metrics = MetricsConfig.model_validate({"clip_score": {**clip, "images": {"size": 48}}})
    given = {"images": str(tmp_path / "long.parquet"), "local": True, "rows_per_unit": 3, "metrics": metrics}
    with caplog.at_level(logging.WARNING):
        run_evaluate(EvaluateConfig(output=str(tmp_path / "o"), **given))
    found = numbers(tmp_path / "o")[""]["clip_score"]
    assert found["settings"]["truncated_prompts"] == 2 and found["settings"]["text_limit"] == 77
    said = "2 of 4 prompts were cut to the text model's 77 tokens"
    assert found["cautions"] == [said] and caplog.text.count(said) == 1
    assert said.replace("'", "&#39;") in (tmp_path / "o" / "report.html").read_text().partition("<details")[0]


def test_a_text_of_just_the_limit_is_whole(tiny_clip: tuple[str, str]) -> None:
    clip = load_clip(*tiny_clip, asker="metric clip_score", extra="eval")
    texts = [" ".join(["cat"] * count) for count in (1, 75, 76, 200)]
    assert clip.is_cut(texts) == [False, False, True, True] and clip.is_cut([]) == []
