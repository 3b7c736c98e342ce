"""Errors that are the user's to mend, and how every command ends."""

from __future__ import annotations

import logging
from collections.abc import Callable

from . import logs

log = logging.getLogger(__name__)


class UserError(Exception):
    """Bad input: one line that names the thing and says what was expected. Commands print it and exit with 2."""


def run_main(command: Callable[[], int | None]) -> int:
    """Run ``command`` and return the process's exit code: its own, 2 on a :class:`UserError`, 130 on Ctrl-C."""
    logs.set_up({})
    try:
        return command() or 0
    except UserError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.info("interrupted")
        return 130
    except Exception as error:
        if not logs.for_machines():
            raise
        log.exception("%s: %s", type(error).__name__, error)
        return 1
