"""Filter of images with dense or small text, detected by PP-OCRv4 in RapidOCR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from .base import LONGEST, Scale, ScoreLimits, Scorer, Scores, bounded
from .onnx import OnnxFilter

SIZE = 736
"""Shorter edge of the input of the text detector (px)."""
MIN_SIZE = 8
"""Minimum shorter edge of an image in which text is detected (px)."""
GRID = 512
"""Points per side of the grid on which the covered area is measured."""
Line = tuple[list[list[float]], str, float]
"""Detected line: its corners clockwise from the top left (px), its text, and the confidence."""


class Text(OnnxFilter):
    """Drops images with dense or small text (paper, B.1, which gives no limits: the defaults are this project's)."""

    scales: ClassVar[Mapping[str, Scale]] = {"text_density": Scale(0, 1), "text_size": Scale(0.005, 1, log=True)}
    requires: ClassVar[tuple[str, ...]] = (*OnnxFilter.requires, "rapidocr_onnxruntime")
    decode_size: ClassVar[int] = SIZE

    confidence: float = Field(0.7, ge=0, le=1)
    """Minimum confidence of a line of text.

    Faces and wheels are detected as ``00`` with 0.5 to 0.68, words with 0.9. Single letters never count, because round
    objects are often detected as one.
    """
    max_density: float = Field(0.25, ge=0, le=1)
    """Maximum share of the image covered by text."""
    min_text_size: float = Field(0.04, ge=0, le=1)
    """Minimum median height of the lines, relative to the shorter edge; boxes are slightly higher than the letters."""
    ignored_density: float = Field(0.02, ge=0, le=1)
    """Share of the image up to which small text is allowed, such as a signature or a date."""

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {
            "text_density": ("dense_text", ScoreLimits(maximum=self.max_density)),
            "text_size": ("small_text", ScoreLimits(minimum=self.min_text_size)),
        }

    def outside(self, scores: Scores) -> list[str]:
        found = super().outside(scores)
        return [name for name in found if name != "text_size" or scores["text_density"] > self.ignored_density]

    def load(self, device: str) -> Scorer:
        from rapidocr_onnxruntime import RapidOCR

        # Images are already bounded; a lower limit of the package would shrink long images further.
        settings = {"text_score": self.confidence, "max_side_len": LONGEST * SIZE}
        on_gpu = {f"{part}_use_cuda": device == "cuda" for part in ("det", "cls", "rec")}
        ocr = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1, **settings, **on_gpu)
        return lambda images: [_scores(ocr, image) for image in images]


def _scores(ocr: Any, image: Image.Image) -> Scores:
    image = bounded(image, SIZE)
    if min(image.size) < MIN_SIZE:
        return {"text_density": 0.0}
    # The detector scales the shorter edge to SIZE, so narrow images are padded to limit the longer edge.
    shortest = -(-max(image.size) // LONGEST)
    width, height = (max(side, shortest) for side in image.size)
    padded = image.crop((0, 0, width, height))  # crop() pads with black
    found, _ = ocr(np.asarray(padded)[..., ::-1])
    lines: list[Line] = [line for line in found or [] if len(line[1].strip()) > 1]
    if not lines:
        return {"text_density": 0.0}
    return {
        "text_density": _covered([corners for corners, _, _ in lines], image.size),
        "text_size": min(1.0, float(np.median([_height(corners) for corners, _, _ in lines])) / min(image.size)),
    }


def _covered(boxes: Sequence[Sequence[Sequence[float]]], size: tuple[int, int]) -> float:
    """Return the share of the image covered by the union of ``boxes``."""
    grid = Image.new("1", (GRID, GRID))
    for corners in boxes:
        ImageDraw.Draw(grid).polygon([(x * GRID / size[0], y * GRID / size[1]) for x, y in corners], fill=1)
    return float(np.asarray(grid).mean())


def _height(corners: Sequence[Sequence[float]]) -> float:
    """Return the height of a line of text (px); a box much higher than wide is treated as vertical text."""
    points = np.asarray(corners)
    width, height = np.linalg.norm(points[1] - points[0]), np.linalg.norm(points[3] - points[0])
    return float(width if height >= 1.5 * width else height)
