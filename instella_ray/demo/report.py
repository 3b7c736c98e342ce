"""``report.html`` of the demo: a self-contained page rendered from the stages' results and files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..accelerator import hardware_summary
from ..data.scene_score import score
from ..data.scenes import CATEGORIES, parse_caption
from ..rendering import data_uri, encode_png, render, svg_curves
from . import stages
from .recipe import KINDS, DemoConfig
from .stages import Prompts

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN = 8
"""Images of each category in the grid."""


def write_report(demo: DemoConfig, prompts: Prompts, results: dict[str, dict[str, Any]]) -> Path:
    """Render the report from the stages' results; returns its path."""
    metrics = stages.curves(demo)
    quality = results["tokenizer quality"]
    page = render(
        TEMPLATE,
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
            ("Generators: loss (nats per bit)", svg_curves({k: _series(metrics, k, "loss") for k in KINDS})),
            ("Generators: bit accuracy", svg_curves({k: _series(metrics, k, "bit_accuracy") for k in KINDS})),
        ],
        reconstructions=data_uri(Path(demo.path("reconstructions.png")).read_bytes()),
        galleries=[(kind, _gallery(demo, prompts, kind)) for kind in KINDS],
        seconds={name: stage["seconds"] for name, stage in results.items()},
        speeds={name: _speed(rows) for name, rows in metrics.items()},
        hardware=hardware_summary(),
        versions={name: version(name) for name in ("instella-ray", "torch", "ray", "transformers")},
    )
    path = Path(demo.path("report.html"))
    path.write_text(page)
    return path


def _series(metrics: dict[str, list[dict[str, Any]]], run: str, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in metrics[run]]


def _speed(rows: Sequence[dict[str, Any]]) -> float:
    speeds = [row["images_per_second"] for row in rows]
    return round(float(np.median(speeds)), 1) if speeds else 0.0


def _score_rows(quality: dict[str, Any], scores: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    if "score_true" not in quality:
        return []
    rows = [("true images", quality["score_true"]), ("reconstructions", quality["score_restored"])]
    return rows + [(f"{kind} generator", scores[kind]) for kind in KINDS]


def _gallery(demo: DemoConfig, prompts: Prompts, kind: str) -> list[dict[str, Any]]:
    """Return the first images of each category, with prompt and, for scenes, the scene detector's verdict."""
    shown, seen = [], dict.fromkeys([category for _, category in prompts], 0)
    limit = SHOWN if demo.draws_scenes else 6 * SHOWN
    for (prompt, category), image in zip(prompts, stages.sample_images(demo, kind), strict=True):
        if seen[category] == limit:
            continue
        seen[category] += 1
        verdict = score(image, parse_caption(prompt)) if demo.draws_scenes else None
        shown.append({"prompt": prompt, "image": data_uri(encode_png(image)), "verdict": verdict})
    return shown
