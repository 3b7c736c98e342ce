"""``report.html``: one file without outside assets, from what the stages left in the demo's folder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..accelerator import hardware_summary
from ..data.decode import encode_png
from ..data.scene_score import score
from ..data.scenes import CATEGORIES, parse_caption
from . import stages
from .recipe import KINDS, DemoConfig
from .stages import Prompts

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN = 8
"""Pictures of each category in the grid."""
COLORS = ("#2563eb", "#d97706", "#059669")


def write_report(demo: DemoConfig, prompts: Prompts, results: dict[str, dict[str, Any]]) -> Path:
    """Render the report from the stages' results; returns its path."""
    metrics = stages.curves(demo)
    quality = results["tokenizer quality"]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    page = template.render(
        demo=demo,
        results=results,
        quality=quality,
        scores=_score_rows(quality, results["score"]),
        categories=[*CATEGORIES, "overall"],
        curves=[
            (
                "Tokenizer: PSNR of training batches (dB)",
                svg_curves({"tokenizer": _series(metrics, "tokenizer", "psnr")}),
            ),
            ("Tokenizer: loss", svg_curves({"tokenizer": _series(metrics, "tokenizer", "loss")}, log=True)),
            ("Generators: loss (nats a bit)", svg_curves({k: _series(metrics, k, "loss") for k in KINDS})),
            ("Generators: bit accuracy", svg_curves({k: _series(metrics, k, "bit_accuracy") for k in KINDS})),
        ],
        reconstructions=_data_uri(Path(demo.path("reconstructions.png")).read_bytes()),
        galleries=[(kind, _gallery(demo, prompts, kind)) for kind in KINDS],
        seconds={name: stage["seconds"] for name, stage in results.items()},
        speeds={name: _speed(rows) for name, rows in metrics.items()},
        hardware=hardware_summary(),
        versions={name: version(name) for name in ("instella-ray", "torch", "ray", "transformers")},
    )
    path = Path(demo.path("report.html"))
    path.write_text(page)
    return path


def svg_curves(series: dict[str, list[tuple[float, float]]], *, log: bool = False) -> Markup:
    """Line charts of (step, value) points as inline SVG; ``log`` takes the value axis logarithmically."""
    width, height, left, bottom = 460, 200, 52, 24
    points = [point for line in series.values() for point in line]
    if not points:
        return Markup("<p>nothing was logged</p>")
    steps = [step for step, _ in points]
    values = np.log10([max(v, 1e-9) for _, v in points]) if log else np.array([v for _, v in points])
    low, high = float(values.min()), float(values.max())
    spread, last = (high - low) or 1.0, max(steps) or 1

    def place(step: float, value: float) -> str:
        scaled = float(np.log10(max(value, 1e-9))) if log else value
        x = left + (width - left - 8) * step / last
        return f"{x:.1f},{8 + (height - bottom - 8) * (1 - (scaled - low) / spread):.1f}"

    parts = []
    for tick in np.linspace(low, high, 4):
        y = 8 + (height - bottom - 8) * (1 - (tick - low) / spread)
        label = f"{10**tick if log else tick:.3g}"
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {last:g}</text>')
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(place(step, value) for step, value in line)
        color = COLORS[number % len(COLORS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(series) > 1:
            parts.append(f'<text x="{left + 8 + 90 * number}" y="{height - 6}" fill="{color}">{name}</text>')
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>')


def _series(metrics: dict[str, list[dict[str, Any]]], run: str, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in metrics[run]]


def _speed(rows: Sequence[dict[str, Any]]) -> float:
    speeds = [row["images_per_second"] for row in rows]
    return round(float(np.median(speeds)), 1) if speeds else 0.0


def _score_rows(quality: dict[str, Any], scores: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    if "score_true" not in quality:
        return []
    rows = [("true pictures", quality["score_true"]), ("reconstructions", quality["score_restored"])]
    return rows + [(f"{kind} generator", scores[kind]) for kind in KINDS]


def _gallery(demo: DemoConfig, prompts: Prompts, kind: str) -> list[dict[str, Any]]:
    """The first pictures of each category, with their prompt and, for scenes, the scorer's verdict."""
    shown, seen = [], dict.fromkeys([category for _, category in prompts], 0)
    limit = SHOWN if demo.shards is None else 6 * SHOWN
    for (prompt, category), picture in zip(prompts, stages.sample_pictures(demo, kind), strict=True):
        if seen[category] == limit:
            continue
        seen[category] += 1
        verdict = score(picture, parse_caption(prompt)) if demo.shards is None else None
        shown.append({"prompt": prompt, "image": _data_uri(encode_png(picture)), "verdict": verdict})
    return shown


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
