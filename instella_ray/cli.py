"""Command-line interface ``instella-ray``; cluster jobs are in ``jobs/``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import logs
from .config import ArgumentParser, add_config_arguments, add_overrides, describe, load_config, read_yaml, validate
from .errors import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit code."""
    parser = ArgumentParser(prog="instella-ray", description="Instella-T2I on Ray.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_compare(commands)
    _add_shards(commands)
    _add_plan(commands)
    _add_simulate(commands)
    _add_lineage(commands)
    _add_doctor(commands)
    args = parser.parse_args(argv)
    logs.begin_job(args.command)
    return run_main(lambda: args.run(args))


def _add_demo(commands: argparse._SubParsersAction[ArgumentParser]) -> None:
    from .demo.recipe import DemoConfig

    demo = commands.add_parser(
        "demo",
        help="run the whole pipeline on this machine, from captioned images to generated ones",
        description="Draw captioned scenes, curate them, train a tokenizer and two generators, serve them, sample over "
        "HTTP, evaluate, and write report.html. Takes about 13 minutes on two CPU cores.",
        epilog="configuration keys:\n" + "\n".join(describe(DemoConfig)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--folder", help="output folder (default: demo)")
    demo.add_argument("--size", type=int, help="side of the images in pixels (default: 64)")
    demo.add_argument(
        "--shards", help="captioned WebDataset tars to use instead of the scenes (path or glob); the last are held out"
    )
    demo.add_argument("--seed", type=int, help="seed of all stages (default: 0)")
    demo.add_argument(
        "--tiny", action="store_true", help="run the same stages in a few minutes, with meaningless images"
    )
    existing = demo.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="resume an interrupted demo in the folder")
    existing.add_argument("--fresh", action="store_true", help="delete the folder's demo and start over")
    add_config_arguments(demo)
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from .demo.recipe import TINY, DemoConfig
    from .demo.run import run_demo

    flags = {name: value for name in ("folder", "size", "shards", "seed") if (value := getattr(args, name)) is not None}
    config = load_config(DemoConfig, args.config, args.overrides, flags={**(TINY if args.tiny else {}), **flags})
    run_demo(config, "resume" if args.resume else "fresh" if args.fresh else "new")


def _add_compare(commands: argparse._SubParsersAction[ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="compare two evaluations, with the significance of differences",
        description="Compare two outputs of jobs/evaluate.py. Metrics with scores per sample are compared by a paired test "
        "over samples of the same prompts, others by confidence intervals. Metrics measured differently are listed and "
        "not compared.",
    )
    command.add_argument("a", metavar="A", help="output folder; FOLDER#SETTING selects one setting of a sweep")
    command.add_argument("b", metavar="B", help="second output folder; differences are B minus A")
    command.add_argument("--output", metavar="FILE", help="also write an HTML page with images of the same prompts")
    command.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    from .evaluation.compare import NOTE, compare

    for comparison in compare(args.a, args.b, args.output):
        print(comparison.text() + "\n")
    print(f"95 % intervals; {NOTE}")
    if args.output:
        print(f"page: {args.output}")


def _add_shards(commands: argparse._SubParsersAction[ArgumentParser]) -> None:
    command = commands.add_parser(
        "shards",
        help="write a shard list, which jobs read instead of listing a bucket",
        description="Write the names and sizes of the WebDataset tars and parquet files that match PATTERN to a JSON file, "
        "which every job accepts as its input. A list named shards.json in the folder of its shards is also used for that "
        "folder.",
    )
    command.add_argument("pattern", metavar="PATTERN", help="path, glob or folder, or several separated by commas")
    command.add_argument("--output", metavar="FILE", required=True, help="path or URL of the list, ending with .json")
    command.set_defaults(run=_shards)


def _shards(args: argparse.Namespace) -> None:
    from .data.formats.names import list_shards
    from .data.formats.sources import SUFFIXES

    made = list_shards(args.pattern, args.output, SUFFIXES)
    print(f"{args.output}: {len(made.shards)} shards, {made.bytes} bytes")


def _add_plan(commands: argparse._SubParsersAction[ArgumentParser]) -> None:
    from .planning.plan import PlanOptions

    command = commands.add_parser(
        "plan",
        help="predict a training run's GPU-days, memory, storage, network traffic and cost",
        description="Predict a run of jobs/train_generator.py or jobs/train_tokenizer.py from its configuration: FLOP per "
        "sample from the networks' sizes, time from a measured throughput or MFU. All assumptions are printed.",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    add_overrides(command)
    command.add_argument("--gpus", metavar="N", help="same as --set train.workers.count=N")
    for name, field in PlanOptions.model_fields.items():
        about: dict[str, Any] = {"help": f"{field.description} (default: {field.default})", "default": None}
        about |= {"action": "store_true"} if field.annotation is bool else {"metavar": "VALUE"}
        command.add_argument(_flag(name), **about)
    command.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    command.set_defaults(run=_plan)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plan(args: argparse.Namespace) -> None:
    from .planning.plan import PlanOptions, plan_run
    from .training.generator import GeneratorRunConfig
    from .training.stages import TokenizerStagesConfig
    from .training.tokenizer import TokenizerConfig

    given = {name: value for name in PlanOptions.model_fields if (value := getattr(args, name)) is not None}
    options = validate(PlanOptions, given, None, {name: f"{_flag(name)} {value}" for name, value in given.items()})
    overrides = [*args.overrides, *([f"train.workers.count={args.gpus}"] if args.gpus else [])]
    runs: Mapping[str, TokenizerConfig | GeneratorRunConfig]
    if "data" in read_yaml(args.config):
        tokenizer = load_config(TokenizerStagesConfig, args.config, overrides)
        runs = tokenizer.each() or {"": tokenizer}
    else:
        runs = {"": load_config(GeneratorRunConfig, args.config, overrides)}
    plans = {name: plan_run(run, options) for name, run in runs.items()}
    if args.json:
        figures = {name: plan.as_dict() for name, plan in plans.items()}
        print(json.dumps(figures.get("", figures), indent=1))
    else:
        print("\n\n".join((f"{name}\n" if name else "") + plan.text() for name, plan in plans.items()))


def _add_simulate(commands: argparse._SubParsersAction[ArgumentParser]) -> None:
    command = commands.add_parser(
        "simulate",
        help="simulate the replicas for a load, the CPU workers for GPUs, and a run's bottlenecks",
        description="Simulate an endpoint, the data jobs and a training run with discrete events from stage times: the "
        "number of replicas for a load's latency limits, the number of CPUs that keep GPUs busy, the duration, and the "
        "bottleneck.",
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file, as in configs/simulation")
    add_overrides(command)
    command.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    command.add_argument("--output", metavar="FILE", help="also write the tables to a Markdown file")
    command.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace) -> None:
    from . import storage
    from .packages import extra_import

    extra_import("simpy", "instella-ray simulate", "simulate")
    from .planning.simulation.run import SimulateConfig, run_simulation

    report = run_simulation(load_config(SimulateConfig, args.config, args.overrides))
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
    if args.output:
        storage.write_text(args.output, f"{report.text()}\n")


def _add_lineage(commands: argparse._SubParsersAction[ArgumentParser]) -> None:
    command = commands.add_parser(
        "lineage",
        help="print the provenance of an image, model, run, or set of codes or samples, down to the source shards",
        description="Print the runs, checkpoints and data that THING was made from, and whether each is unchanged. Exit "
        "code 1 if one has changed; missing ones are marked.",
    )
    command.add_argument(
        "thing", metavar="THING", help="image file, model folder, run directory, or output folder of a job"
    )
    command.add_argument(
        "--models", metavar="FOLDER", nargs="+", default=[], help="folders to search for models by weight hash"
    )
    command.add_argument("--json", action="store_true", help="print the chain as JSON")
    command.set_defaults(run=_lineage)


def _lineage(args: argparse.Namespace) -> int:
    from .operations.lineage import trace, tree

    link = trace(args.thing, args.models)
    print(link.model_dump_json(indent=1) if args.json else tree(link))
    return int(any(each.state == "changed" for each in link.walk()))


def _add_doctor(commands: argparse._SubParsersAction[ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="check this machine, storage and configured models, and suggest fixes",
        description="Check versions, accelerators, memory, disk, limits and authentication, and the given storage and "
        "weights. Exit code 1 if there is a problem.",
    )
    for flag, metavar, about in (
        ("--storage", "URL", "storage to check by writing, reading, listing and deleting an object"),
        ("--models", "FOLDER", "model folders to load"),
        ("--config", "FILE", "job configurations whose model folders and text encoders to check"),
    ):
        command.add_argument(flag, metavar=metavar, nargs="+", default=[], help=about)
    command.add_argument("--address", help="check every node of this Ray cluster (auto: the running local one)")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from .operations.doctor import examine, report

    found = examine(stores=args.storage, models=args.models, configs=args.config, address=args.address)
    print(json.dumps([each.model_dump() for each in found], indent=1) if args.json else report(found))
    return int(any(each.level == "problem" for each in found))


if __name__ == "__main__":
    sys.exit(main())
