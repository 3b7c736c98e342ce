"""Run directories on any fsspec filesystem: their layout, and the attempts that may write to them.

A cluster may restart a job while the previous process is still running, for example after a network partition. Attempts
are therefore numbered, and only the newest may write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .. import storage
from ..errors import UserError
from ..models.folders import STATE

log = logging.getLogger(__name__)
CONFIG, METRICS = "config.yaml", "metrics.jsonl"
SCORES = "metrics.json"
"""File of a checkpoint with the last logged metrics at the time of saving."""


TAIL = 1 << 16
"""Bytes read from the end of metrics.jsonl to find its last line."""


def located(run_dir: str | Path) -> str:
    """Return an absolute path or URL of the run directory, because workers have other working directories."""
    return str(run_dir) if "://" in str(run_dir) else str(Path(run_dir).absolute())


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in order, without a last line that is still being written."""
    path = storage.join(located(run_dir), METRICS)
    storage.invalidate_listing(path)
    lines = storage.read_text(path).splitlines(keepends=True) if storage.exists(path) else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_metrics(run_dir: str | Path) -> dict[str, Any] | None:
    """Return the last row of :func:`read_metrics`, reading only the file's end; None if there is none."""
    path = storage.join(located(run_dir), METRICS)
    storage.invalidate_listing(path)
    fs, name = storage.filesystem(path)
    size = fs.size(name) if fs.exists(name) else 0
    lines = fs.cat_file(name, start=max(0, size - TAIL), end=size).splitlines(keepends=True) if size else []
    # The first line may be truncated, the last still being written.
    whole = [line for line in lines[size > TAIL :] if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else None


def upload(folder: Path, url: str, before_each: Callable[[], None]) -> None:
    """Copy a checkpoint's files to ``url``, its state last; ``before_each`` is called before each file and may raise."""
    fs, path = storage.filesystem(url)
    storage.make_folder(fs, path)
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name == STATE)
    for file in files:
        before_each()
        target = storage.join(path, file.relative_to(folder).as_posix())
        if file.name == STATE:
            storage.write_bytes(storage.join(url, STATE), file.read_bytes())
        else:
            storage.make_folder(fs, fs._parent(target))
            storage.retry(partial(fs.put_file, str(file), target))


def remove_checkpoint(url: str) -> None:
    """Delete a checkpoint, its state first, so that a partly deleted one counts as incomplete."""
    fs, path = storage.filesystem(url)
    if fs.exists(state := storage.join(path, STATE)):
        fs.rm_file(state)
    storage.remove_tree(url)


@contextmanager
def local_folder(url: str) -> Iterator[Path]:
    """Provide a folder as a local path: itself, or a temporary copy that is deleted when the block ends."""
    if storage.is_local(url):
        yield Path(storage.filesystem(url)[1])
        return
    with tempfile.TemporaryDirectory(prefix="instella-ray-") as copy:
        download(url, Path(copy))
        yield Path(copy)


def download(url: str, to: Path) -> None:
    """Copy all files of a folder to the local folder ``to``."""
    fs, path = storage.filesystem(url)
    for name in storage.retry(lambda: fs.find(path)):
        target = to / PurePosixPath(name).relative_to(path.rstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.retry(partial(fs.get_file, name, str(target)))


def scratch_folder(url: str) -> Path:
    """Return the local staging folder for transfers to or from ``url``, the same path in every process of a node."""
    return Path(tempfile.gettempdir(), f"instella-ray-{hashlib.sha256(url.encode()).hexdigest()[:16]}")


ATTEMPTS = "attempts"


@dataclass(frozen=True)
class Attempt:
    """Attempt ``number`` (from 1) at the run in ``run_dir``."""

    run_dir: str
    number: int

    @classmethod
    def begin(cls, run_dir: str, *, resume: bool) -> Attempt:
        """Claim the next number, which stops earlier attempts; UserError if a new run is not the first attempt."""
        attempt = cls(run_dir, 1)
        while not attempt._claim():
            if not resume:
                raise UserError(f"run_dir {run_dir}: already holds a run, which another process has just started")
            attempt = cls(run_dir, attempt.number + 1)
        return attempt

    def check(self) -> None:
        """Raise UserError if a newer attempt has started."""
        newer = self._file(self.number + 1)
        storage.invalidate_listing(newer)
        if storage.exists(newer):
            place = storage.read_json(newer)
            raise UserError(
                f"run_dir {self.run_dir}: attempt {self.number + 1} has taken over the run "
                f"(process {place['process']} on {place['host']}, {place['begun']}); attempt {self.number} stops"
            )

    def request_stop(self) -> None:
        """Ask this attempt's workers to stop, by a file that they look for. A failed write is only logged."""
        try:
            storage.write_text(self._stop_file, "")
        except Exception as error:  # stores raise unrelated error types
            log.error("%s: could not be written, so that the run goes on (%s)", self._stop_file, error)

    def stop_requested(self) -> bool:
        """Return whether :meth:`request_stop` was called in any process. A failed read counts as no."""
        try:
            storage.invalidate_listing(self._stop_file)
            return storage.exists(self._stop_file)
        except Exception:
            return False

    @property
    def _stop_file(self) -> str:
        return storage.join(self.run_dir, ATTEMPTS, f"{self.number:04d}.stop")

    def check_storage(self) -> None:
        """Raise UserError if the run directory on this machine is not the driver's, because it is not shared."""
        if not storage.exists(self._file(self.number)):
            raise UserError(
                f"run_dir {self.run_dir}: not the same folder on {platform.node()} as on the machine that started the run; "
                "expected a file system that all nodes share, or a URL such as gs://BUCKET/RUN"
            )

    def _file(self, number: int) -> str:
        return storage.join(self.run_dir, ATTEMPTS, f"{number:04d}.json")

    def _claim(self) -> bool:
        """Create this attempt's file and return True; False if it already exists."""
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        mark = {"id": uuid.uuid4().hex, "host": platform.node(), "process": os.getpid(), "begun": begun}
        text = json.dumps(mark, indent=1) + "\n"
        url = self._file(self.number)
        fs, path = storage.filesystem(url)
        try:
            if storage.is_local(url):
                storage.make_folder(fs, fs._parent(path))
                with open(path, "x") as stream:
                    stream.write(text)
            else:
                # Atomic on stores with conditional writes; other clients check for existence first.
                fs.pipe_file(path, text.encode(), mode="create")
        except FileExistsError:
            # A client that retries the call may find the object that its first try created.
            return _id_in(url) == mark["id"]
        return True


def _id_in(url: str) -> str | None:
    """Return the id in an attempt's file; None while another process is still writing it."""
    try:
        return str(storage.read_json(url)["id"])
    except UserError:
        return None
