"""Evaluate samples: `python jobs/evaluate.py --config configs/evaluation/scenes.yaml --set samples=DIR --set output=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.config import parse_job
from instella_ray.errors import run_main
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate


def main(argv: Sequence[str] | None = None) -> int:
    about = "Evaluate samples, or a tokenizer's reconstructions, and write report.html."
    cfg = parse_job(EvaluateConfig, argv, prog="evaluate.py", description=about, switches={"local": "local"})
    print(f"report: {run_evaluate(cfg)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
