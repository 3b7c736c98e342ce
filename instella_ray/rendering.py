"""Report rendering: self-contained HTML pages, SVG curves, inline images and Markdown tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

TEMPLATES = Path(__file__).parent
"""Folder of ``page.html.j2``, the base template of all pages."""
COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
LOSSLESS_SIZE = 128
"""Largest side in pixels of images stored as PNG, because their single pixels are visible."""
MAX_MARKED_POINTS = 20
"""Largest number of points of a curve that are drawn as markers."""

Cell = str | int | float


def render(template: Path, **values: Any) -> str:
    """Render a template file to HTML; text is escaped, and an undefined name raises an error."""
    loader = jinja2.FileSystemLoader([template.parent, TEMPLATES])
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"number": number, "uri": data_uri}
    return page.get_template(template.name).render(**values)


def number(value: float | None) -> str:
    """Format a number with four significant digits; a dash for None or a value that is not finite."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.4g}"


def table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Format ``rows`` as a Markdown table with aligned columns; missing cells are empty."""
    if not rows:
        return "(nothing measured)"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def thumbnail(pixels: np.ndarray, size: int) -> bytes:
    """Encode uint8 ``[H, W, 3]``, downscaled to a longer side of ``size``: PNG if small, else JPEG; returns file bytes."""
    image = Image.fromarray(pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    if max(image.size) <= LOSSLESS_SIZE:
        return encode_png(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 ``[H, W, 3]`` as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """Return the data URI of PNG or JPEG file bytes."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def svg_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    log: bool = False,
    axis: str = "step",
    spans: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> Markup:
    """Draw line charts of (x, value) points as inline SVG; ``log`` uses a logarithmic value axis.

    ``spans`` are intervals (x, low, high) by series name, drawn as vertical bars.
    """
    width, height, left, bottom = 460, 200, 52, 24
    points = [point for line in series.values() for point in line]
    if not points:
        return Markup("<p>nothing was logged</p>")
    bars = [bar for spanned in (spans or {}).values() for bar in spanned]
    places = [x for x, _ in points]
    values = [v for _, v in points] + [end for _, *ends in bars for end in ends]
    scaled = np.log10(np.maximum(values, 1e-9)) if log else np.array(values)
    low, high = float(scaled.min()), float(scaled.max())
    first, last = min(places), max(places)

    def at(x: float, value: float) -> tuple[float, float]:
        level = float(np.log10(max(value, 1e-9))) if log else value
        along = (x - first) / (last - first) if last > first else 0.5
        up = (level - low) / ((high - low) or 1)
        return left + 6 + (width - left - 18) * along, 8 + (height - bottom - 8) * (1 - up)

    parts = []
    for tick in np.linspace(low, high, 4):
        value = 10**tick if log else tick
        _, y = at(first, value)
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{left + 6}" y="{height - 6}">{first:g}</text>')
    parts.append(f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{escape(axis)} {last:g}</text>')
    for place, (name, line) in enumerate(series.items()):
        color = COLORS[place % len(COLORS)]
        dots = [at(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(dots) <= MAX_MARKED_POINTS:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in dots]
        for x, *ends in (spans or {}).get(name, ()):
            (x1, y1), (_, y2) = at(x, ends[0]), at(x, ends[1])
            parts.append(
                f'<line x1="{x1:.1f}" x2="{x1:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-opacity="0.5"/>'
            )
        if len(series) > 1:
            column, row = left + 8 + 200 * (place % 2), height + 10 + 15 * (place // 2)
            parts.append(f'<text x="{column}" y="{row}" style="fill: {color}">{escape(name)}</text>')
    below = 15 * ((len(series) + 1) // 2) if len(series) > 1 else 0
    return Markup(f'<svg viewBox="0 0 {width} {height + below}" role="img">{"".join(parts)}</svg>')


def _cell(value: Cell) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
