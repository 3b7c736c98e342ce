"""``report.html`` of the demo: a self-contained page rendered from the stages' results and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..accelerator import hardware_summary
from ..data.curation.report import REPORT as CURATION
from ..data.formats.images import decode_rgb
from ..data.formats.patterns import pattern_text
from ..data.scene_score import score
from ..data.scenes import CATEGORIES, parse_caption
from ..rendering import Goal, render, svg_curves, thumbnail
from . import stages
from .recipe import KINDS, DemoConfig
from .stages import RECONSTRUCTIONS, Prompts
from .state import REPORT

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
        source=_source(demo),
        sets=results["icons"]["sets"] if demo.data == "icons" else {},
        results=results,
        pages={"Curation": f"curated/{CURATION}"},
        goals=goals(demo, results),
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
        reconstructions=list(_reconstructions(demo)),
        galleries=[(kind, _gallery(demo, prompts, kind)) for kind in KINDS],
        seconds={name: stage["seconds"] for name, stage in results.items()},
        speeds={name: _speed(rows) for name, rows in metrics.items()},
        hardware=hardware_summary(),
        versions={name: version(name) for name in ("instella-ray", "torch", "ray", "transformers")},
    )
    path = Path(demo.path(REPORT))
    path.write_text(page)
    return path


def goals(demo: DemoConfig, results: dict[str, dict[str, Any]]) -> list[Goal]:
    """Return the goals of the demo's default settings; none for other settings, which they were not set for."""
    if demo.model_copy(update={"folder": DemoConfig().folder, "seed": DemoConfig().seed}) != DemoConfig():
        return []
    diffusion, ar = (results["score"][kind] for kind in KINDS)
    return [
        Goal("held-out PSNR", results["tokenizer quality"]["psnr_after"], 26, ">=", "dB"),
        Goal("diffusion: scene score", diffusion["overall"], 0.9, ">="),
        Goal("diffusion: lowest category", min(diffusion[name] for name in CATEGORIES), 0.75, ">="),
        Goal("ar: scene score", ar["overall"], 0.85, ">="),
        Goal("ar: lowest category", min(ar[name] for name in CATEGORIES), 0.6, ">="),
    ]


def _source(demo: DemoConfig) -> str:
    """Return words for where the images are from."""
    if demo.data == "icons":
        return f"{len(demo.icons.sets)} sets of icons"
    return pattern_text(demo.shards or demo.images or "the procedural scenes")


def _series(metrics: dict[str, list[dict[str, Any]]], run: str, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in metrics[run]]


def _speed(rows: Sequence[dict[str, Any]]) -> float:
    speeds = [row["images_per_second"] for row in rows]
    return float(np.median(speeds)) if speeds else 0.0


def _score_rows(quality: dict[str, Any], scores: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    if "score_true" not in quality:
        return []
    rows = [("true images", quality["score_true"]), ("reconstructions", quality["score_restored"])]
    return rows + [(f"{kind} generator", scores[kind]) for kind in KINDS]


def _reconstructions(demo: DemoConfig) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield number, original and reconstruction of each image in ``reconstructions.png``."""
    originals, restored = np.split(np.asarray(decode_rgb(Path(demo.path(RECONSTRUCTIONS)).read_bytes())), 2)
    for number, left in enumerate(range(0, originals.shape[1], demo.size), start=1):
        columns = slice(left, left + demo.size)
        yield str(number), thumbnail(originals[:, columns], demo.size), thumbnail(restored[:, columns], demo.size)


def _gallery(demo: DemoConfig, prompts: Prompts, kind: str) -> list[dict[str, Any]]:
    """Return the first images of each category, with prompt and, for scenes, the scene detector's verdict."""
    shown, seen = [], dict.fromkeys([category for _, category in prompts], 0)
    limit = SHOWN if demo.draws_scenes else 6 * SHOWN
    for (prompt, category), image in zip(prompts, stages.sample_images(demo, kind), strict=True):
        if seen[category] == limit:
            continue
        seen[category] += 1
        verdict = score(image, parse_caption(prompt)) if demo.draws_scenes else None
        shown.append({"prompt": prompt, "image": thumbnail(image, demo.size), "verdict": verdict})
    return shown
