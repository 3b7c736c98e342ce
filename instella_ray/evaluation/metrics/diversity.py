"""Diversity metrics: mean distance between two images of the same prompt, averaged over prompts.

For a prompt with m images, ``2 / (m (m - 1)) sum_{i<j} d(x_i, x_j)``; prompts with a single image are excluded. Distances:
share of differing code bits (0 to 1, independent bits: 0.5), ``1 - cos`` of feature vectors (0 to 2), or LPIPS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array, version_of
from .features import Features
from .images import ImageSettings

BITS, COSINE = "share of differing code bits", "1 - cosine"


def bit_distance(codes: np.ndarray) -> float:
    """Compute the mean share of differing bits over all pairs of ``codes [m, N]`` (0/1)."""
    ones = codes.sum(0, dtype=np.int64)  # number of pairs that differ in a bit: ones times zeros
    return float((ones * (len(codes) - ones)).mean() / (len(codes) * (len(codes) - 1) / 2))


def cosine_distance(vectors: np.ndarray) -> float:
    """Compute the mean of ``1 - cos`` over all pairs of ``vectors [m, D]``."""
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return float(1 - (unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())


Embed = Callable[[Batch], np.ndarray]
"""Representation of each sample to store, ``[B, ...]`` of any shape."""
MeanDistance = Callable[[np.ndarray], float]
"""Mean distance over all pairs of stored samples ``[m, ...]``, m >= 2."""
ARRAY_DISTANCES: dict[str, MeanDistance] = {BITS: bit_distance, COSINE: cosine_distance}
"""Distances that need no network: a metric restored from a state selects one by its settings."""


class Diversity(Metric):
    """Mean pairwise distance of each prompt's samples.

    Stores each sample's representation until its prompt has ``per_prompt`` samples (a setting; 0: until the result).
    """

    kind = "diversity"

    def __init__(self, info: Info, embed: Embed | None = None, mean_distance: MeanDistance | None = None) -> None:
        super().__init__(info)
        self.embed = embed
        self.mean_distance = mean_distance or ARRAY_DISTANCES.get(info.settings["distance"])
        self.per_prompt = int(info.settings["per_prompt"])
        self._open: dict[str, dict[str, np.ndarray]] = {}
        self._done: dict[str, tuple[float, int]] = {}

    def update(self, batch: Batch) -> None:
        if self.embed is None:
            raise RuntimeError(f"metric {self.info.name}: made from a state, without a network to update with")
        batch.need("groups")
        self._add(batch.ids, batch.group_names, self.embed(batch))

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        done = self._measured()
        values = np.array([value for value, _ in done.values()])
        interval = statistics.bootstrap_mean(values, confidence=confidence, seed=seed)
        value = float(values.mean()) if len(values) else float("nan")
        count = sum(images for _, images in done.values())
        method = statistics.mean_method(len(done))
        about: dict[str, Any] = {"interval": method, "confidence": confidence, "groups": len(done)}
        return self.make_result(value, *interval, count, **about)

    def scores(self) -> dict[str, float]:
        """Return the mean distance by prompt, for prompts with at least two images."""
        return {name: value for name, (value, _) in self._measured().items()}

    def arrays(self) -> dict[str, np.ndarray]:
        done = sorted(self._done.items())
        rows = [(i, g, row) for g, rows in sorted(self._open.items()) for i, row in sorted(rows.items())]
        return {
            "ids": text_array(sorted(self.ids)),
            "done": text_array([name for name, _ in done]),
            "done_values": np.array([value for _, (value, _) in done], np.float64),
            "done_counts": np.array([count for _, (_, count) in done], np.int64),
            "open_ids": text_array([i for i, _, _ in rows]),
            "open_groups": text_array([g for _, g, _ in rows]),
            "open_rows": np.stack([row for _, _, row in rows]) if rows else np.empty(0, np.uint8),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        columns = (arrays[name].tolist() for name in ("done", "done_values", "done_counts"))
        done = {name: (value, count) for name, value, count in zip(*columns, strict=True)}
        for name in done:
            self._check_count(name, self.per_prompt)
        waiting = arrays["open_ids"].tolist()
        self.claim(sorted(set(arrays["ids"].tolist()) - set(waiting)))
        self._done.update(done)
        self._add(waiting, arrays["open_groups"].tolist(), arrays["open_rows"])

    def _add(self, ids: Sequence[str], groups: Sequence[str], rows: np.ndarray) -> None:
        for group, new in Counter(groups).items():
            self._check_count(group, new)
        self.claim(ids)
        for name, group, row in zip(ids, groups, rows, strict=True):
            self._open.setdefault(group, {})[name] = row
        if self.mean_distance is not None:
            for group in [g for g in dict.fromkeys(groups) if len(self._open[g]) == self.per_prompt]:
                self._done[group] = self._measure(self._open.pop(group))

    def _check_count(self, group: str, new: int) -> None:
        if self.per_prompt and (group in self._done or len(self._open.get(group, ())) + new > self.per_prompt):
            raise UserError(f"metric {self.info.name}: more than {self.per_prompt} images of prompt {group}")

    def _measured(self) -> dict[str, tuple[float, int]]:
        found = {name: self._measure(rows) for name, rows in self._open.items() if len(rows) > 1}
        return dict(sorted({**self._done, **found}.items()))

    def _measure(self, rows: Mapping[str, np.ndarray]) -> tuple[float, int]:
        if self.mean_distance is None:
            raise UserError(
                f"metric {self.info.name}: images of one prompt are in several shards and their distance needs a network; "
                "merge the states into a metric that has it loaded"
            )
        return self.mean_distance(np.stack([row for _, row in sorted(rows.items())])), len(rows)


def code_diversity(*, per_prompt: int = 0) -> Diversity:
    """Create the mean pairwise share of differing bits among the codes of a prompt."""

    def embed(batch: Batch) -> np.ndarray:
        codes = np.asarray(batch.need("codes"), np.uint8)
        return codes.reshape(len(codes), -1)

    settings = {"distance": BITS, "per_prompt": per_prompt}
    return Diversity(Info("diversity_bits", version_of("instella-ray"), settings=settings), embed)


def feature_diversity(
    features: Features, *, images: ImageSettings = ImageSettings(size=256), per_prompt: int = 0
) -> Diversity:
    """Create the mean pairwise ``1 - cos`` of features among the images of a prompt."""
    settings = {"distance": COSINE, **features.settings, "images": images.describe(), "per_prompt": per_prompt}
    name = f"diversity_{features.name}"
    info = Info(name, features.implementation, features.weights, features.weights_hash, settings)
    return Diversity(info, lambda batch: features(images.prepare(batch.need("images"))))


def image_diversity(
    info: Info, distance: Callable[[np.ndarray, np.ndarray], np.ndarray], images: ImageSettings
) -> Diversity:
    """Create the mean pairwise ``distance(images, others) -> [B]`` (see :func:`.lpips_distance.lpips_diversity`).

    Images are kept in memory until their prompt is complete, so set ``per_prompt``.
    """

    def mean_distance(group: np.ndarray) -> float:
        first, second = np.triu_indices(len(group), 1)
        return float(np.mean(distance(group[first], group[second])))

    return Diversity(info, lambda batch: images.prepare(batch.need("images")), mean_distance)
