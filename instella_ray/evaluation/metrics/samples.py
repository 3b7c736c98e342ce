"""Metrics that are a mean over samples: PSNR, SSIM, LPIPS, CLIP score, ImageReward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array

Score = Callable[[Batch], np.ndarray]
"""Function that returns one finite score per sample, float64 ``[B]``."""
IsCut = Callable[[Sequence[str]], Sequence[bool]]
"""Function that says of each prompt whether the text model cuts it."""


class SampleMetric(Metric):
    """Mean of one score per sample, with an interval over groups.

    Samples are sorted by id first, so the result does not depend on the order of shards. A metric of prompts has the
    setting ``text_limit`` (tokens), and counts the prompts that its text model cuts.
    """

    kind = "sample"

    def __init__(self, info: Info, score: Score | None = None, is_cut: IsCut | None = None) -> None:
        super().__init__(info)
        self.score, self.is_cut = score, is_cut
        self._rows: dict[str, tuple[str, float]] = {}
        self._cut: set[str] = set()
        """Ids of the samples whose prompt was cut."""

    def update(self, batch: Batch) -> None:
        if self.score is None:
            raise RuntimeError(f"metric {self.info.name}: made from a state, without a network to update with")
        values = np.asarray(self.score(batch), np.float64)
        if values.shape != (len(batch),):
            raise RuntimeError(f"metric {self.info.name}: {values.shape} scores for {len(batch)} samples")
        self._add(batch.ids, batch.group_names, values)
        if self.is_cut is not None:
            cut = self.is_cut(batch.need("prompts"))
            self._cut.update(name for name, yes in zip(batch.ids, cut, strict=True) if yes)

    def scores(self) -> dict[str, float]:
        """Return the score by sample id, for best and worst images and paired comparisons."""
        return {name: value for name, (_, value) in sorted(self._rows.items())}

    def groups(self) -> dict[str, str]:
        """Return the group by sample id."""
        return {name: group for name, (group, _) in sorted(self._rows.items())}

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        values = np.array(list(self.scores().values()))
        groups = list(self.groups().values())
        interval = statistics.bootstrap_mean(values, groups, confidence=confidence, seed=seed)
        value = float(values.mean()) if len(values) else float("nan")
        count = len(set(groups))
        about: dict[str, Any] = {"interval": statistics.mean_method(count), "confidence": confidence, "groups": count}
        cautions: tuple[str, ...] = ()
        if (limit := self.info.settings.get("text_limit")) is not None:
            cut = len({self._rows[name][0] for name in self._cut})
            about["truncated_prompts"] = cut
            cautions = (f"{cut} of {count} prompts were cut to the text model's {limit} tokens",) if cut else ()
        return self.make_result(value, *interval, len(values), cautions=cautions, **about)

    def arrays(self) -> dict[str, np.ndarray]:
        rows = sorted(self._rows.items())
        return {
            "ids": text_array([name for name, _ in rows]),
            "groups": text_array([group for _, (group, _) in rows]),
            "values": np.array([value for _, (_, value) in rows], np.float64),
            "cut": np.array([name in self._cut for name, _ in rows], bool),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._add(arrays["ids"].tolist(), arrays["groups"].tolist(), arrays["values"])
        self._cut.update(arrays["ids"][arrays["cut"]].tolist())

    def _add(self, ids: Sequence[str], groups: Sequence[str], values: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise UserError(
                f"metric {self.info.name}: sample {ids[bad[0]]} has score {values[bad[0]]}, expected a finite number"
            )
        self.claim(ids)
        self._rows.update((name, (group, float(value))) for name, group, value in zip(ids, groups, values, strict=True))
