"""Compare evaluations, with each other or with the paper's tables."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .. import logs, storage
from ..config import ArgumentParser, check_output_file
from ..evaluation.compare import PAGE, compare
from ..evaluation.differences import NOTE
from ..evaluation.paper_tables import paper_tables
from ..rendering import printable


def parser(prog: str = "instella-ray compare") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Compare outputs of jobs/evaluate.py with the first of them: intervals of all differences, paired tests "
        "over samples of the same prompts, whether a difference is within its interval, and what else differs. Metrics "
        "measured differently are listed and not compared.",
    )
    parser.add_argument("baseline", metavar="A", help="output folder; FOLDER#SETTING is one setting of a sweep")
    parser.add_argument(
        "others", metavar="B", nargs="*", help="further ones (none: those of a sweep); differences are B - A"
    )
    parser.add_argument(
        "--output", metavar="FILE", help=f"also write an HTML page with images of the same prompts ({PAGE} in a folder)"
    )
    parser.add_argument(
        "--paper-tables",
        action="store_true",
        help="instead, lay the evaluations out as tables 1 to 3 of the paper, below its own rows, each in the table of its "
        "preset; --output writes them to a Markdown file",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray compare") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("compare")
    output: str | None = args.output
    if args.paper_tables:
        return _paper_tables([args.baseline, *args.others], output, json_wanted=args.json)
    if output and (output.endswith("/") or storage.kind(output) == "directory"):
        output = storage.join(output, PAGE)
    found = compare(args.baseline, *args.others, output=output)
    if args.json:
        print(json.dumps({"note": NOTE, "comparisons": [each.as_dict() for each in found]}, indent=1, allow_nan=False))
        return 0
    for comparison in found:
        print(printable(comparison.text()) + "\n")
    print(f"{NOTE}.")
    if output:
        print(printable(f"page: {output}"))
    return 0


def _paper_tables(folders: Sequence[str], output: str | None, *, json_wanted: bool) -> int:
    if output:
        check_output_file(output)
    tables = paper_tables(folders)
    text = "\n".join(each.text() for each in tables)
    if output:
        storage.write_text(output, f"# Tables of the paper\n\n{text}")
    print(json.dumps([vars(each) for each in tables], indent=1) if json_wanted else printable(text))
    return 0
