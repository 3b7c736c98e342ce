"""Measure one GPU: sampling, stages and training at full size."""

from __future__ import annotations

from ..bench.chip.run import run_gpu_bench
from ..bench.chip.settings import GpuBenchConfig
from ..job import Job


def run(cfg: GpuBenchConfig) -> int:
    whole = run_gpu_bench(cfg)
    print(f"\nall numbers are in {cfg.output}")
    return 0 if whole else 1


job = Job(
    "bench-gpu",
    GpuBenchConfig,
    run,
    "Measure one GPU in at most eight minutes, the most valuable parts first. Parts that the output file has are not "
    "measured again. The exit code is 1 if a part failed or was cut.",
    flags={"output": "output"},
    switches={"tiny": "tiny"},
)
parser, main = job.parser, job.main
