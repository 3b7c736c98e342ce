"""Sample in bulk: `python jobs/sample.py --config configs/sample/scenes.yaml --set model=DIR --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.sample import job, main  # noqa: F401  submissions read the job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
