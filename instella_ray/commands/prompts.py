"""Write a file of prompts with labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from .. import logs, storage
from ..config import ArgumentParser, check_output_file
from ..data.formats.texts import CAPTION_NAMES
from ..data.prompt_groups import grouped_prompts
from ..errors import UserError


def parser(prog: str = "instella-ray prompts") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Choose captions of the images that match PATTERN as prompts, equally many of each group, by a hash, and "
        "write them with their labels to a JSONL file, which sampling and evaluation read.",
    )
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="+", help="tars, parquet files or folders of captioned images"
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="path or URL of the file, ending with .jsonl")
    parser.add_argument(
        "--by", metavar="KEY", default="split", help="key of KEY.json whose values are the groups (split)"
    )
    labels = "labels to keep, keys of KEY.json (style concept)"
    parser.add_argument("--labels", metavar="KEY", nargs="*", default=["style", "concept"], help=labels)
    parser.add_argument("--count", metavar="N", type=int, default=200, help="prompts of each group (200)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the choice (0)")
    keys = "names of captions, in order of preference"
    parser.add_argument("--caption-keys", metavar="KEY", nargs="+", default=list(CAPTION_NAMES), help=keys)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray prompts") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("prompts")
    if not args.output.endswith(".jsonl"):
        raise UserError(f"--output {args.output}: expected a name ending with .jsonl")
    check_output_file(args.output)
    if storage.exists(args.output):
        raise UserError(f"--output {args.output}: exists; choose another name")
    if args.count < 1:
        raise UserError(f"--count {args.count}: expected at least 1")
    pattern = args.pattern[0] if len(args.pattern) == 1 else tuple(args.pattern)
    prompts = grouped_prompts(pattern, args.by, args.labels, args.count, args.seed, args.caption_keys)
    rows = ({"id": p.id, "prompt": p.text, "category": p.category, **p.meta} for p in prompts)
    storage.write_text(args.output, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    groups = Counter(prompt.category for prompt in prompts)
    print(f"{args.output}: {', '.join(f'{number} {group}' for group, number in groups.items())}")
    return 0
