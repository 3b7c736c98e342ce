"""NSFW filter of images by Open-NSFW, the model that the server's safety checker also uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from PIL import Image
from pydantic import Field

from ....config import InputPath
from ....models.open_nsfw import PACKAGE, PACKAGED, load_open_nsfw
from .base import Scale, ScoreLimits, Scorer, Scores
from .onnx import CPU, CUDA, OnnxFilter


class Nsfw(OnnxFilter):
    """Keeps images with an Open-NSFW score of at most ``maximum``. Detects nudity only; LAION's ``punsafe`` is separate."""

    scales: ClassVar[Mapping[str, Scale]] = {"nsfw": Scale(0, 1)}
    requires: ClassVar[tuple[str, ...]] = (*OnnxFilter.requires, PACKAGE)
    decode_size: ClassVar[int] = 512
    files: ClassVar[tuple[str, ...]] = ("model",)

    model: InputPath = PACKAGED
    """ONNX file, or ``package:module/file`` in an installed package, with the inputs and outputs of Open-NSFW."""
    maximum: float = Field(0.5, ge=0, le=1)
    """Maximum score; Yahoo calls scores below 0.2 safe and above 0.8 unsafe."""

    def check(self) -> None:
        super().check()
        self.load("cpu")  # 22 MB: cheaper than a failure on the actors

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {"nsfw": ("nsfw", ScoreLimits(maximum=self.maximum))}

    def load(self, device: str) -> Scorer:
        providers = [CUDA, CPU] if device == "cuda" else [CPU]
        classifier = load_open_nsfw(self.model, asker=self.label, extra="curate", providers=providers)

        def score(images: Sequence[Image.Image]) -> list[Scores]:
            return [{"nsfw": float(value)} for value in classifier.score_images(images)]

        return score
