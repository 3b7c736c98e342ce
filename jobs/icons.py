"""Build icons: `python jobs/icons.py --config configs/icons/build.yaml --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.icons import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
