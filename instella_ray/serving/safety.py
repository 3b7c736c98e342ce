"""Optional safety checker: an ONNX model scores each image, and images at or above a threshold are withheld."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from pydantic import Field

from ..config import Config, InputPath
from ..models.open_nsfw import PACKAGED, load_open_nsfw


class Flagged(Exception):
    """Raised for an image that the safety checker withholds; the message contains score and threshold."""


class SafetyConfig(Config):
    """Model and threshold of the safety checker."""

    model: InputPath = PACKAGED
    """ONNX file, or ``package:module/file`` within an installed package: a graph with Open-NSFW's input (Caffe's BGR
    means, 224 px) and two outputs, the second being the score."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Lowest score of withheld images; Yahoo calls scores under 0.2 safe and over 0.8 unsafe."""


Checker = Callable[[np.ndarray], None]
"""Checks one image, uint8 ``[H, W, 3]``; raises :class:`Flagged`. Must be thread-safe."""


def load_checker(cfg: SafetyConfig) -> Checker:
    """Load the checker of ``cfg``; raises UserError if the extra ``safety`` or the model file is missing."""
    classifier = load_open_nsfw(cfg.model, asker="safety", extra="safety")

    def check(image: np.ndarray) -> None:
        score = classifier.score(Image.fromarray(image))
        # Not ``score >= threshold``, so that a NaN score withholds the image.
        if not score < cfg.threshold:
            raise Flagged(f"withheld by the safety checker (score {score:.2f}, threshold {cfg.threshold:g})")

    return check
