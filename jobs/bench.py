"""Run the benchmarks of caching, engine and serving: `python jobs/bench.py --config configs/bench/quick.yaml`."""

from __future__ import annotations

import sys

from instella_ray.commands.bench import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
