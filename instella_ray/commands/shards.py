"""Write a shard list."""

from __future__ import annotations

from collections.abc import Sequence

from .. import logs
from ..config import ArgumentParser
from ..data.formats.names import list_shards
from ..data.formats.sources import SUFFIXES


def parser(prog: str = "instella-ray shards") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Write the names and sizes of the WebDataset tars and parquet files that match PATTERN to a JSON file, "
        "which every job accepts as its input. A list named shards.json in the folder of its shards is also used for that "
        "folder.",
    )
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        nargs="+",
        help="path, glob, folder or URL; several are separated by commas or spaces",
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="path or URL of the list, ending with .json")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray shards") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("shards")
    made = list_shards(args.pattern[0] if len(args.pattern) == 1 else tuple(args.pattern), args.output, SUFFIXES)
    print(f"{args.output}: {len(made.shards)} shards, {made.bytes} bytes")
    return 0
