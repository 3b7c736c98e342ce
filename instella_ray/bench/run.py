"""Benchmark runner: runs the configured suites, prints their tables, and writes the results as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field

from ..accelerator import hardware_summary
from ..config import Config, OutputPath, check_output_file
from ..packages import extra_import
from .bulk import BulkBench, run_bulk
from .caching import CachingBench, run_caching
from .claims.run import run_claims
from .claims.settings import ClaimsBench
from .data import DataBench, run_data
from .metrics import MetricsBench, run_metrics
from .overhead import OverheadBench, run_overhead
from .report import SuiteResult, write_results
from .samplers import SamplersBench, run_samplers
from .scheduling import SchedulingBench, run_scheduling
from .serving import ServingBench, run_serving
from .simulation_settings import SimulationBench
from .training import run_training
from .training_settings import TrainingBench
from .transport import TransportBench, run_transport

Suite = Literal[
    "caching",
    "overhead",
    "scheduling",
    "serving",
    "transport",
    "bulk",
    "metrics",
    "data",
    "training",
    "simulation",
    "samplers",
    "claims",
]


class BenchConfig(Config):
    """Suites to run and their options."""

    suites: tuple[Suite, ...] = (
        "caching",
        "overhead",
        "scheduling",
        "serving",
        "transport",
        "bulk",
        "metrics",
        "data",
        "training",
    )
    repeats: int = Field(5, ge=1)
    """Measured rounds of the suites without a server."""
    threads: int = Field(1, ge=1)
    """PyTorch threads of the suites without a server."""
    output: OutputPath = "runs/bench.json"
    caching: CachingBench = CachingBench()
    overhead: OverheadBench = OverheadBench()
    scheduling: SchedulingBench = SchedulingBench()
    serving: ServingBench = ServingBench()
    transport: TransportBench = TransportBench()
    bulk: BulkBench = BulkBench()
    metrics: MetricsBench = MetricsBench()
    data: DataBench = DataBench()
    training: TrainingBench = TrainingBench()
    simulation: SimulationBench = SimulationBench()
    samplers: SamplersBench = SamplersBench()
    claims: ClaimsBench = ClaimsBench()


def run_bench(cfg: BenchConfig) -> list[SuiteResult]:
    """Run all suites sequentially; results are written after each.

    Raises UserError for an output that cannot be written and if the suite ``simulation`` lacks its packages, before any
    suite runs.
    """
    check_output_file(cfg.output)
    if "simulation" in cfg.suites:
        extra_import("simpy", "suite simulation", "simulate")
        from . import simulation
    suites: dict[str, Callable[[], SuiteResult]] = {
        "caching": lambda: run_caching(cfg.caching, cfg.repeats),
        "overhead": lambda: run_overhead(cfg.overhead, 4 * cfg.repeats),
        "scheduling": lambda: run_scheduling(cfg.scheduling),
        "serving": lambda: run_serving(cfg.serving),
        "transport": lambda: run_transport(cfg.transport),
        "bulk": lambda: run_bulk(cfg.bulk),
        "metrics": lambda: run_metrics(cfg.metrics, cfg.repeats),
        "data": lambda: run_data(cfg.data),
        "training": lambda: run_training(cfg.training, cfg.repeats, cfg.threads),
        "samplers": lambda: run_samplers(cfg.samplers, f"{cfg.output.removesuffix('.json')}-measurements.json"),
        "simulation": lambda: simulation.run_simulation_bench(cfg.simulation),
        "claims": lambda: run_claims(cfg.claims, cfg.output.removesuffix(".json")),
    }
    print("\n" + ", ".join(f"{name} {value}" for name, value in hardware_summary().items()), flush=True)
    before = torch.get_num_threads()
    torch.set_num_threads(cfg.threads)
    results = []
    try:
        for name in cfg.suites:
            results.append(suites[name]())
            print(f"\n{results[-1].text()}", flush=True)
            write_results(cfg.output, results)
    finally:
        torch.set_num_threads(before)
    return results
