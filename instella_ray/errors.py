"""User errors, and the common main function of all commands."""

from __future__ import annotations

import logging
from collections.abc import Callable

from . import logs

log = logging.getLogger(__name__)


class UserError(Exception):
    """Bad input, described in one line with the expected value. Commands print it and exit with code 2."""


def run_main(command: Callable[[], int | None]) -> int:
    """Run ``command`` and return the exit code: its result, 2 on :class:`UserError`, 130 on Ctrl-C.

    Other exceptions propagate, or with JSON logging are logged with exit code 1.
    """
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
