"""Run the benchmarks of caching, engine and serving."""

from __future__ import annotations

from ..bench.run import BenchConfig, run_bench
from ..job import Job


def run(cfg: BenchConfig) -> None:
    goals = [goal for result in run_bench(cfg) for goal in result.goals]
    met = f"{sum(goal.met for goal in goals)} of {len(goals)} goals met; " if goals else ""
    print(f"\n{met}all numbers are in {cfg.output}")


job = Job("bench", BenchConfig, run, "Run benchmarks; ratios compare within one run.")
parser, main = job.parser, job.main
