"""Statistics of curation, per part: thumbnails, fingerprints, images with extreme scores, and histograms of scores.

Histograms have fixed axes, so that they can be merged over parts, machines and runs.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from ... import storage
from ...rendering import thumbnail
from ..formats.images import UndecodableError, decode_rgb
from ..formats.parts import DROPPED, KEPT, Row
from .dedup import FIELDS
from .filters.base import Scale, ScoreLimits, Scores
from .filters.config import FilterConfig

THUMBNAILS, FINGERPRINTS, BORDERLINE = "thumbnails", "fingerprints", "borderline"
SHOWN_SHARDS = 64
"""Maximum number of shards with thumbnails, which limits their number for large datasets."""
EXAMPLES = 24
"""Number of images per verdict in the report."""
BORDERLINE_EXAMPLES = 20
"""Number of kept images in the report with the most extreme scores at each limit."""
CAPTION_CHARS = 100
"""Number of characters of a caption that are stored with such an image."""
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
BORDERLINE_IMAGE = pa.schema(
    [
        ("score", pa.string()),
        ("side", pa.string()),
        ("value", pa.float64()),
        ("part", pa.string()),
        ("key", pa.string()),
        ("caption", pa.string()),
    ]
)
"""Kept image with an extreme score; ``side`` is a bound of :class:`.filters.base.ScoreLimits`."""


def shown_shards(labels: Collection[str]) -> set[str]:
    """Choose the shards of which thumbnails are kept, by a hash of their labels; deterministic."""
    return set(sorted(labels, key=lambda label: hashlib.sha256(label.encode()).digest())[:SHOWN_SHARDS])


class CurationNotes:
    """Writes thumbnails, fingerprints and the images with extreme scores of a part, and returns its histograms.

    This is the ``note`` of :class:`..formats.parts.PartWriter`.
    """

    def __init__(self, folder: str, filters: FilterConfig, shown: Collection[str]) -> None:
        self.folder, self.filters, self.shown = folder, filters, frozenset(shown)
        self.examples = math.ceil(EXAMPLES / max(1, len(shown)))

    def __call__(self, name: str, rows: list[Row]) -> dict[str, Any]:
        if rows[0]["shard"] in self.shown:
            write_thumbnails(self.folder, name, name, rows, self.examples)
        kept = [row for row in rows if row["verdict"] == KEPT]
        write_borderline(self.folder, name, name, self.filters.limits(), kept)
        prints = [row for row in kept if "near" in row]
        if prints:
            url = storage.join(self.folder, FINGERPRINTS, f"{name}.parquet")
            storage.write_parquet(url, pa.Table.from_pylist(prints, FINGERPRINT))
        scores = [json.loads(row["scores"]) for row in rows]
        return {"histograms": histograms(self.filters, scores), FINGERPRINTS: len(prints)}


def write_thumbnails(folder: str, name: str, part: str, rows: Sequence[Row], examples: int) -> None:
    """Write thumbnails of the first ``examples`` images of each verdict among the rows of ``part`` to the file ``name``."""
    shown: Counter[str] = Counter()
    small = []
    for row in rows:
        verdict = row["verdict"]
        if row["image"] and (verdict == KEPT or verdict.startswith(DROPPED)) and shown[verdict] < examples:
            try:
                image = small_image(row["image"])
            except UndecodableError:  # dropped by a filter before it was decoded
                continue
            shown[verdict] += 1
            small.append({**row, "part": part, "image": image})
    if small:
        url = storage.join(folder, THUMBNAILS, f"{name}.parquet")
        storage.write_parquet(url, pa.Table.from_pylist(small, THUMBNAIL))


def small_image(data: bytes) -> bytes:
    """Encode an image as a thumbnail for the report; UndecodableError for invalid data."""
    return thumbnail(np.asarray(decode_rgb(data, at_least=2 * THUMBNAIL_SIZE)), THUMBNAIL_SIZE)


def write_borderline(folder: str, name: str, part: str, limits: Mapping[str, ScoreLimits], kept: Iterable[Row]) -> None:
    """Write the images with the most extreme scores at each limit, of the ``kept`` rows of ``part``, to the file ``name``."""
    found = most_extreme(_candidates(part, limits, kept))
    if found:
        url = storage.join(folder, BORDERLINE, f"{name}.parquet")
        storage.write_parquet(url, pa.Table.from_pylist(found, BORDERLINE_IMAGE))


def _candidates(part: str, limits: Mapping[str, ScoreLimits], kept: Iterable[Row]) -> Iterator[Row]:
    for row in kept:
        scores = json.loads(row["scores"])
        about = {"part": part, "key": row["key"], "caption": row["caption"][:CAPTION_CHARS]}
        for name, bounds in limits.items():
            if name in scores:
                for side in bounds.sides():
                    yield {"score": name, "side": side, "value": scores[name], **about}


def most_extreme(rows: Iterable[Row]) -> list[Row]:
    """Select the :data:`BORDERLINE_EXAMPLES` most extreme rows at each limit, in order; of equal ones, the first given.

    These are the lowest values at a minimum, and the highest at a maximum. Rows have the columns of
    :data:`BORDERLINE_IMAGE`. The result for several lists is that for their results.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["score"], row["side"]].append(row)
    value = itemgetter("value")
    return [
        row
        for (_, side), found in groups.items()
        for row in (heapq.nsmallest if side == "minimum" else heapq.nlargest)(BORDERLINE_EXAMPLES, found, value)
    ]


BINS = 40

Histogram = list[list[int]]
"""Counts ``[2][BINS]`` of the values within and outside the limits, as the filter decided."""
Histograms = dict[str, Histogram]
"""Name of a score -> its histogram."""


def edges(scale: Scale) -> np.ndarray:
    """Return the ``BINS + 1`` edges of the bins, float64."""
    if scale.log:
        return np.geomspace(scale.low, scale.high, BINS + 1)
    return np.linspace(scale.low, scale.high, BINS + 1)


def histograms(filters: FilterConfig, scores: Sequence[Scores]) -> Histograms:
    """Count the values of every score in bins, those for which a filter drops the sample apart.

    Values outside the scale count in the first or the last bin.
    """
    outside = [filters.outside(row) for row in scores]
    counts: Histograms = {}
    for name, scale in filters.scales().items():
        values = np.array([row[name] for row in scores if name in row])
        kept = np.array([name not in out for row, out in zip(scores, outside, strict=True) if name in row], bool)
        bins = np.clip(np.searchsorted(edges(scale), values, side="right") - 1, 0, BINS - 1)
        counts[name] = [np.bincount(bins[chosen], minlength=BINS).tolist() for chosen in (kept, ~kept)]
    return counts


def merged(parts: Iterable[Histograms]) -> Histograms:
    """Return the sum of histograms."""
    total: Histograms = {}
    for part in parts:
        for name, counts in part.items():
            total[name] = np.add(total.get(name, 0), counts).tolist()
    return total
