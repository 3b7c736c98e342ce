"""Curate shards: `python jobs/curate.py --config configs/data/curate.yaml --set input='SHARDS' --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.curate import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
