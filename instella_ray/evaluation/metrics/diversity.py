"""Diversity: mean distance between two images of the same prompt, averaged over prompts.

For a prompt with m images, ``2 / (m (m - 1)) sum_{i<j} d(x_i, x_j)``; prompts with one image say nothing and are left
out. Distances: share of differing code bits (0 to 1, independent bits: 0.5), ``1 - cos`` of feature vectors (0 to 2), or
LPIPS.
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
    """Mean over pairs of ``codes [m, N]`` (0/1) of the share of bits in which they differ."""
    ones = codes.sum(0, dtype=np.int64)  # pairs that differ in a bit: those with it times those without
    return float((ones * (len(codes) - ones)).mean() / (len(codes) * (len(codes) - 1) / 2))


def cosine_distance(vectors: np.ndarray) -> float:
    """Mean over pairs of ``vectors [m, D]`` of ``1 - cos``."""
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return float(1 - (unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())


Embed = Callable[[Batch], np.ndarray]
"""What to remember of each sample, ``[B, ...]`` of any shape."""
MeanDistance = Callable[[np.ndarray], float]
"""Mean over pairs of remembered samples ``[m, ...]``, m >= 2."""
OF_ARRAYS: dict[str, MeanDistance] = {BITS: bit_distance, COSINE: cosine_distance}
"""Distances that need no network: a metric made from a state has them by its settings."""


class Diversity(Metric):
    """Keeps what each sample leaves until its prompt has ``per_prompt`` samples (settings; 0: to the end)."""

    kind = "diversity"

    def __init__(self, info: Info, embed: Embed | None = None, mean_distance: MeanDistance | None = None) -> None:
        super().__init__(info)
        self.embed = embed
        self.mean_distance = mean_distance or OF_ARRAYS.get(info.settings["distance"])
        self.per_prompt = int(info.settings["per_prompt"])
        self._open: dict[str, dict[str, np.ndarray]] = {}
        self._done: dict[str, tuple[float, int]] = {}

    def update(self, batch: Batch) -> None:
        if self.embed is None:
            raise RuntimeError(f"metric {self.info.name}: made from a state, it has no network to update with")
        batch.need("groups")
        self._add(batch.ids, batch.group_names, self.embed(batch))

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        done = self._measured()
        values = np.array([value for value, _ in done.values()])
        interval = statistics.bootstrap_mean(values, confidence=confidence, seed=seed)
        value = float(values.mean()) if len(values) else float("nan")
        count = sum(images for _, images in done.values())
        about: dict[str, Any] = {"interval": statistics.BOOTSTRAP, "confidence": confidence, "groups": len(done)}
        return self.make_result(value, *interval, count, **about)

    def scores(self) -> dict[str, float]:
        """Each prompt's mean distance by prompt, of those with two images or more."""
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
            self._check_room(name, self.per_prompt)
        waiting = arrays["open_ids"].tolist()
        self.claim(sorted(set(arrays["ids"].tolist()) - set(waiting)))
        self._done.update(done)
        self._add(waiting, arrays["open_groups"].tolist(), arrays["open_rows"])

    def _add(self, ids: Sequence[str], groups: Sequence[str], rows: np.ndarray) -> None:
        for group, new in Counter(groups).items():
            self._check_room(group, new)
        self.claim(ids)
        for name, group, row in zip(ids, groups, rows, strict=True):
            self._open.setdefault(group, {})[name] = row
        if self.mean_distance is not None:
            for group in [g for g in dict.fromkeys(groups) if len(self._open[g]) == self.per_prompt]:
                self._done[group] = self._measure(self._open.pop(group))

    def _check_room(self, group: str, new: int) -> None:
        if self.per_prompt and (group in self._done or len(self._open.get(group, ())) + new > self.per_prompt):
            raise UserError(f"metric {self.info.name}: more than {self.per_prompt} images of prompt {group}")

    def _measured(self) -> dict[str, tuple[float, int]]:
        found = {name: self._measure(rows) for name, rows in self._open.items() if len(rows) > 1}
        return dict(sorted({**self._done, **found}.items()))

    def _measure(self, rows: Mapping[str, np.ndarray]) -> tuple[float, int]:
        if self.mean_distance is None:
            raise UserError(
                f"metric {self.info.name}: images of one prompt lie in several shards and their distance needs a network; "
                "merge the states into a metric that has it"
            )
        return self.mean_distance(np.stack([row for _, row in sorted(rows.items())])), len(rows)


def code_diversity(*, per_prompt: int = 0) -> Diversity:
    """Mean pairwise share of differing bits among the codes of a prompt."""

    def embed(batch: Batch) -> np.ndarray:
        codes = np.asarray(batch.need("codes"), np.uint8)
        return codes.reshape(len(codes), -1)

    settings = {"distance": BITS, "per_prompt": per_prompt}
    return Diversity(Info("diversity_bits", version_of("instella-ray"), settings=settings), embed)


def feature_diversity(
    features: Features, *, images: ImageSettings = ImageSettings(size=256), per_prompt: int = 0
) -> Diversity:
    """Mean pairwise ``1 - cos`` of features among the images of a prompt."""
    settings = {"distance": COSINE, **features.settings, "images": images.describe(), "per_prompt": per_prompt}
    name = f"diversity_{features.name}"
    info = Info(name, features.implementation, features.weights, features.weights_hash, settings)
    return Diversity(info, lambda batch: features(images.prepare(batch.need("images"))))


def image_diversity(
    info: Info, distance: Callable[[np.ndarray, np.ndarray], np.ndarray], images: ImageSettings
) -> Diversity:
    """Mean of any ``distance(images, others) -> [B]`` (:func:`.lpips_distance.lpips_diversity`). Images are kept until
    their prompt is complete, so set ``per_prompt``."""

    def mean_distance(group: np.ndarray) -> float:
        first, second = np.triu_indices(len(group), 1)
        return float(np.mean(distance(group[first], group[second])))

    return Diversity(info, lambda batch: images.prepare(batch.need("images")), mean_distance)
