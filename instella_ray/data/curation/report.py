"""Curation report ``curation.html``: a funnel of samples, histograms of scores, and thumbnails, in a single file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ... import storage
from ...rendering import Goal, digits, render, thumbnail
from ..formats.images import decode_rgb
from ..formats.parts import DOWNLOAD_REASON, DROPPED, DUPLICATES, KEPT, Ledger, Part, Row
from ..formats.tar_source import read_samples
from ..job import AbortConfig
from .dedup import EXACT, NEAR
from .filters.base import Scale, ScoreLimits
from .filters.config import FilterConfig
from .stats import BINS, EXAMPLES, THUMBNAIL_SIZE, THUMBNAILS, edges, merged

REPORT = "curation.html"
PAIRS = 12
"""Maximum number of near duplicates shown beside the image that is kept instead."""


def write_report(folder: str, filters: FilterConfig, abort: AbortConfig, parts: Sequence[Part], ledger: Ledger) -> None:
    """Write the :data:`REPORT` of a finished curation into its output ``folder``."""
    counts = merged(part.notes.get("histograms", {}) for part in parts)
    limits = {name: found for section in filters.sections().values() for name, found in section.limits().items()}
    charts = [
        (name, svg_histogram(counts[name], scale, limits.get(name, ("", ScoreLimits()))[1]))
        for name, scale in filters.scales().items()
        if sum(counts.get(name, ()))
    ]
    images = _thumbnails(folder)
    page = render(
        Path(__file__).with_name("report.html.j2"),
        ledger=ledger,
        goals=goals(ledger, abort),
        funnel=list(funnel(ledger, filters)),
        charts=charts,
        galleries=[(verdict, images[verdict]) for verdict in sorted(images, key=lambda v: (v != KEPT, v))],
        pairs=list(_pairs(folder, parts, images.get(f"{DROPPED}:{NEAR}", []))),
    )
    storage.write_text(storage.join(folder, REPORT), page)


def goals(ledger: Ledger, abort: AbortConfig) -> list[Goal]:
    """Return the shares of failed samples (%) with the limits of the job."""
    total = max(1, ledger.total) / 100
    return [
        Goal("quarantined", ledger.quarantined.total() / total, 100 * abort.quarantined, "<=", "%"),
        Goal("failed downloads", ledger.failed_downloads / total, 100 * abort.failed_downloads, "<=", "%"),
    ]


def funnel(ledger: Ledger, filters: FilterConfig) -> Iterator[dict[str, Any]]:
    """Yield the number of samples removed and left at each step, in the order of the job: ``step, kind, lost, left``."""
    left = ledger.total
    downloads = [reason for reason in sorted(ledger.dropped) if reason.startswith(DOWNLOAD_REASON)]
    filter_reasons = [reason for section in filters.sections().values() for reason, _ in section.limits().values()]
    duplicate_reasons = [reason for reason in (EXACT, NEAR) if filters.duplicates]
    for kind, counts, reasons in (
        ("quarantined", ledger.quarantined, [reason for reason, _ in ledger.quarantined.most_common()]),
        (
            "dropped",
            ledger.dropped,
            [*downloads, *dict.fromkeys([*filter_reasons, *duplicate_reasons, *sorted(ledger.dropped)])],
        ),
    ):
        for reason in dict.fromkeys(reasons):
            left -= counts[reason]
            yield {"step": reason, "kind": kind, "lost": counts[reason], "left": left}


def svg_histogram(counts: Sequence[int], scale: Scale, limits: ScoreLimits) -> Markup:
    """Draw a histogram as SVG: bars outside the limits are pale, and each limit is a line with its value."""
    width, height, left, bottom = 460, 160, 12, 22
    ends = edges(scale)
    top, step = max(counts), (width - 2 * left) / BINS

    def place(value: float) -> float:
        low, high, at = (
            (np.log(v) for v in (scale.low, scale.high, value)) if scale.log else (scale.low, scale.high, value)
        )
        return left + (width - 2 * left) * float(np.clip((at - low) / (high - low), 0, 1))

    parts = []
    for number, count in enumerate(counts):
        tall = (height - bottom - 16) * count / top
        middle = float(np.sqrt(ends[number] * ends[number + 1]) if scale.log else ends[number : number + 2].mean())
        kind = "in" if limits.allow(middle) else "out"
        at = f'x="{left + number * step:.1f}" y="{height - bottom - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
        bin_name = f"{digits(ends[number])} to {digits(ends[number + 1])}"
        parts.append(f'<rect {at} class="{kind}"><title>{bin_name}: {digits(count)}</title></rect>')
    for limit in (limits.minimum, limits.maximum):
        if (limit is not None and limit > 0) or (limit == 0 and not scale.log):
            x = place(limit)
            anchor = "end" if x > width / 2 else "start"
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - bottom}" class="limit"/>')
            shift = -4 if anchor == "end" else 4
            parts.append(
                f'<text x="{x + shift:.1f}" y="12" text-anchor="{anchor}" class="limit">{digits(limit)}</text>'
            )
    for value, anchor in ((scale.low, "start"), (scale.high, "end")):
        parts.append(f'<text x="{place(value):.1f}" y="{height - 6}" text-anchor="{anchor}">{digits(value)}</text>')
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>')


def _thumbnails(folder: str) -> dict[str, list[Row]]:
    """Collect up to :data:`EXAMPLES` thumbnails of each verdict, alternating between the parts."""
    found: dict[str, list[list[Row]]] = defaultdict(list)
    for url in storage.glob(storage.join(folder, THUMBNAILS, "*.parquet")):
        rows = storage.read_parquet(url).to_pylist()
        for verdict in dict.fromkeys(row["verdict"] for row in rows):
            found[verdict].append([row for row in rows if row["verdict"] == verdict])
    gone = _decisions(folder)
    images: dict[str, list[Row]] = {}
    for verdict, lists in found.items():
        turns = (files[place] for place in range(EXAMPLES) for files in lists if place < len(files))
        # Excludes images that the first pass kept and the second pass dropped as duplicates.
        shown = [row for row in turns if verdict != KEPT or (row["part"], row["key"]) not in gone]
        images[verdict] = [{**row, "scores": _line(json.loads(row["scores"]))} for row in shown[:EXAMPLES]]
    return images


def _pairs(folder: str, parts: Sequence[Part], gone: Sequence[Row]) -> Iterator[dict[str, Row]]:
    """Yield near duplicates with the image kept instead: ``gone, stays`` (both with key, caption, image)."""
    files, decisions = {part.name: part.file for part in parts}, _decisions(folder)
    for row in [row for row in gone if (row["part"], row["key"]) in decisions][:PAIRS]:
        name, key = decisions[row["part"], row["key"]]
        url = storage.join(folder, str(files[name]))
        with storage.open_file(url) as stream:
            stays = next(sample for sample in read_samples(stream, url) if sample["key"] == key)
        pixels = np.asarray(decode_rgb(stays["image"], at_least=2 * THUMBNAIL_SIZE))
        yield {"gone": row, "stays": {**stays, "image": thumbnail(pixels, THUMBNAIL_SIZE)}}


def _decisions(folder: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Map the (part, key) of each duplicate to the (part, key) of the image kept instead."""
    url = storage.join(folder, DUPLICATES)
    if not storage.exists(url):
        return {}
    rows = storage.read_parquet(url).to_pylist()
    return {(row["part"], row["key"]): (row["of_part"], row["of_key"]) for row in rows}


def _line(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {digits(value)}" for name, value in scores.items())
