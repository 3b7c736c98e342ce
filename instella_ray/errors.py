"""User errors, and the common main function of all commands."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from . import logs
from .memory import keep_freed_memory

log = logging.getLogger(__name__)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errnos of storage without space."""
PATH_ERRNOS = FULL | {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""Errnos that are due to the user's path or machine, and not to a fault of this package."""


class UserError(Exception):
    """Bad input, described in one line with the expected value. Commands print it and exit with code 2."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM in a run that can be resumed."""


def path_problem(error: BaseException) -> str | None:
    """Describe in one line why a path cannot be used, if ``error`` says so and names the path; else None."""
    found = task_error(error)
    if not isinstance(found, OSError) or found.errno not in PATH_ERRNOS or found.filename is None:
        return None
    reason = found.strerror or os.strerror(found.errno)
    return f"{os.fsdecode(found.filename)}: {reason[:1].lower()}{reason[1:]}"


def task_error(error: BaseException) -> BaseException:
    """Return the UserError or OSError that a task of Ray raised, the innermost ``cause``; other errors unchanged."""
    found = error
    while isinstance(cause := getattr(found, "cause", None), BaseException):
        found = cause
    return found if isinstance(found, OSError | UserError) else error


def run_main(command: Callable[[], int | None]) -> int:
    """Run ``command`` and return the exit code: its result, 2 on :class:`UserError`, 130 on Ctrl-C.

    A path that cannot be used (:func:`path_problem`), such as a folder without permission to write, is a user error too.
    Other exceptions propagate, or with JSON logging are logged with exit code 1.
    """
    logs.set_up({})
    keep_freed_memory()
    try:
        return command() or 0
    except UserError as error:
        log.error("%s", task_error(error))
        return 2
    except KeyboardInterrupt:
        log.info("interrupted")
        return 130
    except Exception as error:
        if problem := path_problem(error):
            log.error("%s", problem)
            return 2
        if not logs.for_machines():
            raise
        log.exception("%s: %s", type(error).__name__, error)
        return 1
