"""Metrics that are shares of correct images, by category: GenEval and the scene score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import statistics
from .base import Batch, Info, Metric, Result, text_array


class Judged(NamedTuple):
    """One image's verdict."""

    category: str
    correct: bool
    reason: str
    """Why it is wrong; empty where it is correct."""


Judge = Callable[[Batch], Sequence[Judged]]


class RateMetric(Metric):
    """Share of correct images in each category, and their unweighted mean, which is the score.

    Intervals are Wilson's over groups: a bootstrap of a category that is all right or all wrong would claim certainty.
    """

    kind = "rate"

    def __init__(self, info: Info, judge: Judge | None = None) -> None:
        super().__init__(info)
        self.judge = judge
        self._rows: dict[str, tuple[str, Judged]] = {}

    def update(self, batch: Batch) -> None:
        if self.judge is None:
            raise RuntimeError(f"metric {self.info.name}: made from a state, it has nothing to judge with")
        self._add(batch.ids, batch.group_names, self.judge(batch))

    def scores(self) -> dict[str, float]:
        """1 or 0 by sample id."""
        return {name: float(judged.correct) for name, (_, judged) in sorted(self._rows.items())}

    def groups(self) -> dict[str, str]:
        """Each sample's group by id."""
        return {name: group for name, (group, _) in sorted(self._rows.items())}

    def verdicts(self) -> dict[str, Judged]:
        """Category, verdict and reason by sample id."""
        return {name: judged for name, (_, judged) in sorted(self._rows.items())}

    def result(self, confidence: float = 0.95, seed: int = 0) -> Result:
        """``value`` is the mean over categories; ``parts`` has each category; settings count correct prompts too."""
        by_category: dict[str, list[tuple[str, bool]]] = {}
        for _, (group, judged) in sorted(self._rows.items()):
            by_category.setdefault(judged.category, []).append((group, judged.correct))
        about: dict[str, Any] = {"interval": statistics.WILSON, "confidence": confidence}
        rates, parts = [], []
        for category, rows in sorted(by_category.items()):
            groups, correct = zip(*rows, strict=True)
            rates.append(statistics.rate(np.array(correct), groups, confidence=confidence))
            part = self.make_result(*rates[-1][:3], len(rows), groups=len(set(groups)), **about)
            parts.append(Result(**{**vars(part), "name": f"{self.info.name}/{category}"}))
        prompts: dict[str, bool] = {}
        for group, judged in self._rows.values():
            prompts[group] = prompts.get(group, False) or judged.correct
        about |= {"groups": len(prompts), "groups_with_a_correct_image": sum(prompts.values())}
        overall = statistics.mean_of_rates(rates, confidence=confidence)
        return self.make_result(*overall[:3], len(self._rows), parts=tuple(parts), **about)

    def arrays(self) -> dict[str, np.ndarray]:
        rows = sorted(self._rows.items())
        return {
            "ids": text_array([name for name, _ in rows]),
            "groups": text_array([group for _, (group, _) in rows]),
            "categories": text_array([judged.category for _, (_, judged) in rows]),
            "correct": np.array([judged.correct for _, (_, judged) in rows], bool),
            "reasons": text_array([judged.reason for _, (_, judged) in rows]),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        columns = (arrays[name].tolist() for name in ("categories", "correct", "reasons"))
        judged = [Judged(*row) for row in zip(*columns, strict=True)]
        self._add(arrays["ids"].tolist(), arrays["groups"].tolist(), judged)

    def _add(self, ids: Sequence[str], groups: Sequence[str], judged: Sequence[Judged]) -> None:
        self.claim(ids)
        self._rows.update((i, (g, Judged(*j))) for i, g, j in zip(ids, groups, judged, strict=True))
