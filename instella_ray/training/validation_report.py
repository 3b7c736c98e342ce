"""``report.html`` of a run's validation: metrics of all checkpoints over steps, beside the images and reports of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import storage
from ..evaluation.report import REPORT
from ..models.folders import checkpoint_name
from ..rendering import render, svg_curves

TEMPLATE = Path(__file__).with_name("validation.html.j2")
EVALUATION, IMAGE = "evaluation", "restorations.png"
"""Outputs in a checkpoint's folder: the folder of its evaluation, and the reconstructions of a tokenizer."""


def write_report(folder: Path, run: str, rows: Sequence[Mapping[str, Any]], best: int, best_by: str) -> None:
    """Write the report of a run's validated checkpoints ``rows`` into ``folder``; ``best`` is the best step.

    Images and reports of checkpoints are linked by relative paths, not copied.
    """
    # By the configuration's names, which may be those of metrics that these stand in for.
    names = {key: str(result["name"]) for row in rows for key, result in row["metrics"].items()}
    page = render(
        TEMPLATE,
        run=run,
        pages={"Training": "../report.html"} if (folder.parent / REPORT).exists() else {},
        rows=rows,
        metrics=names,
        best=best,
        best_by=names.get(best_by, best_by),
        curves=[(name, _curve(key, name, rows)) for key, name in names.items()],
        reports=_existing(folder, rows, f"{EVALUATION}/{REPORT}"),
        images=_existing(folder, rows, IMAGE),
    )
    storage.write_text(str(folder / REPORT), page)


def _curve(key: str, name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    found = [(row["step"], row["metrics"][key]) for row in rows if key in row["metrics"]]
    known = [(step, result) for step, result in found if result["value"] is not None]
    spans = [(step, r["low"], r["high"]) for step, r in known if None not in (r["low"], r["high"])]
    return svg_curves({name: [(step, result["value"]) for step, result in known]}, spans={name: spans})


def _existing(folder: Path, rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, str]:
    """Return relative paths of the files ``name`` that checkpoints have, by step."""
    paths = {row["step"]: f"{checkpoint_name(row['step'])}/{name}" for row in rows}
    return {step: path for step, path in paths.items() if (folder / path).exists()}
