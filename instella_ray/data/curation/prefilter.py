"""First stage of curation: prefilters samples by source problems, image header, caption and metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from ..formats.images import UndecodableError, check_pixels, open_image
from ..formats.parts import DROPPED, KEPT, QUARANTINED, verdict_of
from ..formats.rows import SCHEMA
from .filters.base import Sample, Scores
from .filters.config import FilterConfig

PREFILTERED = SCHEMA.append(pa.field("verdict", pa.string())).append(pa.field("scores", pa.string()))
"""Columns of prefiltered rows: ``verdict`` (:class:`..formats.parts.Ledger`) and ``scores``, a JSON object of numbers."""


class Prefilter:
    """Adds a verdict and scores to every row, and removes the images of dropped rows, except examples for the report.

    Per table, ``examples`` images of each reason are kept for the shards ``shown``. Truncated JPEGs with an end marker are
    quarantined unless ``keep_truncated``.
    """

    def __init__(
        self, cfg: FilterConfig, shown: Collection[str] = (), examples: int = 0, *, keep_truncated: bool = False
    ) -> None:
        self.filters, self.shown, self.examples = cfg.of_samples(), frozenset(shown), examples
        self.keep_truncated = keep_truncated

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        dropped: Counter[tuple[str, str]] = Counter()
        for row in rows:
            row["verdict"], scores = self.verdict(row)
            row["scores"] = json.dumps(dict(scores))
            if row["verdict"].startswith(DROPPED):
                dropped[row["shard"], row["verdict"]] += 1
                row["members"] = None
                if row["shard"] not in self.shown or dropped[row["shard"], row["verdict"]] > self.examples:
                    row["image"] = None
        return pa.Table.from_pylist(rows, PREFILTERED)

    def verdict(self, row: dict[str, Any]) -> tuple[str, Scores]:
        """Return the verdict on a row of :data:`..formats.rows.SCHEMA`, and the scores measured for it."""
        scores: dict[str, float] = {}
        if row["problem"]:
            return verdict_of(row["problem"]), scores
        try:
            image = open_image(row["image"])
            sample = Sample(image.size, row["caption"], json.loads(row["meta"]))
            for sample_filter in self.filters:
                scores |= sample_filter.measure(sample)
                if reason := sample_filter.reason(scores):
                    return f"{DROPPED}:{reason}", scores
            check_pixels(
                row["image"], keep_truncated=self.keep_truncated
            )  # last, because it is the most expensive check
        except UndecodableError as error:
            return f"{QUARANTINED}:{error}", scores
        return KEPT, scores
