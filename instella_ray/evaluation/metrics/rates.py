"""Metrics that are rates of correct images by category: GenEval and the scene score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array


class SampleVerdict(NamedTuple):
    """Evaluation of one image."""

    category: str
    correct: bool
    reason: str
    """Reason for an incorrect image; empty if correct."""


VerdictsOf = Callable[[Batch], Sequence[SampleVerdict]]


class RateMetric(Metric):
    """Share of correct images in each category, and their unweighted mean, which is the score.

    Intervals are Wilson's over groups: a bootstrap of a category with all images correct, or none, would have zero width.
    """

    kind = "rate"

    def __init__(self, info: Info, verdicts_of: VerdictsOf | None = None) -> None:
        super().__init__(info)
        self.verdicts_of = verdicts_of
        self._rows: dict[str, tuple[str, SampleVerdict]] = {}

    def update(self, batch: Batch) -> None:
        if self.verdicts_of is None:
            raise RuntimeError(f"metric {self.info.name}: made from a state, without a detector to update with")
        self._add(batch.ids, batch.group_names, self.verdicts_of(batch))

    def scores(self) -> dict[str, float]:
        """Return 1 (correct) or 0 by sample id."""
        return {name: float(verdict.correct) for name, (_, verdict) in sorted(self._rows.items())}

    def groups(self) -> dict[str, str]:
        """Return the group by sample id."""
        return {name: group for name, (group, _) in sorted(self._rows.items())}

    def verdicts(self) -> dict[str, SampleVerdict]:
        """Return the verdict by sample id."""
        return {name: verdict for name, (_, verdict) in sorted(self._rows.items())}

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        """Compute the mean over categories, with each category in ``parts``.

        Settings include the number of prompts, and of prompts with at least one correct image.
        """
        by_category: dict[str, list[tuple[str, bool]]] = {}
        for _, (group, verdict) in sorted(self._rows.items()):
            by_category.setdefault(verdict.category, []).append((group, verdict.correct))
        about: dict[str, Any] = {"interval": statistics.WILSON, "confidence": confidence}
        rates, parts = [], []
        for category, rows in sorted(by_category.items()):
            groups, correct = zip(*rows, strict=True)
            rates.append(statistics.rate(np.array(correct), groups, confidence=confidence))
            part = self.make_result(*rates[-1][:3], len(rows), groups=len(set(groups)), **about)
            parts.append(MetricResult(**{**vars(part), "name": f"{self.info.name}/{category}"}))
        prompts: dict[str, bool] = {}
        for group, verdict in self._rows.values():
            prompts[group] = prompts.get(group, False) or verdict.correct
        about |= {"groups": len(prompts), "groups_with_a_correct_image": sum(prompts.values())}
        overall = statistics.mean_of_rates(rates, confidence=confidence)
        return self.make_result(*overall[:3], len(self._rows), parts=tuple(parts), **about)

    def arrays(self) -> dict[str, np.ndarray]:
        rows = sorted(self._rows.items())
        return {
            "ids": text_array([name for name, _ in rows]),
            "groups": text_array([group for _, (group, _) in rows]),
            "categories": text_array([verdict.category for _, (_, verdict) in rows]),
            "correct": np.array([verdict.correct for _, (_, verdict) in rows], bool),
            "reasons": text_array([verdict.reason for _, (_, verdict) in rows]),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        columns = (arrays[name].tolist() for name in ("categories", "correct", "reasons"))
        verdicts = [SampleVerdict(*row) for row in zip(*columns, strict=True)]
        self._add(arrays["ids"].tolist(), arrays["groups"].tolist(), verdicts)

    def _add(self, ids: Sequence[str], groups: Sequence[str], verdicts: Sequence[SampleVerdict]) -> None:
        self.claim(ids)
        self._rows.update((i, (g, SampleVerdict(*v))) for i, g, v in zip(ids, groups, verdicts, strict=True))
