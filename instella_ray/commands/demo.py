"""Run the whole pipeline on one machine."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .. import logs, storage
from ..config import ArgumentParser, add_config_arguments, describe, load_config
from ..demo.recipe import TINY, DemoConfig
from ..demo.run import run_demo
from ..demo.seeds import parse_seeds, read_results, result_rows, run_seeds
from ..demo.state import STATE
from ..errors import UserError
from ..job import resume_command
from ..rendering import table

log = logging.getLogger(__name__)


def parser(prog: str = "instella-ray demo") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Draw captioned scenes, build icons, or take your own images, curate them, train a tokenizer and two "
        "generators, serve them, sample over HTTP, evaluate, and write report.html. On two CPU cores that takes about eight "
        "minutes with scenes, and half an hour with icons.",
        epilog="configuration keys:\n" + "\n".join(describe(DemoConfig)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", help="output folder (default: demo)")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: 64)")
    parser.add_argument(
        "--data",
        choices=("scenes", "icons"),
        help="images: scenes, which are drawn (default), or icons, which are built from packages that npm fetches, as by "
        "instella-ray icons, with a larger recipe",
    )
    parser.add_argument(
        "--shards", help="captioned WebDataset tars to use instead of the scenes (path or glob); the last are held out"
    )
    parser.add_argument(
        "--images",
        metavar="PATH",
        help="captioned images to use instead of the scenes: a folder of image files with NAME.txt, NAME.caption or "
        "NAME.json beside them or metadata.csv, or a parquet, CSV, TSV or JSONL file; a share of them is held out",
    )
    parser.add_argument("--seed", type=int, help="seed of all stages (default: 0)")
    parser.add_argument(
        "--seeds",
        metavar="LIST",
        help="run the demo of several seeds one after another, such as 0-4 or 0,2,5, each in FOLDER/seed-N; finished ones "
        "are kept, interrupted ones resumed",
    )
    parser.add_argument(
        "--table", action="store_true", help="with --seeds: print their results as a table, with 95%% intervals"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="run the same stages in a few minutes, with meaningless images"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="resume an interrupted demo in the folder")
    existing.add_argument("--fresh", action="store_true", help="delete the folder's demo and start over")
    add_config_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray demo") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("demo")
    names = ("folder", "size", "data", "shards", "images", "seed")
    flags = {name: value for name in names if (value := getattr(args, name)) is not None}
    config = load_config(DemoConfig, args.config, args.overrides, flags={**(TINY if args.tiny else {}), **flags})
    if args.table and not args.seeds:
        raise UserError("--table: tabulates the demos of --seeds, such as --seeds 0-4")
    if args.table and not config.draws_scenes:
        raise UserError("--table: only images of the scenes are scored, expected neither icons nor shards nor images")
    if args.seeds:
        seeds = parse_seeds(args.seeds)
        run_seeds(config, seeds, _flags(args), "fresh" if args.fresh else "new")
        if args.table:
            print(table(result_rows(read_results(config, seeds))))
        return 0
    try:
        run_demo(config, "resume" if args.resume else "fresh" if args.fresh else "new")
    except KeyboardInterrupt:
        if storage.exists(config.path(STATE)):
            words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--fresh"]
            log.info("continue with: %s", resume_command(prog, words, ["--resume"]))
        raise
    return 0


def _flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that every seed's demo has in common."""
    flags = ["--tiny"] * args.tiny
    for name in ("config", "size", "data", "shards", "images"):
        if (value := getattr(args, name)) is not None:
            flags += [f"--{name}", str(value)]
    return flags + [word for override in args.overrides for word in ("--set", override)]
