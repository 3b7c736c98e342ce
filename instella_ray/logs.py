"""Logging of every process of a run: plain text or JSON lines on stderr, and optionally a JSON file; progress bars.

``INSTELLA_RAY_LOG=json`` selects JSON on stderr, ``INSTELLA_RAY_LOG_FILE`` an additional JSON file. The context fields of
the records (run id, job, rank) are set per process with :func:`set_up`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any

from tqdm import tqdm

FORMAT, FILE = "INSTELLA_RAY_LOG", "INSTELLA_RAY_LOG_FILE"
RUN_ID, JOB = "INSTELLA_RAY_RUN_ID", "INSTELLA_RAY_JOB"
PACKAGE = __name__.partition(".")[0]
AUDIT = f"{PACKAGE}.audit"
"""Logger whose records are JSON in every format, because programs read them."""
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""Attributes of Python's log records; all others were logged with ``extra``."""

PROGRESS_S = 60.0
"""Seconds between the lines of a progress bar that is not on a terminal."""

log = logging.getLogger(__name__)
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


def set_up_worker(fields: Mapping[str, Any]) -> None:
    """Set up logging in a process of a Ray job, where Ray's own handler of the root logger would repeat every record."""
    set_up(fields)
    logging.getLogger(PACKAGE).propagate = False


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
    """Return a tqdm progress bar on stderr, with tqdm's ``options``.

    On a terminal it is one line, redrawn below all that the process prints meanwhile. Elsewhere it is a line a minute, or
    with ``INSTELLA_RAY_LOG=json`` a record a minute, and one at each end.
    """
    seldom: dict[str, Any] = {"mininterval": PROGRESS_S, "maxinterval": PROGRESS_S}
    if context().get("format") == "json":
        return RecordBar(iterable, **{**seldom, **options})
    if sys.stderr.isatty():
        return TerminalBar(iterable, dynamic_ncols=True, **options)
    return tqdm(iterable, file=LineWriter(sys.stderr), ascii=True, **{**seldom, **options})


class TerminalBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """Progress bar on a terminal, below what the process prints until it is closed, such as the output of Ray's workers."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        self._redirection = ExitStack()
        terminal = sys.stderr.stream if isinstance(sys.stderr, LinesAboveBars) else sys.stderr
        super().__init__(iterable, file=terminal, **options)
        if not self.disable:
            self._redirect(sys.stdout, terminal, redirect_stdout)
            self._redirect(sys.stderr, terminal, redirect_stderr)

    def _redirect(self, stream: Any, terminal: IO[str], redirect: Callable[[Any], AbstractContextManager[Any]]) -> None:
        if stream.isatty() and not isinstance(stream, LinesAboveBars):
            lines = LinesAboveBars(stream, terminal)
            self._redirection.callback(lines.end)
            self._redirection.enter_context(redirect(lines))

    def close(self) -> None:
        super().close()
        self._redirection.close()


class LinesAboveBars:
    """Stream that writes to the terminal ``stream`` in whole lines, above the progress bars that are drawn on ``bars``."""

    def __init__(self, stream: IO[str], bars: IO[str]) -> None:
        self.stream, self.bars = stream, bars
        self._unfinished: dict[int, str] = {}
        """Begun line of each thread: a line is often printed in pieces."""

    def write(self, text: str) -> int:
        with tqdm.get_lock():
            thread = threading.get_ident()
            lines, end, rest = (self._unfinished.pop(thread, "") + text).rpartition("\n")
            if rest:
                self._unfinished[thread] = rest
            if end:
                with tqdm.external_write_mode(file=self.bars):
                    self.stream.write(lines + end)
                    self.stream.flush()
        return len(text)

    def end(self) -> None:
        """Write unfinished lines as they are."""
        with tqdm.get_lock():
            self.stream.write("".join(self._unfinished.values()))
            self._unfinished.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class RecordBar(tqdm):  # type: ignore[type-arg]
    """Progress bar that logs records with the fields ``done``, ``total``, ``unit`` and ``seconds`` instead of drawing."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        super().__init__(iterable, file=io.StringIO(), **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg == "":  # tqdm clears a bar that does not stay
            return
        state = self.format_dict
        done = f"{self.desc}: {self.n} of {self.total} {self.unit}"
        fields = {"done": self.n, "total": self.total, "unit": self.unit, "seconds": round(state["elapsed"], 1)}
        log.info("%s", ", ".join(filter(None, [done, state["postfix"]])), extra=fields)


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
    """Stream handler that uses the current ``sys.stderr``, which may be replaced."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
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
        if record.name == AUDIT:
            return JsonFormatter().format(record)
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        rank = f"rank {_context['rank']}: " if _context.get("rank") else ""
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{level}{rank}{record.getMessage()}{trace}"
