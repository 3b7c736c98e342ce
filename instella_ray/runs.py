"""Run records: every job's output folder says in ``run.json`` who made it, from what, with which code, and how it ended.

What was read is a tree of :class:`Provenance`, each with what its own record says it was made from: a folder that is copied
elsewhere still tells the whole chain.
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
"""What tells a :class:`Provenance` from others: its weights, its job's account, names and sizes, its run, its name alone."""
log = logging.getLogger(__name__)


class Provenance(Config):
    """Something that a job read or wrote, and what that was made from as far as it says."""

    role: str
    """What it was to the job: codes, tokenizer, shards, ..."""
    kind: Kind
    path: str
    """Where it was then."""
    identity: str | None = None
    """Sha256 that tells it from others of its kind; None where there is none to be had."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """What is worth knowing of it: rows, step, run, code, ..."""
    inputs: tuple[Provenance, ...] = ()


class RunAttempt(Config):
    """One start of a job."""

    id: str
    run: str
    """The run id that its log records carry."""
    command: tuple[str, ...]
    config: dict[str, Any]
    code: dict[str, Any]
    """Version of the package; commit and whether files differed from it, where it ran from a checkout."""
    versions: dict[str, str]
    host: str
    started: str
    """UTC."""
    ended: str | None = None
    status: Literal["running", "finished", "failed", "interrupted"] = "running"
    """A process that was killed leaves ``running`` behind."""
    error: str | None = None


class RunRecord(Config):
    """The file."""

    schema_version: Literal[1] = 1
    job: str
    inputs: tuple[Provenance, ...]
    """What the last attempt read."""
    outputs: tuple[Provenance, ...] = ()
    attempts: tuple[RunAttempt, ...]

    @property
    def run(self) -> str:
        """Id of the first attempt."""
        return self.attempts[0].run

    @property
    def facts(self) -> dict[str, Any]:
        """Job, run and code, as a :class:`Provenance` tells them."""
        last = self.attempts[-1]
        return {"job": self.job, "run": self.run, "code": code_label(last.code), "status": last.status}


def read_record(folder: str) -> RunRecord | None:
    """The record of a job's output folder, None where there is none; UserError where it cannot be read."""
    path = storage.join(folder, RECORD)
    if not storage.exists(path):
        return None
    try:
        return RunRecord.model_validate(storage.read_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: not a record of a run, version 1 ({where}: {first['msg']})") from None


@contextmanager
def recorded(folder: str, job: str, config: Config, inputs: Sequence[Provenance]) -> Iterator[list[Provenance]]:
    """Keep ``folder``'s record while the block works in it; what is appended to the list are the job's outputs.

    The folder must be the job's already. What an earlier attempt has noted there stays.
    """
    begun = read_record(folder)
    attempt = _attempt(job, config)
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
    """Note how ``attempt`` ended; others may have begun since. A store that refuses is no reason to fail a job."""
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
    except Exception as error:  # each store has errors of its own
        log.warning("%s: could not be written (%s: %s)", path, type(error).__name__, error)


def _attempt(job: str, config: Config) -> RunAttempt:
    return RunAttempt(
        id=uuid.uuid4().hex,
        run=logs.run_id(job),
        command=tuple(sys.argv),
        config=config.model_dump(mode="json"),
        code=code_version(),
        versions={"python": platform.python_version(), **{name: version(name) for name in ("ray", "torch")}},
        host=platform.node(),
        started=_now(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def code_version() -> dict[str, Any]:
    """Version of this package; with the commit, and whether files differ from it, where it is a checkout's."""
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
    # No locks: another git may be at work in the checkout, and a commit is not to fail because a job looks at it.
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=env).stdout.strip()


def code_label(code: Mapping[str, Any]) -> str:
    """``0.1.0``, ``0.1.0 at 1a2b3c4d5e6f`` or ``0.1.0 at 1a2b3c4d5e6f with changes``."""
    commit = f" at {code['commit'][:12]}" if code.get("commit") else ""
    return f"{code['version']}{commit}{' with changes' if code.get('dirty') else ''}"
