"""Logging of every process of a run: plain text or JSON lines on stderr, and optionally a JSON file; progress bars.

``INSTELLA_RAY_LOG=json`` selects JSON on stderr, ``INSTELLA_RAY_LOG_FILE`` an additional JSON file. The context fields of
the records (run id, job, rank) are set per process with :func:`set_up`.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from tqdm import tqdm

FORMAT, FILE = "INSTELLA_RAY_LOG", "INSTELLA_RAY_LOG_FILE"
RUN_ID, JOB = "INSTELLA_RAY_RUN_ID", "INSTELLA_RAY_JOB"
PACKAGE = __name__.partition(".")[0]
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""Attributes of Python's log records; all others were logged with ``extra``."""

PROGRESS_S = 60.0
"""Seconds between the lines of a progress bar in a file."""

_context: dict[str, Any] = {}


def run_id(job: str) -> str:
    """Return the run id of this process, ``INSTELLA_RAY_RUN_ID``, which is set if missing.

    Child processes inherit it.
    """
    return os.environ.setdefault(RUN_ID, new_run_id(job))


def new_run_id(name: str) -> str:
    """Return a new run id: ``name``, the time (UTC) and six random hex digits."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def context() -> dict[str, Any]:
    """Return this process's context fields, format and log file, to pass to :func:`set_up` in a worker process."""
    places = {"format": FORMAT, "file": FILE, "job": JOB, "run": RUN_ID}
    return {**{name: os.environ[key] for name, key in places.items() if os.environ.get(key)}, **_context}


def begin_job(job: str) -> None:
    """Set up logging in a job's driver; its child processes inherit the run id."""
    os.environ[JOB] = job
    run_id(job)
    set_up({})


def set_up(fields: Mapping[str, Any]) -> None:
    """Log this package's records to stderr as text or JSON, and to a JSON file if configured.

    ``fields`` (run, job, rank, attempt, ...) are added to this process's context; its ``format`` and ``file`` override the
    environment variables.
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
        logger.warning("%s=%s: expected json or text; using text", FORMAT, found["format"])


@contextmanager
def carrying(fields: Mapping[str, Any]) -> Iterator[None]:
    """Add ``fields`` to the context with :func:`set_up` during the block."""
    before = dict(_context)
    set_up(fields)
    try:
        yield
    finally:
        _context.clear()
        set_up(before)


def for_machines() -> bool:
    """Return whether JSON records are configured, on stderr or in a file."""
    found = context()
    return found.get("format") == "json" or bool(found.get("file"))


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """Return a tqdm progress bar on stderr: one line that is redrawn on a terminal, a line a minute in a file.

    ``options`` are tqdm's.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **options)
    seldom: dict[str, Any] = {"mininterval": PROGRESS_S, "maxinterval": PROGRESS_S, "ascii": True}
    return tqdm(iterable, file=LineWriter(sys.stderr), **{**seldom, **options})


class LineWriter:
    """Stream for a progress bar that ends every state of the bar with a line break, instead of overwriting it."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write ``text`` without its cursor movements, if anything is left."""
        if line := text.replace("\x1b[A", "").strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


class StderrHandler(logging.StreamHandler[Any]):
    """Stream handler that uses the current ``sys.stderr``, which may be replaced, and writes above progress bars."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


class JsonFormatter(logging.Formatter):
    """Formatter of one JSON object per record: UTC time, level, context fields, message and ``extra`` fields."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        about: dict[str, Any] = {"time": f"{clock}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        about |= {name: value for name, value in context().items() if name not in ("format", "file")}
        about |= {"message": record.getMessage(), "logger": record.name, "process": record.process}
        # Fields from extra never override standard fields.
        about = {**{name: value for name, value in vars(record).items() if name not in STANDARD}, **about}
        if record.exc_info:
            about["error"] = self.formatException(record.exc_info)
        return json.dumps(about, default=str)


class TextFormatter(logging.Formatter):
    """Formatter of plain messages, prefixed with the level from warning on, and the rank of other ranks than 0."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        rank = f"rank {_context['rank']}: " if _context.get("rank") else ""
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{level}{rank}{record.getMessage()}{trace}"
