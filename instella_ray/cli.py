"""Command-line interface ``instella-ray``: the list of commands, each a file of :mod:`.commands`, loaded when it is run."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "start": {
        "demo": "run the whole pipeline on this machine, from captioned images to generated ones",
        "generate": "generate images of a prompt",
        "doctor": "check this machine, storage and configured models, and suggest fixes",
    },
    "data": {
        "shards": "write a shard list, which jobs read instead of listing a bucket",
        "curate": "filter and deduplicate captioned shards",
        "recaption": "describe the images of curated shards with a captioner",
        "synthesize": "generate a captioned set with pretrained text-to-image models",
        "encode": "encode curated shards as packed codes",
    },
    "training": {
        "plan": "predict a run's GPU-days, memory, storage, network traffic and cost",
        "train-tokenizer": "train a tokenizer, in one or several stages",
        "train-generator": "train a diffusion or autoregressive generator",
    },
    "results": {
        "sample": "sample images in bulk",
        "evaluate": "evaluate samples or a tokenizer, and write a report",
        "compare": "compare two evaluations, with the significance of differences",
        "lineage": "print the provenance of an image, model, run or data set",
        "serve": "serve text to image over HTTP",
    },
    "clusters": {
        "submit": "run a job on a cluster and follow its log",
        "simulate": "simulate replicas, CPU workers and a run's bottlenecks",
        "bench": "run the benchmarks",
    },
}
"""Group -> command -> description."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if name in ("-V", "--version"):
        print(f"instella-ray {__version__}")
        return 0
    known = [command for group in COMMANDS.values() for command in group]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean '{close[0]}'?" if close else f"; expected one of {', '.join(known)}"
        print(f"error: unknown command '{name}'{hint}", file=sys.stderr)
        return 2
    from .errors import run_main

    def run() -> int:
        command = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
        code: int = command.main(rest, prog=f"instella-ray {name}")
        return code

    return run_main(run)


def usage() -> str:
    """Return the text of ``--help``."""
    lines = ["usage: instella-ray COMMAND [OPTIONS]", "", "Instella-T2I on Ray: text to image over binary tokens."]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:<16} {about}" for name, about in commands.items())]
    return "\n".join([*lines, "", "instella-ray COMMAND --help describes a command; --version prints the version.", ""])


if __name__ == "__main__":
    sys.exit(main())
