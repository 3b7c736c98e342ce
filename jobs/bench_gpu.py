"""Measure one GPU: `python jobs/bench_gpu.py --config configs/bench/gpu.yaml`; a rehearsal on any machine: `--tiny`."""

from __future__ import annotations

import sys

from instella_ray.commands.bench_gpu import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
