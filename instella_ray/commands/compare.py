"""Compare two evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from .. import logs
from ..config import ArgumentParser
from ..evaluation.compare import NOTE, compare


def parser(prog: str = "instella-ray compare") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Compare two outputs of jobs/evaluate.py. Metrics with scores per sample are compared by a paired test "
        "over samples of the same prompts, others by confidence intervals. Metrics measured differently are listed and "
        "not compared.",
    )
    parser.add_argument("a", metavar="A", help="output folder; FOLDER#SETTING selects one setting of a sweep")
    parser.add_argument("b", metavar="B", help="second output folder; differences are B minus A")
    parser.add_argument("--output", metavar="FILE", help="also write an HTML page with images of the same prompts")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray compare") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("compare")
    for comparison in compare(args.a, args.b, args.output):
        print(comparison.text() + "\n")
    print(f"95 % intervals; {NOTE}")
    if args.output:
        print(f"page: {args.output}")
    return 0
