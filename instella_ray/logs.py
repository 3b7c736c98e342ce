"""Log records of every process of a run: JSON lines for machines, plain lines for people.

``INSTELLA_RAY_LOG=json`` asks for the former on stderr, ``INSTELLA_RAY_LOG_FILE`` for a file of them beside. What a record
carries beside its message, the run's id, the job and the rank, is what :func:`set_up` was told in its process.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FORMAT, FILE = "INSTELLA_RAY_LOG", "INSTELLA_RAY_LOG_FILE"
RUN_ID, JOB = "INSTELLA_RAY_RUN_ID", "INSTELLA_RAY_JOB"
PACKAGE = __name__.partition(".")[0]
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""What Python's own records hold; anything else is a field that was logged with ``extra``."""

_context: dict[str, Any] = {}


def run_id(job: str) -> str:
    """The id of the run that this process is part of: ``INSTELLA_RAY_RUN_ID``, which is set where it is not.

    What is started from here inherits it.
    """
    return os.environ.setdefault(RUN_ID, new_run_id(job))


def new_run_id(name: str) -> str:
    """``name``, the time (UTC) and six random digits."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def context() -> dict[str, Any]:
    """What this process's records carry and where they go, to be handed to :func:`set_up` in a worker's process."""
    places = {"format": FORMAT, "file": FILE, "job": JOB, "run": RUN_ID}
    return {**{name: os.environ[key] for name, key in places.items() if os.environ.get(key)}, **_context}


def begin_job(job: str) -> None:
    """Set up the records of a job's driver, whose processes inherit its run id."""
    os.environ[JOB] = job
    run_id(job)
    set_up({})


def set_up(fields: Mapping[str, Any]) -> None:
    """Log this package's records to stderr, as lines for people or as JSON, and to a file of JSON where one is asked for.

    ``fields`` (run, job, rank, attempt, ...) are added to those that this process's records carry; ``format`` and
    ``file`` among them say what the environment says elsewhere.
    """
    _context.update(fields)
    found = context()
    logger = logging.getLogger(PACKAGE)
    for handler in [h for h in logger.handlers if isinstance(h.formatter, JsonFormatter | TextFormatter)]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(StderrHandler(JsonFormatter() if found.get("format") == "json" else TextFormatter()))
    if file := found.get("file"):
        lines = logging.FileHandler(file, delay=True)
        lines.setFormatter(JsonFormatter())
        logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    if found.get("format", "text") not in ("json", "text"):
        logger.warning("%s=%s: expected json or text; lines of text it is", FORMAT, found["format"])


@contextmanager
def carrying(fields: Mapping[str, Any]) -> Iterator[None]:
    """:func:`set_up` with ``fields`` for the time of the block."""
    before = dict(_context)
    set_up(fields)
    try:
        yield
    finally:
        _context.clear()
        set_up(before)


def for_machines() -> bool:
    """Whether records are asked for as JSON, on stderr or in a file."""
    found = context()
    return found.get("format") == "json" or bool(found.get("file"))


class StderrHandler(logging.StreamHandler[Any]):
    """Writes to whatever stderr is at that moment."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC), level, job, run, rank and attempt where known, message, further fields."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        about: dict[str, Any] = {"time": f"{clock}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        about |= {name: value for name, value in context().items() if name not in ("format", "file")}
        about |= {"message": record.getMessage(), "logger": record.name, "process": record.process}
        # What is logged with extra never takes the place of what every record has.
        about = {**{name: value for name, value in vars(record).items() if name not in STANDARD}, **about}
        if record.exc_info:
            about["error"] = self.formatException(record.exc_info)
        return json.dumps(about, default=str)


class TextFormatter(logging.Formatter):
    """The message, after the level's name where something is wrong."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        rank = f"rank {_context['rank']}: " if _context.get("rank") else ""
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{level}{rank}{record.getMessage()}{trace}"
