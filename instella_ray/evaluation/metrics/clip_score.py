"""CLIP score (Hessel et al. 2021, without its factor 2.5): mean cosine similarity of image and prompt, with open_clip.

``cos(E_I(x), E_T(p))``, -1 to 1. Images are resized to 256 px, then preprocessed with the model's resize and crop (224 px
for ViT-bigG-14). The paper only says "ViT-G/14". The evaluation code that it cites for FID uses open_clip's ``ViT-g-14``
(``laion2b_s12b_b42k``) under that name and prepends "A photo depicts " to each prompt; both are settings here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...models.clip import Clip
from .base import Batch, Info, version_of
from .features import Features
from .images import ImageSettings
from .names import file_label
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

    def is_cut(prompts: Sequence[str]) -> Sequence[bool]:
        return clip.is_cut([prefix + prompt for prompt in prompts])

    about = {"prefix": prefix, "scale": 1, "text_limit": clip.text_limit, "preprocessing": clip.preprocessing()}
    settings = {"images": images.describe(), **about}
    info = Info(metric_name(clip), version_of("open-clip-torch"), _label(clip), clip.weights_hash, settings)
    return SampleMetric(info, score, is_cut)


def metric_name(clip: Clip) -> str:
    """Return ``clip_score`` for the paper's network (with its weights, see :mod:`.names`), else a name that states it."""
    paper = clip.model == PAPER_MODEL and clip.weights is not None
    return "clip_score" if paper else f"clip_score_{_network_name(clip)}"


def clip_features(clip: Clip) -> Features:
    """Return the normalized image embeddings of a CLIP model as features."""

    def compute(images: np.ndarray) -> np.ndarray:
        return clip.embed_images([Image.fromarray(image) for image in images])

    settings = {"preprocessing": clip.preprocessing()}
    made_with = version_of("open-clip-torch"), _label(clip), clip.weights_hash
    return Features(_network_name(clip), *made_with, compute, settings)


def _network_name(clip: Clip) -> str:
    plain = clip.model.lower().replace("-", "_")
    return plain if clip.weights is not None else f"random_{plain}"


def _label(clip: Clip) -> str:
    if clip.weights is None:
        return f"{clip.model}, random"
    return f"{clip.model}, {file_label(clip.weights) if Path(clip.weights).is_file() else clip.weights}"
