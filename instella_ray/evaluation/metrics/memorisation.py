"""Memorisation: whether images are closer to the training images than images that were held out are.

The value is the probability that an image is nearer to its nearest training image, in features, than a held-out image is to
its own (Meehan et al. 2020's test of data copying, whose U statistic this is): 0.5 where images are as new as those held
out, 1 where all are copies. ``nearest_1_percent`` is the share of images nearer than 99 % of those held out: 0.01 if new.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .. import statistics
from .base import MetricResult
from .feature_rows import FeatureRows
from .neighbours import nearest_distances

CLOSE = 0.01
"""Share of held-out images that are nearer than the threshold of ``nearest_1_percent``."""


class Memorisation(FeatureRows):
    """Probability that an image is nearer to the training images than one held out; references: training, held_out."""

    kind = "memorisation"

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        x = self.rows()
        if not len(x):
            return self.unknown(0, "none")
        training = self.reference("training")
        ours, theirs = (
            nearest_distances(rows, training, np.zeros(len(training), np.int64), 1)[:, 0, 0]
            for rows in (x, self.reference("held_out"))
        )
        groups = self.groups()
        about: dict[str, Any] = {"interval": statistics.WILSON, "confidence": confidence}
        close = statistics.rate(ours < np.quantile(theirs, CLOSE), groups, confidence=confidence)
        part = self.make_result(*close[:3], len(x), **about)
        about |= {"median_distance": float(np.median(ours)), "median_distance_held_out": float(np.median(theirs))}
        found = statistics.probability_less(ours, theirs, groups, confidence=confidence)
        parts = (replace(part, name=f"{self.info.name}/nearest_1_percent"),)
        return self.make_result(*found[:3], len(x), parts=parts, **about)
