"""Command-line interface ``instella-ray``: runs one of the :mod:`.commands`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from . import __version__
from .commands import COMMANDS, NAMES, load


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if name in ("-V", "--version"):
        print(f"instella-ray {__version__}")
        return 0
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f", did you mean '{close[0]}'?" if close else f"; expected one of {', '.join(NAMES)}"
        print(f"error: unknown command '{name}'{hint}", file=sys.stderr)
        return 2
    from .errors import run_main

    def run() -> int:
        code: int = load(name).main(rest, prog=f"instella-ray {name}")
        return code

    return run_main(run)


def usage() -> str:
    """Return the text of ``--help``."""
    lines = ["usage: instella-ray COMMAND [OPTIONS]", "", "Instella-T2I on Ray: text to image over binary tokens."]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:<16} {about}" for name, about in commands.items())]
    return "\n".join([*lines, "", "instella-ray COMMAND --help describes a command; --version prints the version.", ""])
