"""Memorisation: whether images are closer to the training images than images that were held out are.

The value is the probability that an image is nearer to its nearest training image, in features, than a held-out image is to
its own (Meehan et al. 2020's test of data copying, whose U statistic this is): 0.5 where images are as new as those held
out, 1 where all are copies. ``nearest_1_percent`` is the share of images nearer than 99 % of those held out: 0.01 if new.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .. import statistics
from .base import MetricResult
from .feature_rows import FeatureRows
from .neighbours import nearest_rows

CLOSE = 0.01
"""Share of held-out images that are nearer than the threshold of ``nearest_1_percent``."""
QUANTILES = (0.0, CLOSE, 0.05, 0.25, 0.5, 0.75, 0.95)
"""Shares of images whose distances a result tells."""
Distance = Literal["euclidean", "cosine"]


@dataclass(frozen=True)
class NearestImage:
    """An image with its nearest training image."""

    id: str
    training: str
    """Id of the training image."""
    distance: float
    held_out_nearer: float
    """Share of the held-out images that are nearer to a training image."""


class Memorisation(FeatureRows):
    """Probability that an image is nearer to the training images than one held out; references: training, held_out.

    The setting ``distance`` is ``euclidean`` (the default) or ``cosine``: ``1 - cos`` of the features.
    """

    kind = "memorisation"

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        if not self.ids:
            return self.unknown(0, "none")
        ours, theirs = (self._nearest(rows)[1] for rows in (self.rows(), self.reference("held_out")))
        groups = self.groups()
        about: dict[str, Any] = {"interval": statistics.WILSON, "confidence": confidence}
        close = statistics.rate(ours < np.quantile(theirs, CLOSE), groups, confidence=confidence)
        part = self.make_result(*close[:3], len(ours), **about)
        about["distances"] = {
            f"{share * 100:g} %": {
                "images": float(np.quantile(ours, share)),
                "held out": float(np.quantile(theirs, share)),
            }
            for share in QUANTILES
        }
        found = statistics.probability_less(ours, theirs, groups, confidence=confidence)
        parts = (replace(part, name=f"{self.info.name}/nearest_1_percent"),)
        return self.make_result(*found[:3], len(ours), parts=parts, **about)

    def nearest(self) -> list[NearestImage]:
        """Return all images with their nearest training images, the nearest first; none if the references have no ids."""
        if not self.ids or not self.references["training"].ids:
            return []
        rows, apart = self._nearest(self.rows())
        held_out = np.sort(self._nearest(self.reference("held_out"))[1])
        shares = np.searchsorted(held_out, apart, "left") / len(held_out)
        names = [self.references["training"].ids[row] for row in rows]
        columns = (self.names(), names, apart.tolist(), shares.tolist())
        found = [NearestImage(*row) for row in zip(*columns, strict=True)]
        return sorted(found, key=lambda image: (image.distance, image.id))

    def _nearest(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest training image of each row, and its distance."""
        training = self.reference("training")
        if self.info.settings.get("distance") != "cosine":
            return nearest_rows(rows, training)
        found, apart = nearest_rows(_unit(rows), _unit(training))
        return found, apart**2 / 2  # of unit vectors


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
