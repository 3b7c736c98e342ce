"""Run records: ``run.json`` in every job's output folder, with configuration, inputs, code version and status.

Inputs are trees of :class:`Provenance` that include the inputs' own records, so that a copied folder still has the complete
chain.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from . import __version__, logs, storage
from .config import Config
from .errors import UserError

RECORD = "run.json"
Kind = Literal["model", "data", "files", "samples", "name"]
"""Kind of a :class:`Provenance`, by the source of its identity: weights, the job's ledger, file names and sizes, the run, or
only the name."""
log = logging.getLogger(__name__)


class Provenance(Config):
    """Input or output of a job, with its recorded inputs."""

    role: str
    """Role in the job: codes, tokenizer, shards, ..."""
    kind: Kind
    path: str
    """Path at the time of the job."""
    identity: str | None = None
    """Sha256 that identifies it among others of its kind; None if not available."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """Further properties: rows, step, run, code, ..."""
    inputs: tuple[Provenance, ...] = ()


class RunAttempt(Config):
    """One attempt of a job."""

    id: str
    run: str
    """Run id of its log records."""
    command: tuple[str, ...]
    config: dict[str, Any]
    changes: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    """Settings that differ from the attempt before it: old and new value by dotted key."""
    code: dict[str, Any]
    """Package version; for a git checkout also the commit and whether files differ from it."""
    versions: dict[str, str]
    host: str
    started: str
    """Start time (UTC)."""
    ended: str | None = None
    status: Literal["running", "finished", "failed", "interrupted"] = "running"
    """Status; stays ``running`` if the process was killed."""
    error: str | None = None


class RunRecord(Config):
    """Contents of ``run.json``."""

    schema_version: Literal[1] = 1
    job: str
    inputs: tuple[Provenance, ...]
    """Inputs of the last attempt."""
    outputs: tuple[Provenance, ...] = ()
    attempts: tuple[RunAttempt, ...]

    @property
    def run(self) -> str:
        """Run id of the first attempt."""
        return self.attempts[0].run

    @property
    def facts(self) -> dict[str, Any]:
        """Job, run, code and status, for :attr:`Provenance.facts`."""
        last = self.attempts[-1]
        return {"job": self.job, "run": self.run, "code": code_label(last.code), "status": last.status}


def read_record(folder: str) -> RunRecord | None:
    """Read the record of a job's output folder; None if there is none, UserError if it is invalid."""
    path = storage.join(folder, RECORD)
    if not storage.exists(path):
        return None
    try:
        return RunRecord.model_validate(storage.read_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: not a run record of version 1 ({where}: {first['msg']})") from None


@contextmanager
def recorded(
    folder: str,
    job: str,
    config: Config,
    inputs: Sequence[Provenance],
    changes: Mapping[str, tuple[Any, Any]] | None = None,
) -> Iterator[list[Provenance]]:
    """Record an attempt in ``folder``'s ``run.json`` during the block; append the job's outputs to the yielded list.

    ``changes`` are the settings that the attempt changes, old and new value by dotted key.

    The folder must already belong to the job. Records of earlier attempts are kept.
    """
    begun = read_record(folder)
    attempt = _attempt(job, config, changes or {})
    before = begun.attempts if begun is not None else ()
    record = RunRecord(job=job, inputs=tuple(inputs), attempts=(*before, attempt))
    path, outputs = storage.join(folder, RECORD), list[Provenance]()
    storage.write_json(path, record.model_dump(mode="json"))
    end: dict[str, Any] = {"status": "finished"}
    try:
        yield outputs
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        end = {"status": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        raise
    finally:
        _end(folder, attempt, {**end, "ended": _now()}, outputs)


def _end(folder: str, attempt: RunAttempt, end: Mapping[str, Any], outputs: Iterable[Provenance]) -> None:
    """Record the end of ``attempt``; newer attempts may have started. A failed write is only logged."""
    path = storage.join(folder, RECORD)
    try:
        storage.filesystem(path)[0].invalidate_cache()
        record = read_record(folder)
        if record is None:
            return
        attempts = tuple(a.model_copy(update=end) if a.id == attempt.id else a for a in record.attempts)
        last = record.attempts[-1].id == attempt.id
        changed = {"attempts": attempts, "outputs": tuple(outputs) if last else record.outputs}
        storage.write_json(path, record.model_copy(update=changed).model_dump(mode="json"))
    except Exception as error:  # stores raise unrelated error types
        log.warning("%s: could not be written (%s: %s)", path, type(error).__name__, error)


def _attempt(job: str, config: Config, changes: Mapping[str, tuple[Any, Any]]) -> RunAttempt:
    return RunAttempt(
        id=uuid.uuid4().hex,
        run=logs.run_id(job),
        command=tuple(sys.argv),
        config=config.model_dump(mode="json"),
        changes=dict(changes),
        code=code_version(),
        versions={"python": platform.python_version(), **{name: version(name) for name in ("ray", "torch")}},
        host=platform.node(),
        started=_now(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def code_version() -> dict[str, Any]:
    """Return the version of this package; for a git checkout also the commit and whether files differ from it."""
    about: dict[str, Any] = {"version": __version__}
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return about
    try:
        commit, changes = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    except (OSError, subprocess.SubprocessError):
        return about
    return {**about, "commit": commit, "dirty": bool(changes)}


def _git(root: Path, *words: str) -> str:
    # Without locks, so that a concurrent git command in the checkout does not fail.
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=env).stdout.strip()


def code_label(code: Mapping[str, Any]) -> str:
    """Format a code version: ``0.1.0``, ``0.1.0 at 1a2b3c4d5e6f`` or ``0.1.0 at 1a2b3c4d5e6f with changes``."""
    commit = f" at {code['commit'][:12]}" if code.get("commit") else ""
    return f"{code['version']}{commit}{' with changes' if code.get('dirty') else ''}"
