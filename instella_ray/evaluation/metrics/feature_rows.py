"""Features of every image, for metrics that compare sets of features rather than their means and covariances."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ...errors import UserError
from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array
from .features import Features
from .gaussian import Gaussian, read_arrays
from .images import ImageSettings
from .moments import Sums

R = TypeVar("R", bound="FeatureRows")


@dataclass(frozen=True)
class FeatureSet:
    """Features of a reference's images, float32 ``[M, D]``."""

    rows: np.ndarray
    source: str = "computed"
    sha256: str | None = None
    """Hash of the features."""
    ids: Sequence[str] = ()
    """Id of each image; empty if unknown."""

    def save(self, url: str) -> None:
        """Write an ``.npz`` file with ``features``, ``ids``, and the features' ``mu`` and ``sigma``."""
        Gaussian.of(Sums.of(self.rows)).save(url, features=self.rows, ids=text_array(self.ids))

    @classmethod
    def load(cls, url: str, *, source: str | None = None) -> FeatureSet:
        """Load ``features`` from an ``.npz`` file; raises UserError for a file without them."""
        found = read_arrays(url, ("features",), ("ids",))
        rows, ids = found["features"], found["ids"].tolist() if "ids" in found else ()
        return cls(rows, source or url, hashlib.sha256(rows.tobytes()).hexdigest(), ids)

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256, "count": len(self.rows)}


class FeatureRows(Metric):
    """Features of every image; subclasses compare them with those of references, which are not part of the state.

    The info has a reference's description under its role, a setting; attach the reference itself to the merged metric.
    Images are sorted by id first, so the result does not depend on the order of shards.
    """

    kind = "features"

    def __init__(self, info: Info, features: Features | None = None, images: ImageSettings | None = None) -> None:
        super().__init__(info)
        self.features, self.images = features, images or ImageSettings()
        self.references: dict[str, FeatureSet] = {}
        self._rows: dict[str, tuple[str, np.ndarray]] = {}

    def attach(self: R, **references: FeatureSet) -> R:
        """Attach references by role; raises UserError for one that the metric was not measured for."""
        for role, reference in references.items():
            expected = self.info.settings.get(role)
            if expected != reference.describe():
                raise UserError(f"metric {self.info.name}: measured against {expected}, got {reference.describe()}")
        self.references |= references
        return self

    def reference(self, role: str = "reference") -> np.ndarray:
        """Return the features of a reference, float64 ``[M, D]``."""
        if role not in self.references:
            raise UserError(f"metric {self.info.name}: no {role} images attached")
        return self.references[role].rows.astype(np.float64)

    def update(self, batch: Batch) -> None:
        if self.features is None:
            raise RuntimeError(f"metric {self.info.name}: made from a state, without a network to update with")
        self._add(batch.ids, batch.group_names, self.features.of_batch(batch, self.images))

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        raise UserError(f"metric {self.info.name}: features alone have no value")

    def rows(self) -> np.ndarray:
        """Return all features in the order of the ids, float64 ``[N, D]``; ``[0, 0]`` without images."""
        found = [row for _, (_, row) in sorted(self._rows.items())]
        return np.array(found, np.float64) if found else np.empty((0, 0))

    def names(self) -> list[str]:
        """Return the id of each row of :meth:`rows`."""
        return sorted(self._rows)

    def groups(self) -> list[str]:
        """Return the group of each row of :meth:`rows`."""
        return [group for _, (group, _) in sorted(self._rows.items())]

    def jackknife_groups(self, number: int) -> np.ndarray:
        """Return the jackknife group of each row, int64 ``[N]``: 0, 1, 2, ... for those that have images."""
        found = [statistics.group_number(name, number) for name in self.groups()]
        return np.unique(np.array(found, np.int64), return_inverse=True)[1].reshape(-1)

    def feature_set(self) -> FeatureSet:
        """Return the features for use as a reference; raises UserError for fewer than two images."""
        if len(self._rows) < 2:
            raise UserError(f"metric {self.info.name}: expected at least two images")
        return FeatureSet(self.rows().astype(np.float32), ids=self.names())

    def unknown(self, count: int, reason: str) -> MetricResult:
        """Return the result of too few images."""
        cautions = (f"too few images: {reason}",) if count else ()
        about: dict[str, Any] = {"interval": None, "confidence": 0.95}
        return self.make_result(*(float("nan"),) * 3, count, cautions=cautions, **about)

    def arrays(self) -> dict[str, np.ndarray]:
        rows = sorted(self._rows.items())
        return {
            "ids": text_array([name for name, _ in rows]),
            "groups": text_array([group for _, (group, _) in rows]),
            "rows": np.array([row for _, (_, row) in rows], np.float32),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._add(arrays["ids"].tolist(), arrays["groups"].tolist(), arrays["rows"])

    def _add(self, ids: Sequence[str], groups: Sequence[str], rows: np.ndarray) -> None:
        self.claim(ids)
        self._rows.update((name, (group, row)) for name, group, row in zip(ids, groups, rows, strict=True))
