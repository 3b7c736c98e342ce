"""Train a classifier: `python jobs/train_classifier.py --config configs/icons/classifier.yaml --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.train_classifier import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
