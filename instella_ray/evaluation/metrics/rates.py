"""Metrics that are rates of correct images by category: GenEval, the scene score and label accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array


class SampleVerdict(NamedTuple):
    """Evaluation of one image."""

    category: str
    correct: bool | None
    """None if that cannot be told: the image is not counted."""
    reason: str
    """Reason for an incorrect image; empty if correct."""


VerdictsOf = Callable[[Batch], Sequence[SampleVerdict]]


class RateMetric(Metric):
    """Share of correct images in each category, and their unweighted mean, which is the score.

    Images without a verdict have no part in scores, groups, verdicts and rates; their number is told.

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
        return {name: float(bool(verdict.correct)) for name, (_, verdict) in self._counted()}

    def groups(self) -> dict[str, str]:
        """Return the group by sample id."""
        return {name: group for name, (group, _) in self._counted()}

    def verdicts(self) -> dict[str, SampleVerdict]:
        """Return the verdict by sample id."""
        return {name: verdict for name, (_, verdict) in self._counted()}

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        """Compute the mean over categories, with each category in ``parts``.

        Settings include the number of prompts, and of prompts with at least one correct image; and, if there are any,
        ``not_counted``: images without a verdict by category.
        """
        counted = self._counted()
        by_category: dict[str, list[tuple[str, bool]]] = {}
        for _, (group, verdict) in counted:
            by_category.setdefault(verdict.category, []).append((group, bool(verdict.correct)))
        about: dict[str, Any] = {"interval": statistics.WILSON, "confidence": confidence}
        rates, parts = [], []
        for category, rows in sorted(by_category.items()):
            groups, correct = zip(*rows, strict=True)
            rates.append(statistics.rate(np.array(correct), groups, confidence=confidence))
            part = self.make_result(*rates[-1][:3], len(rows), groups=len(set(groups)), **about)
            parts.append(MetricResult(**{**vars(part), "name": f"{self.info.name}/{category}"}))
        prompts: dict[str, bool] = {}
        for _, (group, verdict) in counted:
            prompts[group] = prompts.get(group, False) or bool(verdict.correct)
        about |= {"groups": len(prompts), "groups_with_a_correct_image": sum(prompts.values())}
        without = Counter(verdict.category for _, verdict in self._rows.values() if verdict.correct is None)
        about |= {"not_counted": dict(sorted(without.items()))} if without else {}
        overall = statistics.mean_of_rates(rates, confidence=confidence)
        return self.make_result(*overall[:3], len(counted), parts=tuple(parts), **about)

    def arrays(self) -> dict[str, np.ndarray]:
        rows = sorted(self._rows.items())
        return {
            "ids": text_array([name for name, _ in rows]),
            "groups": text_array([group for _, (group, _) in rows]),
            "categories": text_array([verdict.category for _, (_, verdict) in rows]),
            "correct": np.array(
                [-1 if verdict.correct is None else verdict.correct for _, (_, verdict) in rows], np.int8
            ),
            "reasons": text_array([verdict.reason for _, (_, verdict) in rows]),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        categories, correct, reasons = (arrays[name].tolist() for name in ("categories", "correct", "reasons"))
        told = (None if value < 0 else bool(value) for value in correct)
        verdicts = [SampleVerdict(*row) for row in zip(categories, told, reasons, strict=True)]
        self._add(arrays["ids"].tolist(), arrays["groups"].tolist(), verdicts)

    def _counted(self) -> list[tuple[str, tuple[str, SampleVerdict]]]:
        """Return id, group and verdict of the counted samples, by id."""
        return [row for row in sorted(self._rows.items()) if row[1][1].correct is not None]

    def _add(self, ids: Sequence[str], groups: Sequence[str], verdicts: Sequence[SampleVerdict]) -> None:
        self.claim(ids)
        self._rows.update((i, (g, SampleVerdict(*v))) for i, g, v in zip(ids, groups, verdicts, strict=True))
