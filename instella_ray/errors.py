"""Errors that are the user's to mend, and how every command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: one line that names the thing and says what was expected. Commands print it and exit with 2."""


def run_main(command: Callable[[], int | None]) -> int:
    """Run ``command`` and return the process's exit code: its own, 2 on a :class:`UserError`, 130 on Ctrl-C."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
