"""CLIP score (Hessel et al. 2021, without its factor 2.5): mean cosine similarity of image and prompt, with open_clip.

``cos(E_I(x), E_T(p))``, -1 to 1. Images are resized to 256 px, then preprocessed with the model's resize and crop (224 px
for ViT-bigG-14). The paper only says "ViT-G/14". The evaluation code that it cites for FID uses open_clip's ``ViT-g-14``
(``laion2b_s12b_b42k``) under that name and prepends "A photo depicts " to each prompt; both are settings here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ...models.clip import Clip
from .base import Batch, Info, version_of
from .images import ImageSettings
from .samples import SampleMetric

PAPER_MODEL, PAPER_TAG = "ViT-bigG-14", "laion2b_s39b_b160k"
PAPER_IMAGES = ImageSettings(size=256)


def clip_score(clip: Clip, *, images: ImageSettings = PAPER_IMAGES, prefix: str = "") -> SampleMetric:
    """Create the CLIP score of ``images`` with their ``prompts``; ``prefix`` is prepended to each prompt."""

    def score(batch: Batch) -> np.ndarray:
        prepared = images.prepare(batch.need("images"))
        embedded = clip.embed_images([Image.fromarray(image) for image in prepared])
        texts = clip.embed_texts([prefix + prompt for prompt in batch.need("prompts")])
        return (embedded.astype(np.float64) * texts).sum(1)

    settings = {"images": images.describe(), "prefix": prefix, "scale": 1, "preprocessing": clip.preprocessing()}
    label = f"{clip.model}, {Path(clip.weights).name if clip.weights else 'random'}"
    info = Info(metric_name(clip), version_of("open-clip-torch"), label, clip.weights_hash, settings)
    return SampleMetric(info, score)


def metric_name(clip: Clip) -> str:
    """Return ``clip_score`` for the paper's network; for any other network or random weights a name that states it."""
    random = "random_" if clip.weights is None else ""
    plain = clip.model.lower().replace("-", "_")
    return "clip_score" if clip.model == PAPER_MODEL and not random else f"clip_score_{random}{plain}"
