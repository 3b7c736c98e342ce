"""Print the provenance of an artifact."""

from __future__ import annotations

from collections.abc import Sequence

from .. import logs
from ..config import ArgumentParser
from ..operations.lineage import trace, tree


def parser(prog: str = "instella-ray lineage") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Print the runs, checkpoints and data that THING was made from, and whether each is unchanged. Exit "
        "code 1 if one has changed; missing ones are marked.",
    )
    parser.add_argument(
        "thing", metavar="THING", help="image file, model folder, run directory, or output folder of a job"
    )
    parser.add_argument(
        "--models", metavar="FOLDER", nargs="+", default=[], help="folders to search for models by weight hash"
    )
    parser.add_argument("--json", action="store_true", help="print the chain as JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray lineage") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("lineage")
    link = trace(args.thing, args.models)
    print(link.model_dump_json(indent=1) if args.json else tree(link))
    return int(any(each.state == "changed" for each in link.walk()))
