"""Frechet distance between two feature distributions, with mergeable sums and a jackknife interval.

``d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` for means m and covariances C. The metric's name depends on the
features: see :mod:`.fid`.

The bootstrap does not work here: a resample with replacement has fewer distinct images, and the distance decreases with
their number, so every replicate is above the estimate. Leaving out one of ten groups in turn biases all replicates
equally, and the jackknife measures their variance. Groups are assigned by a hash of a sample's group name, so every shard
splits in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg

from ... import storage
from ...errors import UserError
from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array
from .features import Features
from .images import ImageSettings
from .moments import GroupMoments, Sums

GROUPS = 10
"""Number of jackknife groups; memory grows with it once groups have more samples than feature dimensions."""


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[D]`` and covariance ``[D, D]`` (divided by n - 1) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    """Number of samples; None if unknown."""
    source: str = "computed"
    sha256: str | None = None

    @classmethod
    def of(cls, sums: Sums) -> Gaussian:
        mean = sums.total / sums.count
        covariance = (sums.outer - sums.count * np.outer(mean, mean)) / (sums.count - 1)
        return cls(mean, (covariance + covariance.T) / 2, sums.count)

    def save(self, url: str) -> None:
        """Write an ``.npz`` file with pytorch-fid's names: ``mu``, ``sigma`` (and ``count``)."""
        with storage.open_file(url, "wb") as stream:
            np.savez(stream, mu=self.mean, sigma=self.covariance, count=np.array(self.count or 0))

    @classmethod
    def load(cls, url: str) -> Gaussian:
        """Load statistics from an ``.npz`` file with ``mu`` and ``sigma``; raises UserError for any other file."""
        with storage.open_file(url) as stream:
            try:
                with np.load(stream, allow_pickle=False) as archive:
                    data = {name: archive[name] for name in archive.files}
                mean, covariance = (data[name].astype(np.float64) for name in ("mu", "sigma"))
            except (ValueError, OSError, KeyError, EOFError) as error:
                raise UserError(f"{url}: no statistics with mu and sigma ({error})") from None
        if covariance.shape != (*mean.shape, *mean.shape):
            raise UserError(f"{url}: mu has shape {mean.shape}, sigma {covariance.shape}")
        return cls(mean, covariance, int(data.get("count", 0)) or None, url, storage.file_sha256(url))

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256, "count": self.count}


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the Frechet distance.

    ``tr (C1 C2)^(1/2)`` is the sum of the singular values of ``R1^T R2`` for roots ``C = R R^T``, which are accurate even for
    singular covariances (fewer samples than dimensions): the distance of a set to itself is 0 up to rounding.
    """
    return _distance(a, b, _root(b.covariance))


def _distance(a: Gaussian, b: Gaussian, root_b: np.ndarray) -> float:
    product = _root(a.covariance).T @ root_b
    cross = linalg.svdvals(product, check_finite=False).sum() if product.size else 0.0
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
    """Compute R ``[D, rank]`` with ``R R^T`` = ``covariance``, a positive semi-definite matrix."""
    values, vectors = linalg.eigh(covariance, check_finite=False)
    found = values > len(values) * np.finfo(np.float64).eps * values[-1]
    root: np.ndarray = vectors[:, found] * np.sqrt(values[found])
    return root


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
        found = [(self._samples, self.features(self.images.prepare(batch.need("images"))))]
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
        return self.make_result(value, max(found.low, 0.0), found.high, whole.count, **about)

    def _against(self, samples: Sums, originals: Sums | None) -> float:
        ours = Gaussian.of(samples)
        if self.reference is not None:
            if self._reference_root is None:
                self._reference_root = _root(self.reference.covariance)
            return _distance(ours, self.reference, self._reference_root)
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
