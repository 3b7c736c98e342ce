"""Run the benchmarks of caching, engine and serving: `python jobs/bench.py --config configs/bench/quick.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instella_ray.bench.run import BenchConfig, run_bench
from instella_ray.config import parse_job
from instella_ray.errors import run_main


def main(argv: Sequence[str] | None = None) -> int:
    cfg = parse_job(BenchConfig, argv, prog="bench.py", description="Run benchmarks; ratios compare within one run.")
    goals = [goal for result in run_bench(cfg) for goal in result.goals]
    print(f"\n{sum(goal.met for goal in goals)} of {len(goals)} goals met; all numbers are in {cfg.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
