"""Simulate a cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .. import logs, storage
from ..config import ArgumentParser, add_overrides, check_output_file, load_config
from ..packages import extra_import


def parser(prog: str = "instella-ray simulate") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Simulate an endpoint, the data jobs and a training run with discrete events from stage times: the "
        "number of replicas for a load's latency limits, the number of CPUs that keep GPUs busy, the duration, and the "
        "bottleneck.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as in configs/simulation")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    parser.add_argument("--output", metavar="FILE", help="also write the tables to a Markdown file")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray simulate") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("simulate")
    if args.output:
        check_output_file(args.output)
    extra_import("simpy", "instella-ray simulate", "simulate")
    from ..planning.simulation.run import SimulateConfig, run_simulation

    report = run_simulation(load_config(SimulateConfig, args.config, args.overrides))
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
    if args.output:
        storage.write_text(args.output, f"{report.text()}\n")
    return 0
