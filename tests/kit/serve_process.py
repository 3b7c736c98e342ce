"""An endpoint as its user starts it: a process of its own, until it is told to stop."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

Process = subprocess.Popen[str]


@contextmanager
def serve_process(
    command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
) -> Iterator[tuple[Process, str]]:
    """The process of ``command``, once it listens, and the line that says so; it does not outlive the block."""
    process = subprocess.Popen(
        command, env=dict(env), cwd=cwd, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    # Should nothing ever be printed, the line below ends with the process.
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        yield process, next((line for line in process.stdout if line.startswith("listening on ")), "nothing")
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def rest_until_the_end(process: Process) -> str:
    """What a process that ends without an error still prints."""
    assert process.stdout is not None
    rest = process.stdout.read()
    assert process.wait() == 0
    return rest
