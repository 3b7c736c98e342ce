"""Run the benchmarks of caching, engine and serving."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.run import BenchConfig, run_bench
from ..config import parse_job


def main(argv: Sequence[str] | None = None, prog: str = "bench.py") -> int:
    cfg = parse_job(BenchConfig, argv, prog=prog, description="Run benchmarks; ratios compare within one run.")
    goals = [goal for result in run_bench(cfg) for goal in result.goals]
    print(f"\n{sum(goal.met for goal in goals)} of {len(goals)} goals met; all numbers are in {cfg.output}")
    return 0
