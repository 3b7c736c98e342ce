"""Sample in bulk: `python jobs/sample.py --config configs/sample/scenes.yaml --set model=DIR --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.sample import job, main
from instella_ray.errors import run_main

__all__ = ["job"]  # read by a submission

if __name__ == "__main__":
    sys.exit(run_main(main))
