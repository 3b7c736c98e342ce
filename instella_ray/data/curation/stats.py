"""Statistics of curation, per part: thumbnails, fingerprints, and histograms of scores.

Histograms have fixed axes, so that they can be merged over parts, machines and runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ... import storage
from ...rendering import thumbnail
from ..formats.images import UndecodableError, decode_rgb
from ..formats.parts import DROPPED, KEPT, Row
from .dedup import FIELDS
from .filters.base import Scale, Scores

THUMBNAILS, FINGERPRINTS = "thumbnails", "fingerprints"
SHOWN_SHARDS = 64
"""Maximum number of shards with thumbnails, which limits their number for large datasets."""
EXAMPLES = 24
"""Number of images per verdict in the report."""
THUMBNAIL_SIZE = 144
THUMBNAIL = pa.schema(
    [
        ("verdict", pa.string()),
        ("part", pa.string()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("scores", pa.string()),
        ("image", pa.binary()),
    ]
)
FINGERPRINT = pa.schema([("key", pa.string()), *FIELDS])


def shown_shards(labels: Collection[str]) -> set[str]:
    """Choose the shards of which thumbnails are kept, by a hash of their labels; deterministic."""
    return set(sorted(labels, key=lambda label: hashlib.sha256(label.encode()).digest())[:SHOWN_SHARDS])


class CurationNotes:
    """Writes thumbnails and fingerprints of a part, and returns its histograms.

    This is the ``note`` of :class:`..formats.parts.PartWriter`.
    """

    def __init__(self, folder: str, scales: Mapping[str, Scale], shown: Collection[str]) -> None:
        self.folder, self.scales, self.shown = folder, scales, frozenset(shown)
        self.examples = math.ceil(EXAMPLES / max(1, len(shown)))

    def __call__(self, name: str, rows: list[Row]) -> dict[str, Any]:
        if rows[0]["shard"] in self.shown:
            write_thumbnails(self.folder, name, name, rows, self.examples)
        prints = [row for row in rows if row["verdict"] == KEPT and "near" in row]
        if prints:
            url = storage.join(self.folder, FINGERPRINTS, f"{name}.parquet")
            storage.write_parquet(url, pa.Table.from_pylist(prints, FINGERPRINT))
        scores = [json.loads(row["scores"]) for row in rows]
        return {"histograms": histograms(self.scales, scores), FINGERPRINTS: len(prints)}


def write_thumbnails(folder: str, name: str, part: str, rows: Sequence[Row], examples: int) -> None:
    """Write thumbnails of the first ``examples`` images of each verdict among the rows of ``part`` to the file ``name``."""
    shown: Counter[str] = Counter()
    small = []
    for row in rows:
        verdict = row["verdict"]
        if row["image"] and (verdict == KEPT or verdict.startswith(DROPPED)) and shown[verdict] < examples:
            try:
                pixels = np.asarray(decode_rgb(row["image"], at_least=2 * THUMBNAIL_SIZE))
            except UndecodableError:  # dropped by a filter before it was decoded
                continue
            shown[verdict] += 1
            small.append({**row, "part": part, "image": thumbnail(pixels, THUMBNAIL_SIZE)})
    if small:
        url = storage.join(folder, THUMBNAILS, f"{name}.parquet")
        storage.write_parquet(url, pa.Table.from_pylist(small, THUMBNAIL))


BINS = 40

Histograms = dict[str, list[int]]
"""Name of a score -> counts of its :data:`BINS` bins."""


def edges(scale: Scale) -> np.ndarray:
    """Return the ``BINS + 1`` edges of the bins, float64."""
    if scale.log:
        return np.geomspace(scale.low, scale.high, BINS + 1)
    return np.linspace(scale.low, scale.high, BINS + 1)


def histograms(scales: Mapping[str, Scale], scores: Sequence[Scores]) -> Histograms:
    """Count the values of every score in bins; values outside its scale count in the first or the last bin."""
    counts: Histograms = {}
    for name, scale in scales.items():
        values = np.array([row[name] for row in scores if name in row])
        bins = np.clip(np.searchsorted(edges(scale), values, side="right") - 1, 0, BINS - 1)
        counts[name] = np.bincount(bins, minlength=BINS).tolist()
    return counts


def merged(parts: Iterable[Histograms]) -> Histograms:
    """Return the sum of histograms."""
    total: Histograms = {}
    for part in parts:
        for name, counts in part.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0] * BINS), counts, strict=True)]
    return total
