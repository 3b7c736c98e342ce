"""Frechet distance between two feature distributions, with mergeable sums and a jackknife interval.

The metric's name depends on the features: see :mod:`.fid`.

The bootstrap does not work here: a resample with replacement has fewer distinct images, and the distance decreases with
their number, so every replicate is above the estimate. Leaving out one of ten groups in turn biases all replicates
equally, and the jackknife measures their variance. Groups are assigned by a hash of a sample's group name, so every shard
splits in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import UserError
from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array
from .features import Features
from .gaussian import Gaussian, distance_with_root, frechet_distance, square_root
from .images import ImageSettings
from .moments import GroupMoments, Sums

GROUPS = 10
"""Number of jackknife groups; memory grows with it once groups have more samples than feature dimensions."""
ENOUGH = 5
"""Images per feature from which no caution is given: about 10,000 for FID, as its authors recommend."""


class Frechet(Metric):
    """Frechet distance of images to a fixed reference, or (without one) of reconstructions to their originals.

    With originals, the jackknife leaves out a group on both sides, since they are paired. Without originals and reference
    the metric only gathers statistics, for :meth:`gaussian`. The reference is not part of the state: attach it to the
    merged metric with :meth:`attach`.
    """

    kind = "frechet"

    def __init__(
        self,
        info: Info,
        features: Features | None = None,
        *,
        reference: Gaussian | None = None,
        images: ImageSettings | None = None,
    ) -> None:
        super().__init__(info)
        self.features, self.images = features, images or ImageSettings()
        self.reference: Gaussian | None = None
        self._reference_root: np.ndarray | None = None
        self.number = int(info.settings.get("groups", GROUPS))
        self._samples, self._originals = (GroupMoments(self.number) for _ in range(2))
        if reference is not None:
            self.attach(reference)

    def attach(self, reference: Gaussian) -> Frechet:
        """Attach the reference to a metric restored from a state; raises UserError for a different reference."""
        expected = self.info.settings.get("reference")
        if expected != reference.describe():
            raise UserError(f"metric {self.info.name}: measured against {expected}, got {reference.describe()}")
        self.reference = reference
        return self

    def update(self, batch: Batch) -> None:
        if self.features is None:
            raise RuntimeError(f"metric {self.info.name}: made from a state, without a network to update with")
        groups = np.array([statistics.group_number(name, self.number) for name in batch.group_names], np.int64)
        found = [(self._samples, self.features.of_batch(batch, self.images))]
        if batch.references is not None and "reference" not in self.info.settings:
            originals = self.images.prepare_originals(batch.need("references"))
            found.append((self._originals, self.features(originals)))
        self.claim(batch.ids)
        for moments, rows in found:
            moments.add(rows, groups)

    def gaussian(self) -> Gaussian:
        """Compute mean and covariance of the images' features, for use as a reference.

        Raises UserError for fewer than two images.
        """
        sums = self._samples.all()
        if sums is None or sums.count < 2:
            raise UserError(f"metric {self.info.name}: expected at least two images")
        return Gaussian.of(sums)

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        """Compute the distance; its interval describes the variation over samples of this size and a fixed reference.

        Settings include the jackknife's ``bias`` estimate: the distance decreases by about that much as the number of
        samples goes to infinity.
        """
        whole = self._samples.all()
        about: dict[str, Any] = {"interval": statistics.JACKKNIFE, "confidence": confidence}
        if whole is None or whole.count < 2:
            return self.make_result(*(float("nan"),) * 3, 0 if whole is None else whole.count, **about)
        value = self._against(whole, self._originals.all())
        sizes, left_out = [], []
        for group in self._samples.groups():
            rest = self._samples.all(without=group)
            if rest is not None and rest.count >= 2:
                left_out.append(self._against(rest, self._originals.all(without=group)))
                sizes.append(whole.count - rest.count)
        found = statistics.jackknife(value, np.array(left_out), np.array(sizes), confidence=confidence)
        about |= {"standard_error": found.standard_error, "bias": found.bias}
        low = found.low if np.isnan(found.low) else max(found.low, 0.0)
        cautions = self._cautions(whole.count, len(whole.total))
        return self.make_result(value, low, found.high, whole.count, cautions=cautions, **about)

    def _cautions(self, count: int, width: int) -> tuple[str, ...]:
        counts = {"images": count, "reference images": self.reference.count if self.reference else None}
        few = [(number, name) for name, number in counts.items() if number is not None and number < ENOUGH * width]
        advice = "the distance is largely bias, compare it only at equal numbers, or measure kid, which has none"
        return tuple(
            f"too few {name}: {number}, fewer than the {width} features: {advice}"
            if number < width
            else f"few {name}: {number}, expected {ENOUGH * width} or more for {width} features: {advice}"
            for number, name in few
        )

    def _against(self, samples: Sums, originals: Sums | None) -> float:
        ours = Gaussian.of(samples)
        if self.reference is not None:
            if self._reference_root is None:
                self._reference_root = square_root(self.reference.covariance)
            return distance_with_root(ours, self.reference, self._reference_root)
        if originals is None or originals.count != samples.count:
            raise UserError(
                f"metric {self.info.name}: no reference; expected originals for every image, or a reference"
            )
        return frechet_distance(ours, Gaussian.of(originals))

    def arrays(self) -> dict[str, np.ndarray]:
        sides = (("samples", self._samples), ("originals", self._originals))
        found = {f"{side}_{name}": array for side, moments in sides for name, array in moments.arrays().items()}
        return {"ids": text_array(sorted(self.ids)), **found}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.claim(arrays["ids"].tolist())
        for side, moments in (("samples", self._samples), ("originals", self._originals)):
            prefix = f"{side}_"
            moments.restore({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
