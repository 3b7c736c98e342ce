"""Run directories, any folder that fsspec reaches: what lies where, and which start of the run may write there.

A cluster may start a job again while the first one is still at work, cut off from the cluster perhaps: every start has a
number, and only the newest may write.
"""

from __future__ import annotations

import hashlib
import json
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

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
STATE = "state.json"
"""File of a checkpoint that is written last: a folder with it is complete, one without is not there yet."""
SCORES = "metrics.json"
"""File of a checkpoint with what was logged last when it was saved."""


TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl that hold its last line for certain."""


def located(run_dir: str | Path) -> str:
    """The run directory under a name that means the same in another working directory: workers have their own."""
    return str(run_dir) if "://" in str(run_dir) else str(Path(run_dir).absolute())


def look_anew(url: str) -> None:
    """Forget listings that a client of an object store keeps: other machines write there too."""
    storage.filesystem(url)[0].invalidate_cache()


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after ``step`` steps; the names sort by step."""
    return f"step-{step:07d}"


def checkpoint_step(folder: str) -> int:
    """Steps that a checkpoint's folder has behind it."""
    return int(folder.rpartition("/step-")[2])


def checkpoint_folders(run_dir: str | Path) -> dict[str, bool]:
    """Each folder of a checkpoint, oldest first, and whether it is complete."""
    base = storage.join(located(run_dir), CHECKPOINTS)
    look_anew(base)
    fs, path = storage.filesystem(base)
    found = [PurePosixPath(name).relative_to(path.rstrip("/")) for name in storage.retry(lambda: fs.find(path))]
    complete = {name.parts[0] for name in found if name.parts[1:] == (STATE,)}
    names = sorted({name.parts[0] for name in found if name.parts[0].startswith("step-")})
    return {storage.join(base, name): name in complete for name in names}


def finished_checkpoints(run_dir: str | Path) -> list[str]:
    """The complete checkpoint folders that a run has kept, oldest first."""
    return [folder for folder, complete in checkpoint_folders(run_dir).items() if complete]


def latest_checkpoint(run_dir: str | Path) -> str:
    """The newest complete checkpoint folder of a run; UserError where there is none."""
    folders = finished_checkpoints(run_dir)
    if not folders:
        raise UserError(f"run_dir {run_dir}: no finished checkpoint")
    return folders[-1]


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order; a line that is just being written is left out."""
    path = storage.join(located(run_dir), METRICS)
    look_anew(path)
    lines = storage.read_text(path).splitlines(keepends=True) if storage.exists(path) else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_metrics(run_dir: str | Path) -> dict[str, Any] | None:
    """The last of :func:`read_metrics`, from the file's end; None where nothing was logged yet."""
    path = storage.join(located(run_dir), METRICS)
    look_anew(path)
    fs, name = storage.filesystem(path)
    size = fs.size(name) if fs.exists(name) else 0
    lines = fs.cat_file(name, start=max(0, size - TAIL), end=size).splitlines(keepends=True) if size else []
    # The first may be cut, the last be just being written.
    whole = [line for line in lines[size > TAIL :] if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else None


def upload(folder: Path, url: str, before_each: Callable[[], None]) -> None:
    """Copy a checkpoint's files to ``url``, its state last; ``before_each`` file is asked whether that is still wanted."""
    fs, path = storage.filesystem(url)
    fs.makedirs(path, exist_ok=True)
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name == STATE)
    for file in files:
        before_each()
        target = storage.join(path, file.relative_to(folder).as_posix())
        if file.name == STATE:
            storage.write_bytes(storage.join(url, STATE), file.read_bytes())
        else:
            fs.makedirs(fs._parent(target), exist_ok=True)
            storage.retry(partial(fs.put_file, str(file), target))


def remove_checkpoint(url: str) -> None:
    """Delete a checkpoint, its state first: what is half deleted is not taken for a complete one."""
    fs, path = storage.filesystem(url)
    if fs.exists(state := storage.join(path, STATE)):
        fs.rm_file(state)
    storage.remove_tree(url)


@contextmanager
def local_folder(url: str) -> Iterator[Path]:
    """A folder of files as one on this machine: itself, or a copy that is deleted when the block ends."""
    if storage.is_local(url):
        yield Path(storage.filesystem(url)[1])
        return
    with tempfile.TemporaryDirectory(prefix="instella-ray-") as copy:
        download(url, Path(copy))
        yield Path(copy)


def download(url: str, to: Path) -> None:
    """Copy all files of a folder into one on this machine."""
    fs, path = storage.filesystem(url)
    for name in storage.retry(lambda: fs.find(path)):
        target = to / PurePosixPath(name).relative_to(path.rstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.retry(partial(fs.get_file, name, str(target)))


def scratch_folder(url: str) -> Path:
    """A folder of this machine's own for what is on its way to or from ``url``: the same for every process."""
    return Path(tempfile.gettempdir(), f"instella-ray-{hashlib.sha256(url.encode()).hexdigest()[:16]}")


ATTEMPTS = "attempts"


@dataclass(frozen=True)
class Attempt:
    """The ``number``-th start of the run in ``run_dir``, counted from 1."""

    run_dir: str
    number: int

    @classmethod
    def begin(cls, run_dir: str, *, resume: bool) -> Attempt:
        """Take the next number, which stops the attempts before; UserError where a new run is not the first."""
        attempt = cls(run_dir, 1)
        while not attempt._claim():
            if not resume:
                raise UserError(f"run_dir {run_dir}: holds a run already, which another start has just begun")
            attempt = cls(run_dir, attempt.number + 1)
        return attempt

    def check(self) -> None:
        """UserError once a newer attempt has begun."""
        newer = self._file(self.number + 1)
        look_anew(newer)
        if storage.exists(newer):
            place = storage.read_json(newer)
            raise UserError(
                f"run_dir {self.run_dir}: attempt {self.number + 1} has taken the run over "
                f"(process {place['process']} on {place['host']}, {place['begun']}); attempt {self.number} stops"
            )

    def check_storage(self) -> None:
        """UserError on a machine that sees another folder under the run directory's name than the driver does."""
        if not storage.exists(self._file(self.number)):
            raise UserError(
                f"run_dir {self.run_dir}: not the same folder on {platform.node()} as where the run was started; "
                "expected a file system that all nodes share, or a URL such as gs://BUCKET/RUN"
            )

    def _file(self, number: int) -> str:
        return storage.join(self.run_dir, ATTEMPTS, f"{number:04d}.json")

    def _claim(self) -> bool:
        """Create this attempt's file; False where there is one already."""
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        mark = {"id": uuid.uuid4().hex, "host": platform.node(), "process": os.getpid(), "begun": begun}
        text = json.dumps(mark, indent=1) + "\n"
        url = self._file(self.number)
        fs, path = storage.filesystem(url)
        try:
            if storage.is_local(url):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with open(path, "x") as stream:
                    stream.write(text)
            else:
                # Stores that can refuse to replace an object do so; others look first.
                fs.pipe_file(path, text.encode(), mode="create")
        except FileExistsError:
            # A store's client that repeats a call meets what its first try has made.
            return _id_in(url) == mark["id"]
        return True


def _id_in(url: str) -> str | None:
    """The id in an attempt's file, None while another process is still writing it."""
    try:
        return str(storage.read_json(url)["id"])
    except UserError:
        return None
