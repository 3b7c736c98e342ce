"""Synthesize: `python jobs/synthesize.py --config configs/paper/03-synthesize.yaml --set prompts=FILE --set output=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.synthesize import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
