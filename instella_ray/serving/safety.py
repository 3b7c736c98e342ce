"""An optional look at every image before it leaves: an ONNX model gives a score, above a threshold it is withheld."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from pydantic import Field

from ..config import Config
from ..models.open_nsfw import PACKAGED, load_open_nsfw


class Flagged(Exception):
    """The safety checker withholds this image. The message gives the score and the threshold."""


class SafetyConfig(Config):
    """Which model looks at the images, and what it may find."""

    model: str = PACKAGED
    """ONNX file, or ``package:module/file`` within an installed package: a graph with Open-NSFW's input (Caffe's BGR
    means, 224 px) and two outputs, the second being the score."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Withhold images that score this much or more; Yahoo calls scores under 0.2 safe and over 0.8 unsafe."""


Checker = Callable[[np.ndarray], None]
"""Looks at one image, uint8 ``[H, W, 3]``; raises :class:`Flagged`. Called from several threads at once."""


def load_checker(cfg: SafetyConfig) -> Checker:
    """The checker of ``cfg``; UserError where the extra ``safety`` or the model file is missing."""
    classifier = load_open_nsfw(cfg.model, asker="safety", extra="safety")

    def check(image: np.ndarray) -> None:
        score = classifier.score(Image.fromarray(image))
        # Written so that a score that is not a number withholds the image.
        if not score < cfg.threshold:
            raise Flagged(f"withheld by the safety checker (score {score:.2f}, threshold {cfg.threshold:g})")

    return check
