"""What a user of jobs on Ray gets to see: whole lines beside one progress bar, each said once, errors and no noise."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path

import pytest

from .kit.output import LINES
from .kit.project import ROOT

pytestmark = pytest.mark.ray
NOISE = (
    "PlacementGroupCleaner",
    "core_worker.cc",
    "infinite retries",
    "concurrent actors",
    "Loading weights",
    "\x1b[36m(",
)


def command(run: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.kit.output", run, str(folder)]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}


def screen(output: str) -> list[str]:
    """Lines of a terminal that is tall enough, after ``output``."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\r|\n|\x1b\[A|\x1b\[[0-9;]*m|[^\r\n\x1b]+", output):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_on_a_terminal_a_bar_stays_one_line_while_a_worker_of_ray_prints(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 100, 0, 0))
    run = subprocess.Popen(
        command("beside_a_bar", tmp_path), env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    output = b""
    try:
        while part := _read(ours):
            output += part
            if f"line {LINES - 1} of a worker".encode() in output:
                (tmp_path / "seen").touch()
        assert run.wait(30) == 0, output
    finally:
        run.kill()
        run.wait()
        os.close(ours)
    # Drawn again below each line that was printed.
    assert output.count(b"train:") > LINES
    lines = screen(output.decode())
    said = [line for line in lines if line and not line.startswith("train:")]
    assert [re.sub(r"pid=\d+", "pid=1", line) for line in said] == [
        *(f"(talk pid=1) line {number} of a worker" for number in range(LINES)),
        "a line in pieces",
        "warning: a record",
    ]
    (bar,) = [line for line in lines if line.startswith("train:")]
    assert re.fullmatch(r"train:\s+\d+%\|.*\| \d+/1000 \[.*step/s\]", bar)


def _read(terminal: int) -> bytes:
    """What was written to the terminal next; nothing once its last process has ended."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


def test_a_run_says_everything_once_and_an_error_of_a_worker_but_no_noise(tmp_path: Path) -> None:
    done = subprocess.run(
        command("one_of_each", tmp_path), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert [kind for kind in NOISE if kind in text] == [], text
    # On stdout stands the configuration too, and in a traceback frames may be alike.
    said, traceback = done.stderr.split("Traceback", 1)
    lines = [line for line in said.splitlines() if line.strip()]
    lines += [line for line in done.stdout.splitlines() if line.startswith("(")]
    assert [line for line, times in Counter(lines).items() if times > 1] == [], text
    for expected in (
        r"training starts at step 0 of 4",
        r"checkpoint \S+step-0000004 is complete",
        r"warning: row good",
    ):
        assert len(re.findall(expected, text)) == 1, text
    assert "warning: row bad" in text and "ZeroDivisionError: of a worker" in traceback
