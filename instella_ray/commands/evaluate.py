"""Evaluate samples."""

from __future__ import annotations

from ..evaluation.evaluate import EvaluateConfig, run_evaluate
from ..job import Job


def run(cfg: EvaluateConfig) -> None:
    print(f"report: {run_evaluate(cfg)}")


ABOUT = "Evaluate samples, or a tokenizer's reconstructions, and write report.html."
job = Job("evaluate", EvaluateConfig, run, ABOUT, switches={"local": "local"})
parser, main = job.parser, job.main
