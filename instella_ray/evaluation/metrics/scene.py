"""Scene score metric: share of ``scenes`` images that match their caption (see :mod:`instella_ray.data.scene_score`).

It has GenEval's categories, but a detector for the scenes' shapes only; it is not GenEval.
"""

from __future__ import annotations

import numpy as np

from ...data.scene_score import MARGIN, MIN_AREA, MIN_CONTRAST, MIN_FIT, score
from ...data.scenes import parse_caption
from .base import Batch, Info, version_of
from .images import ImageSettings
from .rates import RateMetric, SampleVerdict


def scene_verdict(image: np.ndarray, caption: str) -> SampleVerdict:
    """Evaluate an image, uint8 ``[H, W, 3]``; raises UserError for a caption that is not a scene caption."""
    expect = parse_caption(caption)
    verdict = score(image, expect)
    return SampleVerdict(expect.category, verdict.correct, verdict.reason)


def scene_score(images: ImageSettings = ImageSettings()) -> RateMetric:
    """Create the scene score: mean over categories of the share of ``images`` that match their ``prompts``."""

    def verdicts(batch: Batch) -> list[SampleVerdict]:
        prepared = images.prepare(batch.need("images"))
        return [scene_verdict(x, caption) for x, caption in zip(prepared, batch.need("prompts"), strict=True)]

    thresholds = {"contrast": MIN_CONTRAST, "area": MIN_AREA, "fit": MIN_FIT, "margin": MARGIN}
    settings = {"images": images.describe(), "detector": "scenes", "thresholds": thresholds}
    return RateMetric(Info("scene_score", version_of("instella-ray"), settings=settings), verdicts)
