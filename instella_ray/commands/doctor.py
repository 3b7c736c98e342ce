"""Check a machine, storage and models."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .. import logs
from ..config import ArgumentParser
from ..operations.doctor import examine, report


def parser(prog: str = "instella-ray doctor") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Check versions, accelerators, memory, disk, limits and authentication, and the given storage and "
        "weights. Exit code 1 if there is a problem.",
    )
    for flag, metavar, about in (
        ("--storage", "URL", "storage to check by writing, reading, listing and deleting an object"),
        ("--models", "FOLDER", "model folders to load"),
        ("--config", "FILE", "job configurations whose model folders and text encoders to check"),
    ):
        parser.add_argument(flag, metavar=metavar, nargs="+", default=[], help=about)
    parser.add_argument("--address", help="check every node of this Ray cluster (auto: the running local one)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray doctor") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("doctor")
    found = examine(stores=args.storage, models=args.models, configs=args.config, address=args.address)
    print(json.dumps([each.model_dump() for each in found], indent=1) if args.json else report(found))
    return int(any(each.level == "problem" for each in found))
