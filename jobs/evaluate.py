"""Evaluate samples: `python jobs/evaluate.py --config configs/evaluation/scenes.yaml --set samples=DIR --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.evaluate import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
