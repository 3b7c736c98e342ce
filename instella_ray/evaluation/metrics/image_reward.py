"""ImageReward (Xu et al. 2023): human-preference score of an image given its prompt, standardised to about N(0, 1).

Uses the official package, which needs its checkpoint ``ImageReward.pt``, ``med_config.json``, BERT's vocabulary and
transformers 4.x. It is therefore not among this project's requirements; an import failure gives a message with the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ...errors import UserError
from ...packages import optional_import
from ...storage import file_sha256
from .base import Batch, Info, version_of
from .features import local_weights
from .images import ImageSettings
from .samples import IsCut, SampleMetric

Scorer = Callable[[str, np.ndarray], float]
"""Function from (prompt, image uint8 ``[H, W, 3]``) to the score."""
HINT = (
    "pip install image-reward; its 2023 release needs transformers 4 (for apply_chunking_to_forward): "
    "install it in a separate environment, or an image (cluster/docker/Dockerfile.image-reward)"
)


TEXT_LIMIT = 35
"""Number of tokens, start and end included, to which the official network cuts prompts."""


def load_image_reward(weights: str, med_config: str, *, device: str = "cpu") -> tuple[Scorer, IsCut]:
    """Load the official network from local files, without downloading; raises UserError for missing or wrong files.

    Returns the scorer, and the function that says which prompts it cuts.
    """
    package = optional_import("ImageReward.ImageReward", "metric image_reward", HINT)
    import torch

    path = local_weights(weights, "image_reward", "ImageReward.pt")
    config = local_weights(med_config, "image_reward", "med_config.json")
    network = package.ImageReward(med_config=str(config), device=device).to(device)
    loaded = network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    if loaded.missing_keys:
        raise UserError(f"metric image_reward: {path}: no {loaded.missing_keys[0]}; expected ImageReward.pt")
    network.eval()

    def score(prompt: str, image: np.ndarray) -> float:
        with torch.no_grad():
            return float(network.score(prompt, Image.fromarray(image)))

    def is_cut(prompts: Sequence[str]) -> list[bool]:
        return [len(tokens) > TEXT_LIMIT for tokens in network.blip.tokenizer(list(prompts))["input_ids"]]

    return score, is_cut


def image_reward(
    scorer: Scorer,
    is_cut: IsCut | None = None,
    *,
    weights: str,
    images: ImageSettings = ImageSettings(),
    name: str = "image_reward",
) -> SampleMetric:
    """Create ImageReward of ``images`` with their ``prompts``; set ``name`` for any other scorer."""

    def score(batch: Batch) -> np.ndarray:
        prepared = images.prepare(batch.need("images"))
        return np.array([scorer(p, x) for p, x in zip(batch.need("prompts"), prepared, strict=True)])

    settings = {"images": images.describe(), "network_input": "224 px, bicubic, centre crop", "text_limit": TEXT_LIMIT}
    info = Info(name, version_of("image-reward"), weights.rsplit("/", 1)[-1], file_sha256(weights), settings)
    return SampleMetric(info, score, is_cut)
