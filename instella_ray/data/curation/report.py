"""Curation report ``curation.html``: a funnel of samples, histograms of scores, and thumbnails, in a single file.

The thumbnails are of images that were kept, kept with extreme scores, dropped, and quarantined.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup

from ... import storage
from ...rendering import Goal, digits, render
from ..formats.images import UndecodableError
from ..formats.parts import DOWNLOAD_REASON, DROPPED, DUPLICATES, KEPT, Ledger, Part, Row, read_quarantine
from ..formats.tar_index import read_index, read_ranges
from ..formats.tar_source import read_samples
from ..job import AbortConfig
from .dedup import EXACT, NEAR
from .filters.base import Scale, ScoreLimits
from .filters.config import FilterConfig
from .stats import BINS, BORDERLINE, EXAMPLES, THUMBNAILS, Histogram, edges, merged, most_extreme, small_image

REPORT = "curation.html"
PAIRS = 12
"""Maximum number of near duplicates shown beside the image that is kept instead."""
QUARANTINE_EXAMPLES = 20
"""Maximum number of quarantined samples shown per reason."""
READERS = 16


def write_report(folder: str, filters: FilterConfig, abort: AbortConfig, parts: Sequence[Part], ledger: Ledger) -> None:
    """Write the :data:`REPORT` of a finished curation into its output ``folder``."""
    counts = merged(part.notes.get("histograms", {}) for part in parts)
    limits = filters.limits()
    charts = [
        (name, svg_histogram(counts[name], scale, limits.get(name, ScoreLimits())))
        for name, scale in filters.scales().items()
        if np.any(counts.get(name, ()))
    ]
    images = _thumbnails(folder)
    page = render(
        Path(__file__).with_name("report.html.j2"),
        ledger=ledger,
        goals=goals(ledger, abort),
        funnel=list(funnel(ledger, filters)),
        charts=charts,
        borderline=list(_borderline(folder, parts, limits)),
        galleries=[(verdict, images[verdict]) for verdict in sorted(images, key=lambda v: (v != KEPT, v))],
        pairs=list(_pairs(folder, parts, images.get(f"{DROPPED}:{NEAR}", []))),
        quarantined=[(reason, ledger.quarantined[reason], rows) for reason, rows in quarantined(folder, parts, ledger)],
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


def svg_histogram(counts: Histogram, scale: Scale, limits: ScoreLimits) -> Markup:
    """Draw a histogram as SVG: counts outside the limits are pale, on top of the others; each limit is a line."""
    width, height, left, bottom = 460, 160, 12, 22
    ends = edges(scale)
    top, step = max(map(sum, zip(*counts, strict=True))), (width - 2 * left) / BINS

    def place(value: float) -> float:
        low, high, at = (
            (np.log(v) for v in (scale.low, scale.high, value)) if scale.log else (scale.low, scale.high, value)
        )
        return left + (width - 2 * left) * float(np.clip((at - low) / (high - low), 0, 1))

    parts = []
    for number, (within, outside) in enumerate(zip(*counts, strict=True)):
        bin_name, y = f"{digits(ends[number])} to {digits(ends[number + 1])}", float(height - bottom)
        for kind, count, where in (("in", within, "within"), ("out", outside, "outside")):
            if count:
                tall = (height - bottom - 16) * count / top
                y -= tall
                at = f'x="{left + number * step:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
                title = f"{bin_name}: {digits(count)} {where} the limits"
                parts.append(f'<rect {at} class="{kind}"><title>{title}</title></rect>')
    for limit in limits.sides().values():
        if limit > 0 or (limit == 0 and not scale.log):
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


def _borderline(folder: str, parts: Sequence[Part], limits: Mapping[str, ScoreLimits]) -> Iterator[dict[str, Any]]:
    """Yield the kept images with the most extreme scores at each limit, in order: ``score, side, limit, rows``."""
    files = {part.name: part.file for part in parts}
    names = {f"{part.name}.{part.decided}" if part.decided else part.name for part in parts}
    urls = storage.glob(storage.join(folder, BORDERLINE, "*.parquet"))
    current = [url for url in urls if url.rpartition("/")[2].removesuffix(".parquet") in names]
    found: list[Row] = []
    for data in storage.read_many(current):
        found = most_extreme([*found, *pq.read_table(pa.BufferReader(data)).to_pylist()])
    shown = list(dict.fromkeys((row["part"], row["key"]) for row in found))
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(lambda at: _kept_image(storage.join(folder, str(files[at[0]])), at[1]), shown)
        images = dict(zip(shown, read, strict=True))
    for score, bounds in limits.items():
        for side, limit in bounds.sides().items():
            rows = [row for row in found if (row["score"], row["side"]) == (score, side)]
            if rows:
                rows = [{**row, "image": images[row["part"], row["key"]]} for row in rows]
                yield {"score": score, "side": side, "limit": limit, "rows": rows}


def _kept_image(url: str, key: str) -> bytes:
    """Read the thumbnail of the sample ``key`` of a tar."""
    index = read_index(url)
    (place,) = index.filter(pc.equal(index["key"], key)).to_pylist()
    (data,) = read_ranges([url], [place["offset"]], [place["bytes"]])
    return small_image(data)


def quarantined(folder: str, parts: Sequence[Part], ledger: Ledger) -> Iterator[tuple[str, list[Row]]]:
    """Yield the reasons for quarantine, the most frequent first, each with up to :data:`QUARANTINE_EXAMPLES` samples.

    These alternate between the parts, and have ``key, shard, caption``, ``files`` (names and sizes) and ``image``, a
    thumbnail (None: cannot be decoded). One file is held in memory at a time.
    """
    wanted: dict[str, Counter[str]] = defaultdict(Counter)  # numbers of samples by part and reason
    for reason in ledger.quarantined:
        counts = {part.name: count for part in parts if (count := part.ledger["quarantined"].get(reason))}
        turns = (name for place in range(QUARANTINE_EXAMPLES) for name in counts if place < counts[name])
        for name in islice(turns, QUARANTINE_EXAMPLES):
            wanted[name][reason] += 1
    found: dict[str, list[Row]] = defaultdict(list)
    for part in parts:
        if part.name in wanted:
            table = read_quarantine(folder, part, ["key", "shard", "caption", "image", "members", "reason"])
            reasons = table["reason"].to_pylist()
            for reason, number in wanted[part.name].items():
                places = [place for place, other in enumerate(reasons) if other == reason][:number]
                found[reason] += [_quarantined_row(row) for row in table.take(places).to_pylist()]
    for reason, _ in ledger.quarantined.most_common():
        yield reason, found[reason]


def _quarantined_row(row: Row) -> Row:
    data = row["image"]
    try:
        image = small_image(data) if data else None
    except UndecodableError:
        image = None
    files = [] if data is None else [("image", len(data))]
    files += [(member["name"], member["size"]) for member in row["members"] or ()]
    shown = ", ".join(f"{name} {digits(size, 'bytes')}" for name, size in files)
    return {"key": row["key"], "shard": row["shard"], "caption": row["caption"], "image": image, "files": shown}


def _pairs(folder: str, parts: Sequence[Part], gone: Sequence[Row]) -> Iterator[dict[str, Row]]:
    """Yield near duplicates with the image kept instead: ``gone, stays`` (both with key, caption, image)."""
    files, decisions = {part.name: part.file for part in parts}, _decisions(folder)
    for row in [row for row in gone if (row["part"], row["key"]) in decisions][:PAIRS]:
        name, key = decisions[row["part"], row["key"]]
        url = storage.join(folder, str(files[name]))
        with storage.open_file(url) as stream:
            stays = next(sample for sample in read_samples(stream, url) if sample["key"] == key)
        yield {"gone": row, "stays": {**stays, "image": small_image(stays["image"])}}


def _decisions(folder: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Map the (part, key) of each duplicate to the (part, key) of the image kept instead."""
    url = storage.join(folder, DUPLICATES)
    if not storage.exists(url):
        return {}
    rows = storage.read_parquet(url).to_pylist()
    return {(row["part"], row["key"]): (row["of_part"], row["of_key"]) for row in rows}


def _line(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {digits(value)}" for name, value in scores.items())
