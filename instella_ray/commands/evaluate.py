"""Evaluate samples."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import parse_job
from ..evaluation.evaluate import EvaluateConfig, run_evaluate


def main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    about = "Evaluate samples, or a tokenizer's reconstructions, and write report.html."
    cfg = parse_job(EvaluateConfig, argv, prog=prog, description=about, switches={"local": "local"})
    print(f"report: {run_evaluate(cfg)}")
    return 0
