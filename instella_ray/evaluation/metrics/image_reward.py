"""ImageReward (Xu et al. 2023): human-preference score of an image given its prompt, standardised to about N(0, 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .base import Batch, Info
from .images import ImageSettings
from .samples import SampleMetric


class Scorer(Protocol):
    """Network that scores images: :class:`.image_reward_worker.OfficialReward`, here or in an actor."""

    def about(self) -> dict[str, Any]:
        """Return ``implementation``, ``weights``, ``weights_hash`` and ``settings`` of a :class:`.base.Info`."""
        ...

    def scores(self, prompts: Sequence[str], images: Sequence[np.ndarray]) -> list[float]:
        """Score each image, uint8 ``[H, W, 3]``, given its prompt."""
        ...

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        """Return whether the network cuts each prompt."""
        ...


def image_reward(scorer: Scorer, *, images: ImageSettings = ImageSettings()) -> SampleMetric:
    """Create ImageReward of ``images`` with their ``prompts``."""

    def score(batch: Batch) -> np.ndarray:
        prepared = images.prepare(batch.need("images"))
        return np.array(scorer.scores(batch.need("prompts"), list(prepared)))

    about = scorer.about()
    settings = {"images": images.describe(), **about["settings"]}
    return SampleMetric(Info("image_reward", **{**about, "settings": settings}), score, scorer.is_cut)
