"""Text within an image, by PP-OCRv4 through RapidOCR: how much of the image it covers, and how small it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from .base import LONGEST, Scale, ScoreLimits, Scorer, Scores, bounded
from .onnx import OnnxFilter

SIZE = 736
"""Shorter edge that the text detector works at (px)."""
LEAST = 8
"""Shorter edge under which no line can be read (px)."""
GRID = 512
"""Covered area is counted on so many by so many points."""
Line = tuple[list[list[float]], str, float]
"""Corners clockwise from the top left (px), what is read there, and how surely."""


class Text(OnnxFilter):
    """Neither dense nor small text (paper, B.1, which gives no limits: these are ours)."""

    scales: ClassVar[Mapping[str, Scale]] = {"text_density": Scale(0, 1), "text_size": Scale(0.005, 1, log=True)}
    requires: ClassVar[tuple[str, ...]] = (*OnnxFilter.requires, "rapidocr_onnxruntime")
    decode_size: ClassVar[int] = SIZE

    confidence: float = Field(0.7, ge=0, le=1)
    """Lines that are read less surely do not count: faces and wheels are read as ``00`` with 0.5 to 0.68, real words with
    0.9. Nor does a single letter count, which any round thing may be taken for."""
    max_density: float = Field(0.25, ge=0, le=1)
    """Part of the image that text may cover."""
    min_text_size: float = Field(0.04, ge=0, le=1)
    """Smallest median height of the lines, as part of the shorter edge. A line's box is a little higher than its letters."""
    ignored_density: float = Field(0.02, ge=0, le=1)
    """Small text that covers no more than this is not held against an image: a signature, a date."""

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {
            "text_density": ("dense_text", ScoreLimits(maximum=self.max_density)),
            "text_size": ("small_text", ScoreLimits(minimum=self.min_text_size)),
        }

    def reason(self, scores: Scores) -> str | None:
        found = super().reason(scores)
        return None if found == "small_text" and scores["text_density"] <= self.ignored_density else found

    def load(self, device: str) -> Scorer:
        from rapidocr_onnxruntime import RapidOCR

        # Images come bounded, so the package's own limit, which would make long ones coarser, is out of the way.
        settings = {"text_score": self.confidence, "max_side_len": LONGEST * SIZE}
        on_gpu = {f"{part}_use_cuda": device == "cuda" for part in ("det", "cls", "rec")}
        ocr = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1, **settings, **on_gpu)
        return lambda images: [_scores(ocr, image) for image in images]


def _scores(ocr: Any, image: Image.Image) -> Scores:
    image = bounded(image, SIZE)
    if min(image.size) < LEAST:
        return {"text_density": 0.0}
    # The detector scales the shorter edge to SIZE: of a thin strip it would make an image without end.
    shortest = -(-max(image.size) // LONGEST)
    width, height = (max(side, shortest) for side in image.size)
    padded = image.crop((0, 0, width, height))  # black where there is no image
    found, _ = ocr(np.asarray(padded)[..., ::-1])
    lines: list[Line] = [line for line in found or [] if len(line[1].strip()) > 1]
    if not lines:
        return {"text_density": 0.0}
    return {
        "text_density": _covered([corners for corners, _, _ in lines], image.size),
        "text_size": min(1.0, float(np.median([_height(corners) for corners, _, _ in lines])) / min(image.size)),
    }


def _covered(boxes: Sequence[Sequence[Sequence[float]]], size: tuple[int, int]) -> float:
    """Part of the image that lies within one or more of ``boxes``."""
    grid = Image.new("1", (GRID, GRID))
    for corners in boxes:
        ImageDraw.Draw(grid).polygon([(x * GRID / size[0], y * GRID / size[1]) for x, y in corners], fill=1)
    return float(np.asarray(grid).mean())


def _height(corners: Sequence[Sequence[float]]) -> float:
    """Height of a line of text (px); a box much higher than wide holds a line that runs upwards or downwards."""
    points = np.asarray(corners)
    width, height = np.linalg.norm(points[1] - points[0]), np.linalg.norm(points[3] - points[0])
    return float(width if height >= 1.5 * width else height)
