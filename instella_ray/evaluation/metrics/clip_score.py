"""CLIP score (Hessel et al. 2021, without its factor 2.5): mean cosine between picture and prompt, through open_clip.

``cos(E_I(x), E_T(p))``, -1 to 1. Pictures are resized to 256 px, then go through the model's own resize and crop (224 px
for ViT-bigG-14). The paper says "ViT-G/14" and no more. The evaluation code that it cites for FID takes open_clip's
``ViT-g-14`` (``laion2b_s12b_b42k``) under that name and puts "A photo depicts " before each prompt; both are settings here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import UserError
from ...models.checkpoint import weight_hash
from .base import Batch, Info, file_sha256, optional_import, version_of
from .images import ImageSettings
from .samples import SampleMetric

PAPER_MODEL, PAPER_TAG = "ViT-bigG-14", "laion2b_s39b_b160k"
PAPER_IMAGES = ImageSettings(size=256)


@dataclass(frozen=True)
class Clip:
    """A loaded model: unit vectors of pictures and of texts, float32 ``[B, D]``."""

    name: str
    weights: str
    weights_hash: str
    embed_images: Callable[[np.ndarray], np.ndarray]
    embed_texts: Callable[[Sequence[str]], np.ndarray]
    preprocessing: str


def load_clip(model: str = PAPER_MODEL, weights: str | None = PAPER_TAG, *, device: str = "cpu") -> Clip:
    """open_clip's ``model`` in float32 with the weights of a local file, or of a tag of its list, which may download.

    ``weights=None`` is a random network, and says so in its name.
    """
    open_clip = optional_import("open_clip", "clip_score", "pip install 'instella-ray[eval]'")
    import torch

    if model not in open_clip.list_models():
        raise UserError(f"metric clip_score: open_clip has no model '{model}'")
    is_file = weights is not None and Path(weights).is_file()
    if weights is not None and not is_file and weights not in open_clip.list_pretrained_tags_by_model(model):
        raise UserError(f"metric clip_score: weights {weights}: neither a local file nor open_clip's tag of {model}")
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(model, weights, device=device)
    except Exception as error:
        raise UserError(
            f"metric clip_score: cannot load {model} from {weights} ({str(error).splitlines()[0]})"
        ) from None
    network.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(model)

    def embed_images(images: np.ndarray) -> np.ndarray:
        planes = torch.stack([preprocess(Image.fromarray(image)) for image in images]).to(device)
        with torch.no_grad():
            return network.encode_image(planes, normalize=True).float().cpu().numpy()

    def embed_texts(texts: Sequence[str]) -> np.ndarray:
        with torch.no_grad():
            return network.encode_text(tokenizer(list(texts)).to(device), normalize=True).float().cpu().numpy()

    found = file_sha256(weights) if is_file and weights is not None else weight_hash(network)
    plain = model.lower().replace("-", "_")
    name = "clip_score" if model == PAPER_MODEL else f"clip_score_{plain}"
    if weights is None:
        name = f"clip_score_random_{plain}"
    label = f"{model}, {Path(weights).name if weights else 'random'}"
    about = " ".join(str(preprocess).split())
    with contextlib.suppress(AttributeError):  # a plain sentence rather than Python's names of functions
        steps = [type(t).__name__ for t in preprocess.transforms]
        about = f"open_clip: {', '.join(steps)}; {network.visual.preprocess_cfg}"
    return Clip(name, label, found, embed_images, embed_texts, about)


def clip_score(clip: Clip, *, images: ImageSettings = PAPER_IMAGES, prefix: str = "") -> SampleMetric:
    """CLIP score of ``images`` with their ``prompts``, each with ``prefix`` before it."""

    def score(batch: Batch) -> np.ndarray:
        pictures = clip.embed_images(images.prepare(batch.need("images")))
        texts = clip.embed_texts([prefix + prompt for prompt in batch.need("prompts")])
        return (pictures.astype(np.float64) * texts).sum(1)

    settings = {"images": images.describe(), "prefix": prefix, "scale": 1, "preprocessing": clip.preprocessing}
    return SampleMetric(
        Info(clip.name, version_of("open-clip-torch"), clip.weights, clip.weights_hash, settings), score
    )
