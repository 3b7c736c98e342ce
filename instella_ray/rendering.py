"""Report rendering: self-contained HTML pages, numbers, goals, SVG curves, inline images and Markdown tables."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

TEMPLATES = Path(__file__).with_name("templates")
"""Folder of ``base.html.j2``, which reports extend, and of what all pages share."""
COLORS = 6
"""Number of colours of curves in ``report.css``."""
LOSSLESS_SIZE = 128
"""Largest side in pixels of images stored as PNG, because their single pixels are visible."""
MAX_MARKED_POINTS = 20
"""Largest number of points of a curve that are drawn as markers."""

Cell = str | int | float


@dataclass(frozen=True)
class Goal:
    """Target for a measured value."""

    name: str
    value: float
    target: float
    kind: Literal[">=", "<="]
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the value meets the target."""
        return (operator.ge if self.kind == ">=" else operator.le)(self.value, self.target)

    def text(self) -> str:
        """Format the goal as one line."""
        value, target = digits(self.value, self.unit), digits(self.target, self.unit, 6)
        return f"{'met   ' if self.met else 'MISSED'} {self.name}: {value} (goal {self.kind} {target})"


def render(template: Path, **values: Any) -> str:
    """Render a template file to HTML; text is escaped, and an undefined name raises an error.

    Reports extend ``base.html.j2``; their ``pages`` are links to other pages, by label.
    """
    sections: dict[str, str] = {}

    def section(title: str, label: str | None = None) -> Markup:
        anchor = f"section-{len(sections) + 1}"
        sections[anchor] = label or title
        return Markup('<h2 id="{}">{}</h2>').format(anchor, title)

    page = _environment(template.parent).get_template(template.name)
    return printable(page.render(**{"section": section, "sections": sections, "pages": {}, **values}))


def printable(text: str) -> str:
    """Replace what UTF-8 cannot say: bytes of file names that are not UTF-8, and halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


@cache
def _environment(folder: Path) -> jinja2.Environment:
    """Return the environment of the templates in ``folder``, which keeps them compiled."""
    loader = jinja2.FileSystemLoader([folder, TEMPLATES])
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters |= {"digits": digits, "uri": image_uri}
    script = (TEMPLATES / "script.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    return page


def digits(value: float | None, unit: str = "", significant: int = 3) -> str:
    """Format a number for reading: ``1,234,567``, ``24.1 dB``, ``1.2e-9``; a dash for None or a value that is not finite.

    Whole numbers and digits before the decimal point are kept; others are rounded to ``significant`` digits, without
    zeros at the end.
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        mantissa, _, exponent = f"{value:.{significant - 1}e}".partition("e")
        text = f"{_without_zeros(mantissa)}e{int(exponent)}"
    elif value == int(value):
        text = f"{int(value):,}"
    else:
        places = max(0, significant - 1 - math.floor(math.log10(size)))
        text = _without_zeros(f"{value:,.{places}f}")
    return f"{text} {unit}" if unit else text


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested values to rows of a run card: dotted name and text."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value_text(value)


def value_text(value: Any) -> str:
    """Format a value of a run card; numbers with up to six significant digits, a dash for None."""
    if value is None or isinstance(value, float):
        return digits(value, significant=6)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


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


def image_uri(image: bytes | str) -> str:
    """Return the data URI of PNG or JPEG file bytes; a path relative to the page is returned as it is."""
    if isinstance(image, str):
        return image
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def svg_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    log: bool = False,
    axis: str = "step",
    spans: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    marks: Sequence[float] = (),
) -> Markup:
    """Draw line charts of (x, value) points as inline SVG; ``log`` uses a logarithmic value axis.

    ``spans`` are intervals (x, low, high) by series name, drawn as vertical bars. ``marks`` are places on the x axis, those
    within the chart drawn as dashed lines.
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
    for tick in np.linspace(low, high, 4 if high > low else 1):
        value = 10**tick if log else tick
        _, y = at(first, value)
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{digits(value)}</text>')
    parts.append(f'<text x="{left + 6}" y="{height - 6}">{digits(first)}</text>')
    parts.append(f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{escape(axis)} {digits(last)}</text>')
    for mark in (mark for mark in marks if first <= mark <= last):
        x, _ = at(mark, 10**low if log else low)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - bottom}" class="limit"/>')
    for place, (name, line) in enumerate(series.items()):
        color = f'class="series-{place % COLORS}"'
        dots = [at(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" {color} fill="none" stroke="currentColor" stroke-width="1.6"/>')
        if len(dots) <= MAX_MARKED_POINTS:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" {color} fill="currentColor"/>' for x, y in dots]
        for x, *ends in (spans or {}).get(name, ()):
            (x1, y1), (_, y2) = at(x, ends[0]), at(x, ends[1])
            ends_at = f'x1="{x1:.1f}" x2="{x1:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
            parts.append(f'<line {ends_at} {color} stroke="currentColor" stroke-opacity="0.5"/>')
        if len(series) > 1:
            column, row = left + 8 + 200 * (place % 2), height + 10 + 15 * (place // 2)
            parts.append(f'<text x="{column}" y="{row}" {color}>{escape(name)}</text>')
    below = 15 * ((len(series) + 1) // 2) if len(series) > 1 else 0
    return Markup(f'<svg viewBox="0 0 {width} {height + below}" role="img">{"".join(parts)}</svg>')


def _cell(value: Cell) -> str:
    return digits(value) if isinstance(value, float) else str(value)
