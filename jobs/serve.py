"""Serve the endpoint until Ctrl-C, by default on loopback: `python jobs/serve.py --config configs/serve/demo.yaml`."""

from __future__ import annotations

import sys

from instella_ray.commands.serve import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
