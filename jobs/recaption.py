"""Recaption: `python jobs/recaption.py --config configs/paper/02-recaption.yaml --set input=DIR --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.recaption import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
