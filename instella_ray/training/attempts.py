"""Attempts at a run: every start has a number, and only the newest may write into the run directory.

A cluster may start a job again while the first one is still at work, cut off from the cluster perhaps.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from .. import storage
from ..errors import UserError
from .run_dir import look_anew

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
