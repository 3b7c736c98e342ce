"""Predict the cost of a training run, or what an endpoint needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import logs
from ..config import ArgumentParser, add_overrides, load_config, read_yaml, validate
from ..errors import UserError
from ..planning.endpoint import plan_endpoint
from ..planning.plan import PlanOptions, plan_run
from ..training.generator import GeneratorRunConfig
from ..training.stages import TokenizerStagesConfig
from ..training.tokenizer import TokenizerConfig
from .serve import ServeJobConfig


def parser(prog: str = "instella-ray plan") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Predict what a job needs from its configuration. A run of jobs/train_generator.py or "
        "jobs/train_tokenizer.py: FLOP per sample from the networks' sizes, time from a measured throughput or MFU, memory. "
        "An endpoint (jobs/serve.py): memory of each stage, which replicas fit on a GPU together, the number of GPUs, and "
        "the least times of a step and an image; of the options only --device has an effect. All assumptions are printed.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    add_overrides(parser)
    parser.add_argument("--gpus", metavar="N", help="same as --set train.workers.count=N")
    for name, field in PlanOptions.model_fields.items():
        about: dict[str, Any] = {"help": f"{field.description} (default: {field.default})", "default": None}
        about |= {"action": "store_true"} if field.annotation is bool else {"metavar": "VALUE"}
        parser.add_argument(_flag(name), **about)
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray plan") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("plan")
    given = {name: value for name in PlanOptions.model_fields if (value := getattr(args, name)) is not None}
    options = validate(PlanOptions, given, None, {name: f"{_flag(name)} {value}" for name, value in given.items()})
    keys = read_yaml(args.config)
    if "app" in keys:
        if unused := [_flag(name) for name in (*given, *(["gpus"] if args.gpus else [])) if name != "device"]:
            raise UserError(f"{unused[0]}: has no effect on the plan of an endpoint")
        endpoint = plan_endpoint(load_config(ServeJobConfig, args.config, args.overrides).app, options)
        print(json.dumps(endpoint.as_dict(), indent=1) if args.json else endpoint.text())
        return 0
    if "applications" in keys:
        raise UserError(f"{args.config}: in the form of Ray Serve; expected its args under app, as in serve/paper")
    overrides = [*args.overrides, *([f"train.workers.count={args.gpus}"] if args.gpus else [])]
    runs: Mapping[str, TokenizerConfig | GeneratorRunConfig]
    if "data" in keys:
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
    return 0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
